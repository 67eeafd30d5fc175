"""The stages of this room: ``tokenizer`` (text -> tokenizer), ``vocabulary`` (model -> model with it),
``system_prompt``, and ``special_tokens`` and ``packing_checks`` out of ``surgery_stages``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pydantic

from puna.core.errors import PunaError
from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage
from puna.text import surgery_stages  # noqa: F401  registers its stages

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Rough rates of one core, for plans only.
_TRAINED_TOKENS_PER_SECOND = 100_000
_ALIGNED_TOKENS_PER_SECOND = 20_000

Builder = Literal[
    "identity", "unpadded", "mean_of_pieces", "weighted_pieces", "alignment", "random", "global_mean"
]


def _check_given(parameters: Parameters, read_by: Mapping[str, tuple[str, ...]], key: str) -> None:
    """Refuse a setting that the chosen value of ``key`` does not read; a default says nothing."""
    chosen = getattr(parameters, key)
    fields = type(parameters).model_fields
    for name, values in read_by.items():
        if getattr(parameters, name) != fields[name].default and chosen not in values:
            raise ValueError(f"{name} means nothing with {key} {chosen!r}, but with {', '.join(values)}")


class TokenizerParameters(Parameters):
    """Parameters of the stage ``tokenizer``."""

    method: Literal["train", "extend"] = "train"
    """train makes a new vocabulary; extend adds tokens to the model's own byte-level BPE."""
    kind: Literal["bpe", "unigram"] = "bpe"
    """train: byte-level BPE, which llama.cpp reads too, or Unigram."""
    vocab_size: int = pydantic.Field(16_000, ge=257)
    """train: tokens at most, special ones included."""
    new_tokens: int = pydantic.Field(4_000, ge=1)
    """extend: tokens added at most."""
    min_frequency: int = pydantic.Field(2, ge=1)
    """BPE: how often two tokens must stand together to be joined."""
    single_digits: bool | None = None
    """train: split numbers into digits or not; null does as the model's tokenizer."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> TokenizerParameters:
        read_by = {
            "new_tokens": ("extend",),
            **dict.fromkeys(("kind", "vocab_size", "single_digits"), ("train",)),
        }
        _check_given(self, read_by, "method")
        _check_given(self, {"min_frequency": ("bpe",)}, "kind")
        return self


class VocabularyParameters(Parameters):
    """Parameters of the stage ``vocabulary``."""

    builder: Builder = "alignment"
    """How new rows are made: see puna.text.vocabulary.builders; random and global_mean are baselines.
    unpadded keeps the vocabulary, and drops rows that no token has."""
    pad_to_multiple: int = pydantic.Field(1, ge=1)
    """Round the number of rows up to a multiple of this; padded rows never win."""
    fallback: Literal["weighted_pieces", "mean_of_pieces", "unk"] = "weighted_pieces"
    """alignment: what a token takes that no pair shows: its old pieces, or the old unknown token's row."""
    evidence: float = pydantic.Field(2.0, ge=0)
    """alignment: a row counted n times is blended with the token's pieces as n : evidence."""
    floor: float = pydantic.Field(0.2, ge=0, le=1)
    """alignment: old tokens with a smaller share of a row are dropped."""
    position: float = pydantic.Field(0.5, ge=0, le=1)
    """alignment: share of an aligned word's mass that goes by place in the word; the rest is even."""
    symmetrisation: Literal["intersection", "union", "grow-diag-final-and"] = "intersection"
    """alignment: how the two directions of the word aligner are joined."""
    iterations: int = pydantic.Field(5, ge=1)
    """alignment: iterations of the word aligner in each direction."""
    copy_shared: bool = False
    """random, global_mean: copy the rows of tokens that both vocabularies have."""
    distribution: Literal["fixed", "matched"] = "fixed"
    """random: N(0, 0.02), or N(mean, variance of each column of the old matrix), a weaker baseline."""
    seed: int | None = None
    """random: null takes the run's seed."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What the model is opened and written in; null takes the run's."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> VocabularyParameters:
        aligned = ("fallback", "evidence", "floor", "position", "symmetrisation", "iterations")
        read_by: dict[str, tuple[str, ...]] = dict.fromkeys(aligned, ("alignment",))
        read_by |= {
            "copy_shared": ("random", "global_mean"),
            "distribution": ("random",),
            "seed": ("random",),
        }
        _check_given(self, read_by, "builder")
        if self.fallback == "unk" and self.evidence > 0:
            raise ValueError("with fallback 'unk' no pieces are blended in: set evidence to 0")
        return self


def _resized(spec: Any, rows: int) -> Any:
    """The decoder with another number of rows; its special ids, which may lie beyond them, are left open."""
    return spec.replace(vocab_size=rows, bos_id=None, eos_ids=(), pad_id=None)


def plan_tokenizer(parameters: TokenizerParameters, shapes: Any) -> Cost:
    """Time by the tokens of the corpora; the decoder it names has the new number of rows.

    Without a model it names one of nothing but rows, for a stage that makes a decoder to ask.
    """
    spec = shapes.spec
    if spec is None and parameters.method == "train":
        from puna.model.spec import BlockSpec, LlamaSpec

        spec = LlamaSpec(parameters.vocab_size, 1, (BlockSpec(attention="none", feed_forward="none"),))
    if spec is not None:
        more = spec.vocab_size + parameters.new_tokens
        spec = _resized(spec, parameters.vocab_size if parameters.method == "train" else more)
    return Cost(tokens=shapes.tokens, seconds=shapes.tokens / _TRAINED_TOKENS_PER_SECOND, spec=spec)


def plan_vocabulary(parameters: VocabularyParameters, shapes: Any) -> Cost:
    """The model is held twice: beside itself under the identity map, then beside the new one.

    The number of new rows is known if the tokenizer is made by a stage that is given a model; else the
    old number is taken.
    """
    spec = shapes.spec
    if spec is None:
        return Cost(tokens=shapes.tokens)
    rows = shapes.models.get("tokenizer", spec).vocab_size
    new = _resized(spec, -(-rows // parameters.pad_to_multiple) * parameters.pad_to_multiple)
    each = _BYTES[parameters.dtype or shapes.dtype]
    memory = each * (spec.parameter_count() + max(spec.parameter_count(), new.parameter_count()))
    seconds = shapes.tokens / _ALIGNED_TOKENS_PER_SECOND + shapes.device.read_seconds(memory)
    return Cost(tokens=shapes.tokens, memory=memory, seconds=seconds, spec=new)


@stage(
    "tokenizer",
    parameters=TokenizerParameters,
    inputs={
        "model": Input("model", optional=True),
        "corpus": Input("corpus", many=True),
        "held_out": Input("corpus", many=True, optional=True),
        "beside": Input("tokenizer", many=True, optional=True),
    },
    outputs={"tokenizer": "tokenizer"},
    plan=plan_tokenizer,
)
def tokenizer(context: Context, parameters: TokenizerParameters) -> Outcome:
    """Train a tokenizer on documents or the target side of pairs, or extend a model's; measure others beside.

    Time and memory grow linearly with the number of different words.
    """
    from puna.text.vocabulary.job import make_tokenizer

    return make_tokenizer(context, parameters)


@stage(
    "vocabulary",
    parameters=VocabularyParameters,
    inputs={
        "model": Input("model"),
        "tokenizer": Input("tokenizer", optional=True),
        "pairs": Input("corpus", many=True, optional=True),
    },
    outputs={"model": "model", "mapping": "mapping"},
    plan=plan_vocabulary,
)
def vocabulary(context: Context, parameters: VocabularyParameters) -> Outcome:
    """Give a model the vocabulary of a tokenizer; the source side of pairs is what the model speaks.

    Time grows with the product of the lengths of each pair, and linearly with the model.
    """
    from puna.text.vocabulary.job import change_vocabulary

    return change_vocabulary(context, parameters)


class SystemPrompt(Parameters):
    """Parameters of the stage ``system_prompt``."""

    content: str = pydantic.Field(min_length=1)
    """The system message of conversations that have none."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What the weights are written in; null takes the run's."""


def plan_system_prompt(parameters: SystemPrompt, shapes: Any) -> Cost:
    """The weights are read, held and written once."""
    spec = shapes.spec
    if spec is None:
        return Cost()
    memory = _BYTES[parameters.dtype or shapes.dtype] * spec.parameter_count()
    return Cost(memory=float(memory), seconds=shapes.device.read_seconds(2 * memory), spec=spec)


@stage(
    "system_prompt",
    parameters=SystemPrompt,
    inputs={"model": Input("model")},
    outputs={"model": "model"},
    plan=plan_system_prompt,
)
def system_prompt(context: Context, parameters: SystemPrompt) -> Outcome:
    """Write a system message into a model's chat template, so that training, evaluation and use all have it.

    Time and memory grow linearly with the model, whose weights stay as they are.
    """
    from puna.text import pretrained
    from puna.text.template import Template, template_for, with_system

    model = pretrained.load_merged(context.inputs["model"], dtype=parameters.dtype or context.dtype)
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise PunaError("the model has no tokenizer", where=model.source, fix="put tokenizer.json beside it")
    source = with_system(template_for(tokenizer).source, parameters.content)
    model.template = Template(source, tokenizer.template_strings)
    written = pretrained.save(model, context.out / "model")
    tokens = len(tokenizer.encode(parameters.content))
    return Outcome({"model": written}, {"prompt_tokens": float(tokens)})
