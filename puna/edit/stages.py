"""The stages of this room: ``initialise`` (a tokenizer -> a new model), ``shorten`` (a model of some of its
blocks), and those that modules below hold."""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage
from puna.edit import (  # noqa: F401  registers their stages
    augment_stages,
    mask_stages,
    merge_stages,
    pruning_stages,
    recover_stages,
    residual_stages,
    search_stages,
    unmasking_stages,
)
from puna.edit.quantize import stages as quantize_stages  # noqa: F401  registers its stages
from puna.edit.sub_blocks import stages as sub_block_stages  # noqa: F401  registers its stages
from puna.train.plan import BYTES


class Shorten(Parameters):
    """Parameters of the stage ``shorten``."""

    blocks: tuple[int, ...] = pydantic.Field(min_length=1)
    """The blocks that are kept, counted from 0, in the model's order."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """What the weights are saved in."""


def _plan(parameters: Shorten, shapes: Any) -> Cost:
    """The weights are read and held once, in float32, and those that are kept are written."""
    spec = shapes.spec
    if spec is None:
        return Cost()
    blocks = tuple(spec.blocks[block] for block in parameters.blocks if 0 <= block < len(spec.blocks))
    short = spec.replace(blocks=blocks) if blocks else spec
    held, written = 4 * spec.parameter_count(), short.parameter_count() * BYTES[parameters.save_dtype]
    return Cost(memory=held + written, seconds=shapes.device.read_seconds(held + written), spec=short)


@stage(
    "shorten", parameters=Shorten, inputs={"model": Input("model")}, outputs={"model": "model"}, plan=_plan
)
def shorten(context: Context, parameters: Shorten) -> Outcome:
    """Keep some blocks of a model and leave the others out: the raw form of a small sibling.

    Time and memory grow linearly with the number of weights.
    """
    from puna.edit.shorten import shorten as keep
    from puna.text import pretrained

    model = pretrained.load_plain(context.inputs["model"], dtype="float32")
    short = keep(model, parameters.blocks).to(pretrained.DTYPES[parameters.save_dtype])
    written = pretrained.save(short, context.out / "model")
    count, before = short.spec.parameter_count(), model.spec.parameter_count()
    figures = {"parameters": float(count), "blocks": len(short.spec.blocks), "share": count / before}
    return Outcome({"model": written}, figures)


class Initialise(Parameters):
    """Parameters of the stage ``initialise``: a Llama's sizes, named as in transformers' config."""

    hidden_size: pydantic.PositiveInt = 256
    """Width of the hidden states."""
    intermediate_size: pydantic.PositiveInt = 688
    """Width of the feed-forward half."""
    num_hidden_layers: pydantic.PositiveInt = 4
    """Blocks."""
    num_attention_heads: pydantic.PositiveInt = 4
    """Heads of the queries; hidden_size is a multiple of it."""
    num_key_value_heads: pydantic.PositiveInt | None = None
    """Heads of keys and values; null: as many as of the queries."""
    max_position_embeddings: pydantic.PositiveInt = 2048
    """Tokens that the model is meant for."""
    rope_theta: pydantic.PositiveFloat = 10_000.0
    """Base of the rotary positions."""
    series: pydantic.NonNegativeInt = 0
    """Terms of the activation on the feed-forward's gate (S82); 0 is a plain SiLU."""
    shortcut: pydantic.NonNegativeInt = 0
    """Width of the way around attention (S82); 0: none."""
    tie_word_embeddings: bool = True
    """Whether the head is the embedding."""
    seed: int | None = None
    """Seed of the draw; null takes the run's."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the weights are saved in."""

    def spec(self, rows: int) -> Any:
        """The decoder with so many rows of the embedding."""
        from puna.model.spec import LlamaSpec

        config = {
            "model_type": "llama",
            "vocab_size": rows,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads or self.num_attention_heads,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
        }
        plain = LlamaSpec.from_config(config, where="initialise")
        return plain.replace(series=self.series, shortcut=self.shortcut)


def _plan_initialise(parameters: Initialise, shapes: Any) -> Cost:
    """The weights are drawn and written; rows are those of the stage that made the tokenizer, if known."""
    known = shapes.models.get("tokenizer", shapes.spec)
    if known is None:
        return Cost()
    spec = parameters.spec(known.vocab_size)
    memory = (4 + BYTES[parameters.save_dtype]) * spec.parameter_count()
    return Cost(memory=memory, seconds=shapes.device.read_seconds(memory), spec=spec)


@stage(
    "initialise",
    parameters=Initialise,
    inputs={"tokenizer": Input("tokenizer")},
    outputs={"model": "model"},
    plan=_plan_initialise,
)
def initialise(context: Context, parameters: Initialise) -> Outcome:
    """Make a new Llama with random weights that speaks a tokenizer: what pretraining starts from.

    Time and memory grow linearly with the number of weights.
    """
    from puna.core.errors import PunaError
    from puna.core.seeds import torch_generator
    from puna.edit.initialise import initialise as draw
    from puna.text import pretrained

    where = context.inputs["tokenizer"]
    tokenizer = pretrained.read_tokenizer(pretrained.locate(where))
    if tokenizer is None:
        raise PunaError("there is no tokenizer here", where=where, expected="a folder with tokenizer.json")
    seed = context.seed if parameters.seed is None else parameters.seed
    model = draw(parameters.spec(tokenizer.vocab_size), tokenizer, torch_generator(seed, "initial weights"))
    written = pretrained.save(model.to(pretrained.DTYPES[parameters.save_dtype]), context.out / "model")
    return Outcome({"model": written}, {"parameters": float(model.spec.parameter_count())})
