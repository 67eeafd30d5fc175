"""What was learnt and what was forgotten over the versions of one model: measured in one pass over them.

Adds to an evaluation what it takes to tell forgetting: conversations (the loss of their answers, and the
choice among given ones), flips between pairs of versions, and how far the weights have moved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError, unknown_name
from puna.data.corpus import Corpus
from puna.evaluate import responses
from puna.evaluate.compare import drawn, evaluate_models
from puna.evaluate.distances import Distances, distances
from puna.evaluate.equal_gain import EqualGain, equal_gain
from puna.evaluate.flips import Flips, Moves, flips, moves
from puna.evaluate.responses import ResponseLoss, Task
from puna.evaluate.result import Result
from puna.evaluate.statistics import Interval, ratio, relative_change
from puna.text.stored_weights import Weights

if TYPE_CHECKING:
    from puna.evaluate.stages import EqualGains, Forgetting
    from puna.model.llama import Llama


@dataclass
class Versions:
    """Everything measured of the versions of a model; ``result`` is what the stage ``evaluate`` tells.

    Metric names beside those of :class:`~puna.evaluate.result.Result`, for corpus C and model M, with
    ``.vs.O`` behind them where it is compared with another model than the baseline:

    * ``response_loss.C.M`` in nats a token, ``response_change.C.M`` relative, below zero is better
    * ``risen.C.M`` and ``fallen.C.M``: shares of the documents or conversations whose score is better and
      worse; ``gain.C.M`` and ``regression.C.M``: by how much on the mean of these
    * ``accuracy.C.M``, ``accuracy_change.C.M``, ``nfr.C.M``, ``pfr.C.M``, ``nfr_mc.C.M``, ``flips_p.C.M``
    * ``rise.M``, ``curve_rise.M``, ``rise_share.M`` at equal gain, see :mod:`puna.evaluate.equal_gain`
    * ``distance.M`` and ``distance.M.GROUP``, from the baseline, relative
    """

    result: Result
    conversations: Mapping[str, list[dict[str, Any]]]
    tasks: Mapping[str, Task]
    losses: dict[tuple[str, str], ResponseLoss] = field(default_factory=dict)
    said: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    equal: EqualGains | None = None
    distances: dict[str, Distances] = field(default_factory=dict)

    @property
    def _draws(self) -> dict[str, int]:
        return {"draws": self.result.draws, "seed": self.result.seed}

    @functools.cached_property
    def response_losses(self) -> dict[tuple[str, str], Interval]:
        """Nats a token by (corpus, model)."""
        return {key: ratio(loss.nats, loss.tokens, **self._draws) for key, loss in self.losses.items()}

    @functools.cached_property
    def response_changes(self) -> dict[tuple[str, str, str], Interval]:
        """Relative change of all answers' nats, by (corpus, model, other)."""
        return {
            (corpus, model, other): relative_change(
                self.losses[corpus, model].nats, self.losses[corpus, other].nats, **self._draws
            )
            for corpus in self.conversations
            for model, other in self.result.compared
        }

    @functools.cached_property
    def flips(self) -> dict[tuple[str, str, str], Flips]:
        """Flips of each task's answers, by (corpus, model, other)."""
        return {
            (corpus, model, other): flips(
                self.said[corpus, other], self.said[corpus, model], task.gold, **self._draws
            )
            for corpus, task in self.tasks.items()
            for model, other in self.result.compared
        }

    @functools.cached_property
    def accuracies(self) -> dict[tuple[str, str], Interval]:
        """Share of right answers by (corpus, model)."""
        return {
            (corpus, model): flips(said, said, self.tasks[corpus].gold, **self._draws).after
            for (corpus, model), said in self.said.items()
        }

    @functools.cached_property
    def moves(self) -> dict[tuple[str, str, str], Moves]:
        """Documents (by bits per byte) and conversations (by nats a token) that rose and fell."""
        scores = {key: -bits.bits / bits.bytes for key, bits in self.result.bits.items()}
        scores |= {key: -loss.nats / loss.tokens for key, loss in self.losses.items()}
        return {
            (corpus, model, other): moves(scores[corpus, other], scores[corpus, model], **self._draws)
            for corpus in [*self.result.documents, *self.conversations]
            for model, other in self.result.compared
        }

    @functools.cached_property
    def equal_gains(self) -> dict[str, EqualGain]:
        """Versions beside the course of an ordinary training, by model."""
        if self.equal is None:
            return {}
        corpora, bits = (self.equal.learnt, self.equal.kept), self.result.bits

        def point(model: str) -> tuple[float, float]:
            return bits[corpora[0], model].bits_per_byte, bits[corpora[1], model].bits_per_byte

        baseline, curve = point(self.result.baseline), [point(model) for model in self.equal.curve]
        return {model: equal_gain(baseline, curve, point(model)) for model in self.equal.versions}

    def metrics(self) -> dict[str, float]:
        """All figures by flat dotted names, as listed above."""
        found, name_of = self.result.metrics(), self.result.name_of
        for (corpus, model), loss in self.response_losses.items():
            found |= loss.metrics(f"response_loss.{corpus}.{model}")
        for key, change in self.response_changes.items():
            found |= change.metrics(f"response_change.{name_of(*key)}")
        for (corpus, model), accuracy in self.accuracies.items():
            found |= accuracy.metrics(f"accuracy.{corpus}.{model}")
        for key, flipped in self.flips.items():
            found |= flipped.metrics(name_of(*key))
        for key, moved in self.moves.items():
            found |= moved.metrics(name_of(*key))
        for model, equal in self.equal_gains.items():
            found |= {f"rise.{model}": equal.rise, f"curve_rise.{model}": equal.curve_rise}
            found[f"rise_share.{model}"] = equal.share
        for model, distance in self.distances.items():
            found |= distance.metrics(model)
        return found

    def scores(self) -> dict[str, Any]:
        """Every document's, conversation's and answer's score by corpus and model, JSON-like."""
        found = self.result.scores()
        for corpus, rows in self.conversations.items():
            models = self.result.models
            found[corpus] = {
                "ids": [str(row["id"]) for row in rows],
                "models": {
                    model: {
                        "nats": [round(nats, 4) for nats in self.losses[corpus, model].nats.tolist()],
                        "tokens": [int(count) for count in self.losses[corpus, model].tokens],
                    }
                    for model in models
                },
            }
            if corpus in self.tasks:
                task = self.tasks[corpus]
                found[corpus] |= {"choices": list(task.choices), "gold": list(task.gold)}
                for model in models:
                    found[corpus]["models"][model]["said"] = self.said[corpus, model]
        return found


def measure(
    models: Mapping[str, str],
    corpora: Mapping[str, str],
    settings: Forgetting,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    device: str = "cpu",
    also: Callable[[str, Llama], None] | None = None,
) -> Versions:
    """Measure the versions of a model, named in the order of time, on every corpus.

    Each version is compared with the baseline and with the one before it. Models are opened one after
    another; their weights are read once more, in parts, for the distances. ``also`` is called with each
    of them.
    """
    names = list(models)
    for name in settings.tokens:
        if name not in models:
            raise unknown_name("model", name, models, where="forgetting, tokens")
    if settings.tokens and (missing := [name for name in names if name not in settings.tokens]):
        raise PunaError("a model has no place in time", where="forgetting, tokens", found=missing[0])
    _check_equal_gain(models, corpora, settings)
    following = tuple(zip(names[1:], names, strict=False))
    settings = settings.model_copy(
        update={"compare": (*(pair for pair in following if settings.baseline != pair[0]), *settings.compare)}
    )
    conversations, tasks = _conversations(corpora, settings, seed)
    losses: dict[tuple[str, str], ResponseLoss] = {}
    said: dict[tuple[str, str], list[int]] = {}

    def further(name: str, model: Llama) -> None:
        for corpus, rows in conversations.items():
            losses[corpus, name] = responses.measure(
                model,
                rows,
                window=settings.window,
                batch_tokens=settings.batch_tokens,
                label=f"{name}: answers of {corpus}",
            )
            if corpus in tasks:
                said[corpus, name] = responses.choose(model, rows, tasks[corpus])
        if also is not None:
            also(name, model)

    result = evaluate_models(
        models, corpora, settings, seed=seed, dtype=dtype, device=device, further=further
    )
    moved = _distances(models, result.baseline, result.others) if settings.distances else {}
    return Versions(result, conversations, tasks, losses, said, settings.equal_gain, moved)


def _check_equal_gain(models: Mapping[str, str], corpora: Mapping[str, str], settings: Forgetting) -> None:
    """Refuse names that are not there, before anything is measured."""
    equal = settings.equal_gain
    if equal is None:
        return
    for name in (*equal.curve, *equal.versions):
        if name not in models:
            raise unknown_name("model", name, models, where="forgetting, equal_gain")
    for name in (equal.learnt, equal.kept):
        if name not in corpora:
            raise unknown_name("corpus", name, corpora, where="forgetting, equal_gain")
        if Corpus.open(corpora[name]).kind != "documents":
            raise PunaError(
                f"corpus {name!r} has no bits per byte",
                where="forgetting, equal_gain",
                found=f"a corpus of {Corpus.open(corpora[name]).kind}",
                expected="a corpus of documents",
            )


def _conversations(
    corpora: Mapping[str, str], settings: Forgetting, seed: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Task]]:
    """The conversations of each corpus that are measured, and the tasks among them."""
    conversations: dict[str, list[dict[str, Any]]] = {}
    tasks: dict[str, Task] = {}
    for name, path in corpora.items():
        corpus = Corpus.open(path)
        if corpus.kind == "messages":
            rows = sorted(drawn(name, corpus, settings.conversations, seed), key=lambda row: row[0])
            conversations[name] = [row for _, row in rows]
            if name in settings.tasks:
                tasks[name] = responses.task_of(name, corpus, conversations[name], settings.tasks[name])
    if strange := [name for name in settings.tasks if name not in tasks]:
        raise PunaError(
            "a task needs a corpus of conversations",
            where="forgetting, tasks",
            found=strange[0],
            expected=f"one of {', '.join(conversations) or 'some corpora of messages, and there is none'}",
        )
    return conversations, tasks


def _distances(models: Mapping[str, str], baseline: str, others: Sequence[str]) -> dict[str, Distances]:
    return {name: distances(Weights.open(models[baseline]), Weights.open(models[name])) for name in others}
