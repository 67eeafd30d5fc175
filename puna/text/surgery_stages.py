"""The stages ``special_tokens`` (tokenizer -> tokenizer) and ``packing_checks``."""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage

# Rough rates of one core, for plans only.
_ENCODED_TOKENS_PER_SECOND = 300_000
_PACKED_TOKENS_PER_SECOND = 500_000


class SpecialTokens(Parameters):
    """Parameters of the stage ``special_tokens``."""

    end: str = pydantic.Field("<|im_end|>", min_length=1)
    """The end of a text and of a turn: it takes the id of the EOS, whose old spelling gets a new one."""
    pad: str = pydantic.Field("<|pad|>", min_length=1)
    """What fills unused places, a token of its own."""
    tokens: tuple[str, ...] = ("<|im_start|>",)
    """Further special tokens, such as those of chat templates."""
    reserved: int = pydantic.Field(0, ge=0)
    """Tokens without a use yet, at least; they fill the size up to the multiple."""
    pad_to_multiple: int = pydantic.Field(64, ge=1)
    """The vocabulary's size is a multiple of this."""


def _plan_special_tokens(parameters: SpecialTokens, shapes: Any) -> Cost:
    """The texts are encoded four times; the decoder it names has more rows."""
    spec = shapes.models.get("tokenizer")
    if spec is not None:
        size = spec.vocab_size + 2 + len(parameters.tokens) + parameters.reserved
        size = -(-size // parameters.pad_to_multiple) * parameters.pad_to_multiple
        spec = spec.replace(vocab_size=size, bos_id=None, eos_ids=(), pad_id=None)
    seconds = 1.0 + 4 * shapes.tokens / _ENCODED_TOKENS_PER_SECOND
    return Cost(tokens=shapes.tokens, seconds=seconds, spec=spec)


@stage(
    "special_tokens",
    parameters=SpecialTokens,
    inputs={"tokenizer": Input("tokenizer"), "corpus": Input("corpus", many=True, optional=True)},
    outputs={"tokenizer": "tokenizer"},
    plan=_plan_special_tokens,
)
def special_tokens(context: Context, parameters: SpecialTokens) -> Outcome:
    """Give a tokenizer another end, a pad token, markers and reserved tokens; compare both on texts (S65).

    Time grows linearly with the texts of the corpora, which are held in memory.
    """
    from puna.text import pretrained
    from puna.text.tokenizer import Tokenizer
    from puna.text.vocabulary.job import texts_of
    from puna.text.vocabulary.surgery import compare, operate

    base = pretrained.required_tokenizer(context.inputs["tokenizer"])
    made = operate(
        base,
        end=parameters.end,
        pad=parameters.pad,
        tokens=parameters.tokens,
        reserved=parameters.reserved,
        multiple=parameters.pad_to_multiple,
    )
    made.save(context.out / "tokenizer")
    written = Tokenizer.from_folder(context.out / "tokenizer")
    texts = [text for folder in (context.inputs.get("corpus") or {}).values() for text in texts_of(folder)]
    figures = compare(base, written, texts)
    size = written.vocab_size
    figures |= {"vocab_size": float(size), "remainder": float(size % parameters.pad_to_multiple)}
    known = base.vocabulary()
    rows = [[token, str(known.get(token, "")), str(made.id_of(token))] for token in made.special_tokens]
    context.report["tables"] = [
        {"title": "Special tokens", "columns": ["token", "old id", "new id"], "rows": rows}
    ]
    return Outcome({"tokenizer": context.out / "tokenizer"}, figures)


class PackingChecks(Parameters):
    """Parameters of the stage ``packing_checks``."""

    context: int = pydantic.Field(256, ge=1)
    """The model's context in tokens; rows hold one more, so that each place in it has a target."""
    packing: Literal["wrap", "fit", "off"] = "wrap"
    """How rows are filled, as in training."""


def _plan_packing_checks(parameters: PackingChecks, shapes: Any) -> Cost:
    """All text is encoded, packed and looked at once."""
    return Cost(tokens=shapes.tokens, seconds=shapes.tokens / _PACKED_TOKENS_PER_SECOND)


@stage(
    "packing_checks",
    parameters=PackingChecks,
    inputs={"tokenizer": Input("tokenizer"), "corpus": Input("corpus")},
    plan=_plan_packing_checks,
)
def packing_checks(context: Context, parameters: PackingChecks) -> Outcome:
    """Pack documents as training does, and count targets out of place and tokens lost or doubled (S65).

    Time and memory grow linearly with the corpus.
    """
    from puna.text import pretrained
    from puna.text.encode import encode_documents
    from puna.text.packing_checks import check
    from puna.text.vocabulary.job import texts_of

    tokenizer = pretrained.required_tokenizer(context.inputs["tokenizer"])
    texts = enumerate(texts_of(context.inputs["corpus"]))
    encoded = encode_documents(tokenizer, ((str(number), text) for number, text in texts))
    return Outcome(metrics=check(encoded, parameters.context + 1, parameters.packing))
