"""How much of the way from the small to the large model entropy switching goes, beside random switching.

What is written is judged by the large model: nats a token of its surprise at the text. Where a token was
drawn from a law, the mean over that law stands in for the one draw: the same with less noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from puna.core.seeds import derive
from puna.core.stage import Context, Outcome
from puna.data.corpus import Corpus
from puna.decode.engine import Completion, Engine
from puna.decode.entropy_switching import spent
from puna.decode.respond import asked, open_messages
from puna.decode.routing_stages import require_rows
from puna.decode.sampling import Sampling, make_law
from puna.model.stepper import Read
from puna.model.steppers import make_stepper
from puna.text import pretrained

if TYPE_CHECKING:
    from torch import Tensor

    from puna.decode.engine import Prompt
    from puna.decode.routing_stages import EntropySwitchingStage
    from puna.model.llama import Llama
    from puna.model.stepper import Stepper

ALONE: dict[str, dict[str, Any]] = {
    "small": {"threshold": 1e9, "start": "small"},
    "large": {"threshold": -1.0, "start": "large"},
}
"""Settings at which one model writes all."""


@dataclass(frozen=True)
class Point:
    """One setting: share of large tokens, surprise, switches a token, cost with catching up and without."""

    share: float
    surprise: float
    switches: float
    counted: float
    alone: float
    catch_up_difference: float


class Bench:
    """Two models, prompts and sampling; each setting writes all prompts and is judged."""

    def __init__(
        self,
        large: Llama,
        small: Llama,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        common: Mapping[str, Any],
    ) -> None:
        self.models = {"large": large, "small": small}
        self.engine = Engine(large, models={"small": small})
        self.prompts, self.sampling, self.common = list(prompts), sampling, dict(common)
        self.weight = small.spec.parameter_count() / large.spec.parameter_count()
        self._ids = [self.engine.encode(prompt) for prompt in self.prompts]
        room = max(map(len, self._ids)) + sampling.max_tokens
        self._steppers: dict[str, Stepper] = {
            name: make_stepper(model, cache_tokens=room) for name, model in self.models.items()
        }

    def write(self, settings: Mapping[str, Any]) -> list[Completion]:
        """Every prompt's text with these settings."""
        chosen = {"name": "entropy-switching", **self.common, **settings}
        return self.engine.generate(self.prompts, self.sampling, chosen)

    def measure(self, settings: Mapping[str, Any]) -> Point:
        """Write with these settings, and judge what was written."""
        found = self.write(settings)
        rows = [row for completion in found for row in completion.trace]
        costs = [spent(completion.trace, self.weight) for completion in found]
        lengths = [len(completion.ids) for completion in found]
        surprise = difference = 0.0
        for ids, completion in zip(self._ids, found, strict=True):
            nats, apart = self._judge(ids, completion)
            surprise, difference = surprise + nats, max(difference, apart)

        def mean(values: Sequence[float]) -> float:
            return sum(v * n for v, n in zip(values, lengths, strict=True)) / sum(lengths)

        return Point(
            share=sum(row.source == "large" for row in rows) / len(rows),
            surprise=surprise / len(rows),
            switches=sum(switches(completion) for completion in found) / len(rows),
            counted=mean([counted for counted, _ in costs]),
            alone=mean([alone for _, alone in costs]),
            catch_up_difference=difference,
        )

    def _judge(self, prompt: Sequence[int], completion: Completion) -> tuple[float, float]:
        """The large model's surprise at a text, in nats, and how far the text's log probabilities are from
        those of a fresh forward pass of whoever wrote each token."""
        logits = {
            name: fresh_logits(stepper, prompt, completion.ids) for name, stepper in self._steppers.items()
        }
        surprise = -logits["large"].double().log_softmax(-1).clamp(min=-1e4)
        total = apart = 0.0
        assert completion.logprobs is not None
        for place, row in enumerate(completion.trace):
            law = make_law(logits[row.source][place], self.sampling)
            total += float((law.probabilities * surprise[place]).sum())
            # As the engine has it: float32's log_softmax is 1e-5 off, and equally so for equal logits.
            fresh = logits[row.source][place].float().log_softmax(0)[row.token]
            apart = max(apart, abs(float(fresh) - completion.logprobs[place]))
        return total, apart


def fresh_logits(stepper: Stepper, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """Raw logits [ids, vocab] behind ``prompt`` and each of ``ids`` but the last, in one fresh pass."""
    sequence = stepper.sequence()
    (hidden,) = stepper.step([Read(sequence, [*prompt, *ids[:-1]], len(ids))])
    logits = stepper.logits(hidden)
    sequence.free()
    return logits


def switches(completion: Completion) -> int:
    """How often another model took over."""
    sources = [row.source for row in completion.trace]
    return sum(before != after for before, after in itertools.pairwise(sources))


def closed(point: Point, small: Point, large: Point) -> float:
    """Share of the gap between the two models' surprise that is closed."""
    return (small.surprise - point.surprise) / (small.surprise - large.surprise)


def at_share(points: Sequence[tuple[float, float]], share: float) -> float:
    """The value at ``share`` of a curve through (share, value) and its ends (0, 0) and (1, 1)."""
    line = sorted([(0.0, 0.0), *points, (1.0, 1.0)])
    for (left, low), (right, high) in itertools.pairwise(line):
        if left <= share <= right:
            return low if right == left else low + (high - low) * (share - left) / (right - left)
    raise ValueError(f"share {share} is not between 0 and 1")


def run(context: Context, parameters: EntropySwitchingStage) -> Outcome:
    """The stage ``entropy_switching``."""
    large, small = (
        pretrained.load(context.inputs[name], dtype=context.dtype, device=context.device)
        for name in ("large", "small")
    )
    rows = open_messages(Corpus.open(context.inputs["corpus"]), parameters.rows)
    require_rows(len(rows), parameters.rows, context.inputs["corpus"])
    prompts = [asked(row) for row in rows]
    sampling = Sampling(
        max_tokens=parameters.max_tokens,
        temperature=parameters.temperature,
        seed=derive(context.seed, context.name),
        logprobs=True,
    )
    common = {
        "window": parameters.window,
        "minimum_stay": parameters.minimum_stay,
        "threshold_large": parameters.threshold_large,
    }
    bench = Bench(large, small, prompts, sampling, common)
    points = {name: bench.measure({**settings, "threshold_large": None}) for name, settings in ALONE.items()}
    for threshold in parameters.thresholds:
        points[f"entropy_{threshold:g}"] = bench.measure({"threshold": threshold})
    for share in parameters.shares:
        points[f"random_{share:g}"] = bench.measure({"rule": "random", "share": share})
    metrics = _metrics(points, parameters)
    metrics |= _ends(bench)
    metrics["weight"] = bench.weight
    context.report["tables"] = [_table(points)]
    return Outcome(metrics=metrics)


def _metrics(points: Mapping[str, Point], parameters: EntropySwitchingStage) -> dict[str, float]:
    """Figures by point, and the two rules at one share."""
    small, large = points["small"], points["large"]
    metrics: dict[str, float] = {}
    curves: dict[str, list[tuple[float, float]]] = {"entropy": [], "random": []}
    for name, point in points.items():
        gap = closed(point, small, large)
        rule = name.split("_")[0]
        if rule in curves:
            curves[rule].append((point.share, gap))
        metrics |= {
            f"share.{name}": point.share,
            f"surprise.{name}": point.surprise,
            f"closed.{name}": gap,
            f"switches.{name}": point.switches,
            f"cost.{name}": point.counted,
            f"cost_without_catching_up.{name}": point.alone,
        }
    for rule, curve in curves.items():
        metrics[f"closed_at_share.{rule}"] = at_share(curve, parameters.at_share)
    line = [large, *(points[f"entropy_{threshold:g}"] for threshold in parameters.thresholds), small]
    metrics["largest_fall_of_share"] = max(
        later.share - earlier.share for earlier, later in itertools.pairwise(line)
    )
    metrics["largest_fall_of_surprise"] = max(
        earlier.surprise - later.surprise for earlier, later in itertools.pairwise(line)
    )
    nearest = min(line[1:-1], key=lambda point: abs(point.share - parameters.at_share))
    metrics["cost_at_share"] = nearest.counted
    metrics["cost_at_share_without_catching_up"] = nearest.alone
    metrics["catch_up_difference"] = max(point.catch_up_difference for point in points.values())
    return metrics


def _ends(bench: Bench) -> dict[str, float]:
    """Whether the two extreme thresholds give each model's own greedy texts."""
    greedy = replace(bench.sampling, temperature=0.0, logprobs=False)
    metrics = {}
    for name, model in bench.models.items():
        own = Engine(model).generate(bench.prompts, greedy)
        chosen = {"name": "entropy-switching", **ALONE[name]}
        found = bench.engine.generate(bench.prompts, greedy, chosen)
        same = sum(one.ids == other.ids for one, other in zip(found, own, strict=True))
        metrics[f"same.{name}"] = same / len(own)
    return metrics


def _table(points: Mapping[str, Point]) -> dict[str, Any]:
    small, large = points["small"], points["large"]
    rows = [
        [
            name,
            f"{point.share:.2f}",
            f"{point.surprise:.3f}",
            f"{closed(point, small, large):.2f}",
            f"{point.switches:.3f}",
            f"{point.counted:.2f}",
            f"{point.alone:.2f}",
        ]
        for name, point in points.items()
    ]
    return {
        "title": "Switching between two models",
        "columns": [
            "",
            "share of large tokens",
            "surprise (nats)",
            "gap closed",
            "switches a token",
            "cost",
            "without catching up",
        ],
        "rows": rows,
        "note": "cost: passes of the large model a token; surprise: the large model's at what was written",
    }
