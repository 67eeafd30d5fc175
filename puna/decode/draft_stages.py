"""Stages of drafting: ``respond``, ``acceptance_head``, ``judge_head``, ``strategies``, ``sampled_law``,
``shifted_residuals``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, PlanOnly, stage

Quantize = Literal["int8", "int4"]
Kernels = Literal["auto", "native", "plain"]
_WEIGHTS_PER_SECOND = 2.0e11  # read or multiplied, of a model that decodes in batches; for plans only
_USUAL_PROMPT = 40.0


class Drawing(Parameters):
    """How tokens are drawn."""

    temperature: float = pydantic.Field(1.0, ge=0)
    """0 is greedy."""
    top_k: int = pydantic.Field(0, ge=0)
    """Keep the likeliest, so many; 0 keeps all."""
    top_p: float = pydantic.Field(1.0, gt=0, le=1)
    """Keep the likeliest until they have this probability; 1 keeps all."""


class Respond(Drawing):
    """Parameters of the stage ``respond``."""

    max_tokens: int = pydantic.Field(128, ge=1)
    """Tokens of an answer at most."""
    skip: int = pydantic.Field(0, ge=0)
    """Questions that are passed over, for other stages; the order is drawn by the run's seed alone."""
    rows: int | None = pydantic.Field(None, ge=1)
    """Questions at most, each once; null answers all."""
    quantize: Quantize | None = None
    """Lay the weights out in integers: quicker, and not quite the model's own answers."""
    kernels: Kernels = "auto"
    """What runs the model."""
    answers_per_document: int | None = pydantic.Field(None, ge=1)
    """Leave documents instead of conversations: so many answers, one behind the other, without turns."""
    expected_tokens: Annotated[pydantic.PositiveInt | None, PlanOnly()] = None
    """How many tokens the conversations will hold, where that is known: what a plan goes by."""


def _weights(shapes: Any, name: str) -> float:
    """Weights of an input model; 0 where its shape is not known."""
    spec = shapes.models.get(name)
    return 0.0 if spec is None else float(spec.parameter_count())


def _plan_respond(parameters: Respond, shapes: Any) -> Cost:
    """The conversations are read, and as many answers written, in batches."""
    rows = parameters.rows or shapes.tokens / _USUAL_PROMPT
    tokens = float(parameters.expected_tokens or rows * (_USUAL_PROMPT + parameters.max_tokens))
    weights = _weights(shapes, "model")
    seconds = tokens * weights / _WEIGHTS_PER_SECOND
    kind = "messages" if parameters.answers_per_document is None else "documents"
    return Cost(tokens=tokens, memory=4.0 * weights, seconds=seconds, kind=kind)


@stage(
    "respond",
    parameters=Respond,
    inputs={"model": Input("model"), "corpus": Input("corpus")},
    outputs={"corpus": "corpus"},
    plan=_plan_respond,
)
def respond(context: Context, parameters: Respond) -> Outcome:
    """Let a model answer conversations anew: its own texts, to learn from or to look at.

    A conversation's last turn, if it is the assistant's, gives way to the model's answer. With
    ``answers_per_document`` the answers alone are left, strung together: text of a model that has
    learnt no turns. Time grows with the tokens of all answers.
    """
    from puna.decode.respond import respond as answer

    return answer(context, parameters)


class AcceptanceHead(Drawing):
    """Parameters of the stage ``acceptance_head``. Temperature and filters are those of decoding later."""

    blocks: int = pydantic.Field(3, ge=0)
    """Residual blocks before the last layer."""
    shared: bool = False
    """All of them one and the same block, as in the released code."""
    rejection_weight: float = pydantic.Field(6.0, gt=0)
    """Weight of a rejection in the loss; an acceptance has 1."""
    mix: float = pydantic.Field(0.15, ge=0, lt=1)
    """Probability that a place holds the target's own token, at which nothing is learnt."""
    draft_vocabulary: int | None = pydantic.Field(None, ge=1)
    """Of the draft's head only the tokens with ids below this, as the strategy has it; null is all of it."""
    epochs: int = pydantic.Field(3, ge=1)
    """Passes over the texts."""
    batch_texts: int = pydantic.Field(32, ge=1)
    """Texts of an optimiser step."""
    learning_rate: float = pydantic.Field(5e-5, gt=0)
    """Peak learning rate, after a warm-up, falling as half a cosine."""
    warmup_ratio: float = pydantic.Field(0.03, ge=0, lt=1)
    """Share of the steps in which it rises."""
    held_out_share: float = pydantic.Field(0.2, gt=0, lt=1)
    """Share of the texts that the head is judged on."""
    batch_tokens: int = pydantic.Field(2048, ge=1)
    """Tokens of a forward pass of either model."""


def _plan_acceptance(parameters: AcceptanceHead, shapes: Any) -> Cost:
    """One pass of the target and two of the draft; the head is next to nothing."""
    target, draft = _weights(shapes, "target"), _weights(shapes, "draft")
    tokens = shapes.tokens_of("corpus")
    return Cost(tokens=tokens, flops=2 * tokens * (target + 2 * draft), memory=4 * (target + draft))


@stage(
    "acceptance_head",
    parameters=AcceptanceHead,
    inputs={"target": Input("model"), "draft": Input("model"), "corpus": Input("corpus", many=True)},
    outputs={"head": "file"},
    plan=_plan_acceptance,
)
def acceptance_head(context: Context, parameters: AcceptanceHead) -> Outcome:
    """Train a head that tells from the draft's hidden state whether the target will accept a token (S83).

    The corpora hold conversations that the target wrote. Time is three forward passes over them;
    memory holds a hidden state for each token drawn.
    """
    from puna.decode.head_jobs import make_acceptance_head

    return make_acceptance_head(context, parameters)


class JudgeHead(Parameters):
    """Parameters of the stage ``judge_head``."""

    texts: int = pydantic.Field(500, ge=8)
    """Texts of each corpus at most, drawn by the seed; each gets one mistake."""
    tokens: int = pydantic.Field(96, ge=8)
    """Tokens of a text at most."""
    balance: bool = True
    """Right and wrong tokens weigh alike, however many there are."""
    epochs: int = pydantic.Field(20, ge=1)
    """Passes over the texts."""
    batch_texts: int = pydantic.Field(16, ge=1)
    """Texts of an optimiser step."""
    learning_rate: float = pydantic.Field(1e-3, gt=0)
    """Peak learning rate, after a warm-up, falling as half a cosine."""
    warmup_ratio: float = pydantic.Field(0.03, ge=0, lt=1)
    """Share of the steps in which it rises."""
    held_out_share: float = pydantic.Field(0.25, gt=0, lt=1)
    """Share of the texts that the judge is judged on."""
    batch_tokens: int = pydantic.Field(2048, ge=1)
    """Tokens of a forward pass."""


def _plan_judge(parameters: JudgeHead, shapes: Any) -> Cost:
    """A pass over both versions of every text, say of two corpora; the head is next to nothing."""
    tokens = 4.0 * parameters.texts * parameters.tokens
    weights = _weights(shapes, "model")
    return Cost(tokens=tokens, flops=2 * tokens * weights, memory=4 * weights)


@stage(
    "judge_head",
    parameters=JudgeHead,
    inputs={"model": Input("model"), "corpus": Input("corpus", many=True)},
    outputs={"head": "file"},
    plan=_plan_judge,
)
def judge_head(context: Context, parameters: JudgeHead) -> Outcome:
    """Train a linear judge of single tokens on a model's hidden states, by mistakes made in real text (S44).

    Of documents the text is learnt, of conversations the last answer. Time is two forward passes over
    the texts; memory holds two hidden states for each token.
    """
    from puna.decode.head_jobs import make_judge_head

    return make_judge_head(context, parameters)


class Strategies(Drawing):
    """Parameters of the stage ``strategies``."""

    strategies: dict[str, dict[str, Any]] = pydantic.Field(min_length=1)
    """What is compared: a label for each strategy's name and settings. ``head`` names one of the inputs."""
    baseline: str | None = None
    """The label whose texts the others are compared with; null compares with none."""
    skip: int = pydantic.Field(0, ge=0)
    """Questions that are passed over, for other stages; the order is drawn by the run's seed alone."""
    rows: int | None = pydantic.Field(None, ge=1)
    """Questions at most, each once; null takes all."""
    max_tokens: int = pydantic.Field(64, ge=1)
    """Tokens of an answer at most."""
    ignore_eos: bool = False
    """Write on to ``max_tokens`` whatever is said."""
    answers: str | None = None
    """A regular expression: what it finds in the corpus's own answer is what a right answer holds; null
    checks no answers."""
    rivals: dict[str, tuple[str, ...]] = pydantic.Field(default_factory=dict)
    """A label, and others that stand for one rule at several settings: how many answers would be right by
    that rule with drafts that stand equally long is read off between them (``rivals_correct``)."""
    quantize: Quantize | None = None
    """Lay the weights of all models out in integers."""
    kernels: Kernels = "auto"
    """What runs the models."""

    @pydantic.model_validator(mode="after")
    def _named(self) -> Strategies:
        named = [self.baseline] if self.baseline is not None else []
        named += [label for pair in self.rivals.items() for label in (pair[0], *pair[1])]
        for label in named:
            if label not in self.strategies:
                raise ValueError(f"{label!r} is none of {', '.join(self.strategies)}")
        if self.rivals and self.answers is None:
            raise ValueError("rivals are compared by right answers: say with answers what is right")
        return self


def _plan_strategies(parameters: Strategies, shapes: Any) -> Cost:
    """Every strategy reads the prompts and writes an answer to each, in batches."""
    weights = sum(spec.parameter_count() for spec in shapes.models.values())
    rows = parameters.rows or shapes.tokens_of("corpus") / (_USUAL_PROMPT + parameters.max_tokens)
    tokens = len(parameters.strategies) * rows * (_USUAL_PROMPT + parameters.max_tokens)
    return Cost(tokens=tokens, memory=4.0 * weights, seconds=tokens * weights / _WEIGHTS_PER_SECOND)


@stage(
    "strategies",
    parameters=Strategies,
    inputs={
        "target": Input("model"),
        "models": Input("model", many=True, optional=True),
        "heads": Input("file", many=True, optional=True),
        "corpus": Input("corpus"),
    },
    outputs={"texts": "file"},
    plan=_plan_strategies,
)
def strategies(context: Context, parameters: Strategies) -> Outcome:
    """Compare decoding strategies on the same prompts: texts, right answers, passes of each model.

    Passes are counted and weighed by the models' sizes. Time grows with strategies, prompts and tokens.
    """
    from puna.decode.compare import compare

    return compare(context, parameters)


class SampledLaw(Drawing):
    """Parameters of the stage ``sampled_law``."""

    strategies: dict[str, dict[str, Any]] = pydantic.Field(min_length=1)
    """What is tested: a label for each strategy's name and settings. ``head`` names one of the inputs."""
    draws: int = pydantic.Field(5000, ge=100)
    """Texts that are drawn for each."""
    prompt: str = "The weather today is"
    """What all of them continue."""
    top_k: int = pydantic.Field(8, ge=1)
    """Keep the likeliest, so many: few enough that every pair of tokens can be counted."""
    quantize: Quantize | None = None
    """Lay the weights of all models out in integers."""
    kernels: Kernels = "auto"
    """What runs the models."""


def _plan_law(parameters: SampledLaw, shapes: Any) -> Cost:
    """Some five tokens are read for each draw."""
    weights = sum(spec.parameter_count() for spec in shapes.models.values())
    tokens = 5.0 * len(parameters.strategies) * parameters.draws
    return Cost(tokens=tokens, memory=4.0 * weights, seconds=tokens * weights / _WEIGHTS_PER_SECOND)


@stage(
    "sampled_law",
    parameters=SampledLaw,
    inputs={
        "target": Input("model"),
        "models": Input("model", many=True, optional=True),
        "heads": Input("file", many=True, optional=True),
    },
    plan=_plan_law,
)
def sampled_law(context: Context, parameters: SampledLaw) -> Outcome:
    """Test whether the first two tokens of many texts follow the target's own law, by chi-square.

    ``deviation`` is how far a first token's count is off at most, in standard deviations. Time grows with
    the number of draws.
    """
    from puna.decode.compare import measure_law

    return measure_law(context, parameters)


class ShiftedResiduals(Parameters):
    """Parameters of the stage ``shifted_residuals``."""

    eta: float = pydantic.Field(10.0, ge=0)
    """How far the target's law is moved towards the drafter's."""
    laws: int = pydantic.Field(100, ge=1)
    """Random pairs of laws."""
    vocabulary: int = pydantic.Field(40, ge=2)
    """Tokens of each."""


@stage("shifted_residuals", parameters=ShiftedResiduals, plan=lambda parameters, shapes: Cost(seconds=1.0))
def shifted_residuals(context: Context, parameters: ShiftedResiduals) -> Outcome:
    """Compare what RAPID's two residuals emit with the moved law and with the target's, exactly (S28).

    ``exact`` and ``released``: largest error against the moved law, mean total variation to it and to
    the target's. Time grows with laws and the square of the vocabulary.
    """
    from puna.decode.residuals import distances

    metrics: dict[str, float] = {}
    modes: tuple[Literal["exact", "released"], ...] = ("exact", "released")
    for mode in modes:
        found = distances(
            parameters.eta, mode, laws=parameters.laws, vocabulary=parameters.vocabulary, seed=context.seed
        )
        metrics |= {
            f"{mode}.largest": found.largest,
            f"{mode}.to_shifted": found.to_shifted,
            f"{mode}.to_target": found.to_target,
        }
    return Outcome(metrics=metrics)
