"""The stage ``cached_decoding`` (S42)."""

from __future__ import annotations

from typing import Any

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage
from puna.model.sizes import forward_operations


class CachedDecoding(Parameters):
    """Parameters of the stage ``cached_decoding``."""

    prompt: str = pydantic.Field("The ", min_length=1)
    """Text that is continued."""
    tokens: int = pydantic.Field(256, ge=2)
    """How many tokens are decoded, whatever they are."""
    rounds: int = pydantic.Field(2, ge=1)
    """How often both ways take turns; the best of each is told."""


def _plan(parameters: CachedDecoding, shapes: Any) -> Cost:
    """Without a cache all before is read for each token; with one the weights are."""
    spec = shapes.spec
    if spec is None:
        return Cost()
    read = parameters.rounds * parameters.tokens * (parameters.tokens / 2 + 1)
    flops = read * forward_operations(spec, parameters.tokens)
    weights = 4.0 * spec.parameter_count()
    seconds = shapes.device.seconds(flops, "float32")
    seconds += parameters.rounds * parameters.tokens * shapes.device.read_seconds(weights)
    tokens = 2.0 * parameters.rounds * parameters.tokens
    return Cost(tokens=tokens, flops=flops, memory=weights + 3e8, seconds=seconds)


@stage("cached_decoding", parameters=CachedDecoding, inputs={"model": Input("model")}, plan=_plan)
def cached_decoding(context: Context, parameters: CachedDecoding) -> Outcome:
    """Decode greedily in float32 with a cache and without, and against what memory allows (S42).

    Time without a cache grows with the square of the tokens.
    """
    from puna.core.errors import PunaError
    from puna.decode.cached_decoding import compare
    from puna.text import pretrained

    model = pretrained.load_merged(context.inputs["model"], dtype="float32", device=context.device)
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise PunaError("the model has no tokenizer", where=model.source, fix="put tokenizer.json beside it")
    start = [tokenizer.bos_id] if tokenizer.adds_bos else []
    prompt = [*start, *tokenizer.encode(parameters.prompt)]
    return Outcome(metrics=compare(model, prompt, parameters.tokens, parameters.rounds))
