"""The stages ``initialise`` (a tokenizer -> a new model), ``shape_checks`` and ``export_checks``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, PlanOnly, stage
from puna.train.plan import BYTES


class Sizes(Parameters):
    """A plain Llama's sizes, named as in transformers' config."""

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
    rms_norm_eps: pydantic.PositiveFloat = 1e-6
    """What the norms add to a mean square."""
    tie_word_embeddings: bool = True
    """Whether the head is the embedding."""

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
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
        }
        return LlamaSpec.from_config(config, where="sizes")


class Initialise(Sizes):
    """Parameters of the stage ``initialise``: a Llama's sizes, named as in transformers' config."""

    series: pydantic.NonNegativeInt = 0
    """Terms of the activation on the feed-forward's gate (S82); 0 is a plain SiLU."""
    shortcut: pydantic.NonNegativeInt = 0
    """Width of the way around attention (S82); 0: none."""
    pad_vocabulary_to_multiple: pydantic.PositiveInt = 1
    """The embedding's rows are a multiple of this; rows that no token has are learnt away."""
    expected_vocabulary: Annotated[pydantic.PositiveInt | None, PlanOnly()] = None
    """How many tokens the tokenizer will have, where no stage before knows: what a plan goes by."""
    seed: int | None = None
    """Seed of the draw; null takes the run's."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the weights are saved in."""

    def spec(self, rows: int) -> Any:
        """The decoder with so many rows of the embedding."""
        return super().spec(rows).replace(series=self.series, shortcut=self.shortcut)

    def rows(self, tokens: int) -> int:
        """Rows of the embedding for so many tokens."""
        return -(-tokens // self.pad_vocabulary_to_multiple) * self.pad_vocabulary_to_multiple


def _plan_initialise(parameters: Initialise, shapes: Any) -> Cost:
    """The weights are drawn and written; rows are those that are expected, or of the tokenizer's maker."""
    known = shapes.models.get("tokenizer", shapes.spec)
    tokens = parameters.expected_vocabulary or (None if known is None else known.vocab_size)
    if tokens is None:
        return Cost()
    spec = parameters.spec(parameters.rows(tokens))
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
    from puna.core.seeds import torch_generator
    from puna.edit.initialise import initialise as draw
    from puna.text import pretrained

    tokenizer = pretrained.required_tokenizer(context.inputs["tokenizer"])
    seed = context.seed if parameters.seed is None else parameters.seed
    spec = parameters.spec(parameters.rows(tokenizer.vocab_size))
    model = draw(spec, tokenizer, torch_generator(seed, "initial weights"))
    written = pretrained.save(model.to(pretrained.DTYPES[parameters.save_dtype]), context.out / "model")
    return Outcome({"model": written}, {"parameters": float(model.spec.parameter_count())})


class ShapeChecks(Parameters):
    """Parameters of the stage ``shape_checks``."""

    sizes: Sizes
    """Sizes whose weights are counted."""
    vocab_size: int = pydantic.Field(ge=1)
    """Rows of that decoder's embedding."""
    length: int = pydantic.Field(64, ge=2)
    """Random tokens on which the model and its twin are compared."""


def _plan_shape_checks(parameters: ShapeChecks, shapes: Any) -> Cost:
    """The model and its twin in float32, a few short passes."""
    return Cost(memory=0.0 if shapes.spec is None else 12.0 * shapes.spec.parameter_count())


@stage(
    "shape_checks",
    parameters=ShapeChecks,
    inputs={"model": Input("model", optional=True)},
    plan=_plan_shape_checks,
)
def shape_checks(context: Context, parameters: ShapeChecks) -> Outcome:
    """Count a shape's weights and cache, and compare a model with a twin of multi-head attention (S42).

    The shape takes no memory; time and memory grow linearly with the model's weights.
    """
    from puna.edit.shape_checks import of_model, of_shape
    from puna.text import pretrained

    figures = of_shape(parameters.sizes, parameters.vocab_size)
    source = context.inputs.get("model")
    if source is not None:
        figures |= of_model(pretrained.load_plain(source), parameters.length)
    return Outcome(metrics=figures)


class ExportChecks(Parameters):
    """Parameters of the stage ``export_checks``."""

    length: int = pydantic.Field(64, ge=2)
    """Random tokens of each of two rows that are read."""


def _plan_export_checks(parameters: ExportChecks, shapes: Any) -> Cost:
    """Each model here and in transformers, in float32."""
    return Cost(memory=sum(8.0 * spec.parameter_count() for spec in shapes.models.values()))


@stage(
    "export_checks",
    parameters=ExportChecks,
    inputs={"model": Input("model"), "cut": Input("model", optional=True)},
    plan=_plan_export_checks,
)
def export_checks(context: Context, parameters: ExportChecks) -> Outcome:
    """Compare a checkpoint's logits and roles with what transformers and its tokenizer say (S38, S65).

    Time and memory grow linearly with the weights.
    """
    from puna.edit.export_checks import check
    from puna.text import pretrained

    cut = context.inputs.get("cut")
    folder = pretrained.locate(context.inputs["model"])
    return Outcome(metrics=check(folder, None if cut is None else pretrained.locate(cut), parameters.length))
