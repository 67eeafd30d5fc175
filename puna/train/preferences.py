"""Preference pairs in the loop: packed answers, the reference's log-probabilities, what is logged.

A row holds pairs one after the other, the chosen answer before the rejected one, each a segment of
its own (``pack(..., group=2)``). The losses are those of ``preference.py``.

The reference is the model as it is before training: a new adapter adds exactly nothing, so it is the
model without it. Its log-probabilities are taken once, in the passes in which the first epoch will
take the policy's: where nothing is dropped out, the two are equal to the bit in the first step, and
DPO's loss there is ln 2. Later epochs mix rows into other passes, in which a product may round differently.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from puna.core.errors import PunaError, unknown_name
from puna.core.files import fingerprint, write_aside
from puna.core.progress import Track, say
from puna.text.packing import IGNORED, Row
from puna.train import preference
from puna.train.distributed import World
from puna.train.loader import Feed, MicroBatch
from puna.train.objectives import Loss, linear_log_probs
from puna.train.preference import AnswerPairs, PreferenceLoss

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from puna.model.llama import Llama

FIGURES = (
    "margin",
    "accuracy",
    "chosen_reward",
    "rejected_reward",
    "chosen_log_prob",
    "rejected_log_prob",
    "ranking_accuracy",
)
"""What is logged of pairs, as means: ``margin`` is chosen minus rejected reward, ``accuracy`` the share
of pairs with a margin above 0, ``ranking_accuracy`` (2405.19534) that of pairs whose chosen answer is
more probable than the rejected one under the model alone. A tie counts half."""

PairLoss = Callable[[AnswerPairs], PreferenceLoss]

_FORMAT = "1"


def pair_loss(name: str, settings: Mapping[str, float]) -> PairLoss:
    """The objective ``name`` of ``preference.py`` with ``settings`` over its usual ones."""
    if name not in _LOSSES:
        raise unknown_name("preference objective", name, _LOSSES)
    function, kind = _LOSSES[name]
    chosen = kind(**settings)
    return lambda pairs: function(pairs, chosen)


_LOSSES: dict[str, tuple[Callable[[AnswerPairs, Any], PreferenceLoss], Callable[..., Any]]] = {
    "dpo": (preference.dpo, preference.DpoSettings),
    "length_normalised_dpo": (
        preference.length_normalised_dpo,
        preference.LengthNormalisedDpoSettings,
    ),
    "ipo": (preference.ipo, preference.IpoSettings),
    "orpo": (preference.orpo, preference.OrpoSettings),
    "simpo": (preference.simpo, preference.SimpoSettings),
    "cpo": (preference.cpo, preference.CpoSettings),
}


def answer_log_probs(model: Llama, micro: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Summed log-probability and number of the learnt tokens of each document, and those of each token.

    Documents and tokens in reading order: float32 [documents] with gradients, int64 [documents],
    float32 [tokens] without gradients.
    """
    batch = micro.batch
    hidden = model.hidden(batch.input_ids, batch.positions, batch.segments)
    tokens = linear_log_probs(hidden, model.head_weight, batch.labels)
    documents = batch.segments.amax(1) + 1  # of each row; padding is -1
    first = documents.cumsum(0) - documents
    counts = torch.bincount(
        (batch.segments + first[:, None])[batch.labels != IGNORED], minlength=int(documents.sum())
    )
    # Split and summed one by one: a scattered sum has no fixed order on a GPU.
    sums = torch.stack([part.sum() for part in torch.split(tokens, counts.tolist())])
    return sums, counts, tokens.detach()


class Answers:
    """Where the documents of packed rows stand in one tensor over all rows, in their order."""

    def __init__(self, rows: Sequence[Row]) -> None:
        sizes = [len(row.slices) for row in rows]
        self.first: NDArray[numpy.int64] = numpy.cumsum([0, *sizes], dtype=numpy.int64)

    def __len__(self) -> int:
        return int(self.first[-1])

    def places(self, rows: NDArray[numpy.int64]) -> Tensor:
        """Places of the documents of ``rows``, row by row: int64 [documents]."""
        ranges = [numpy.arange(self.first[row], self.first[row + 1]) for row in rows]
        return torch.from_numpy(numpy.concatenate(ranges))


@dataclass(frozen=True)
class Pairs:
    """The objective over the pairs of packed rows.

    ``reference`` is the reference's log-probability of each document in the order of ``answers``,
    float32 on the CPU; None for an objective that has none.
    """

    loss: PairLoss
    answers: Answers
    reference: Tensor | None = None
    figures: tuple[str, ...] = FIGURES

    def __call__(self, model: Llama, micro: MicroBatch) -> Loss:
        """Sum over the pairs in ``micro``."""
        sums, counts, tokens = answer_log_probs(model, micro)
        chosen_reference = rejected_reference = None
        if self.reference is not None:
            known = self.reference[self.answers.places(micro.rows)].to(sums.device)
            chosen_reference, rejected_reference = known[::2], known[1::2]
        chosen, rejected = sums[::2], sums[1::2]
        found = self.loss(
            AnswerPairs(chosen, rejected, chosen_reference, rejected_reference, counts[::2], counts[1::2])
        )
        figures = {
            "margin": found.margins,
            "accuracy": _share_above_zero(found.margins),
            "chosen_reward": found.chosen_rewards,
            "rejected_reward": found.rejected_rewards,
            "chosen_log_prob": chosen.detach(),
            "rejected_log_prob": rejected.detach(),
            "ranking_accuracy": _share_above_zero((chosen - rejected).detach()),
        }
        return Loss(found.losses.sum(), -tokens, {name: value.sum() for name, value in figures.items()})


def _share_above_zero(differences: Tensor) -> Tensor:
    return (differences.sign() + 1) / 2


@dataclass(frozen=True)
class Passes:
    """What the reference looks at of one corpus: its packed rows, and this process's share in passes."""

    rows: Sequence[Row]
    micro_batches: Callable[[], Iterable[MicroBatch]]
    tokens: int


TRAINED = "corpus"
"""The name of what is trained on among the corpora of a reference."""


def trained_passes(feed: Feed, total_steps: int) -> Passes:
    """The passes of the first epoch, or of its part that a run of ``total_steps`` will come to."""
    steps = feed.steps(0)[:total_steps]
    return Passes(
        feed.rows,
        lambda: itertools.chain.from_iterable(map(feed.micro_batches, steps)),
        sum(step.tokens for step in steps),
    )


class Reference:
    """The reference's log-probabilities of the answers of several corpora, kept in a file.

    ``recipe`` is all that they depend on besides the rows themselves and the number of processes.
    :meth:`log_probs` reads the file if it belongs to the same recipe and rows, so that a resumed run
    takes the very same values; else it computes and writes them. Every process calls it, computes
    its share and has all of them.
    """

    def __init__(self, path: Path, recipe: Mapping[str, Any], world: World) -> None:
        self.path = path
        self.recipe = fingerprint({**recipe, "processes": world.size})
        self.world = world

    def log_probs(self, model: Llama, corpora: Mapping[str, Passes]) -> dict[str, Tensor]:
        """float32 [documents] on the CPU for each corpus; NaN for rows that no pass looks at."""
        about = {"format": _FORMAT, "recipe": self.recipe}
        about |= {f"rows.{name}": fingerprint_of_rows(passes.rows) for name, passes in corpora.items()}
        stored = self._stored(about)
        # All processes have looked before the first one writes, and none goes on alone.
        having = self.world.total(torch.tensor([float(stored is not None)], dtype=torch.float64))
        if stored is not None and int(having) == self.world.size:
            return stored
        found = self._compute(model, corpora)
        if self.world.is_main:
            with write_aside(self.path) as aside:
                save_file(found, aside, metadata={**about, "sha256": _digest(found)})
        return found

    def _compute(self, model: Llama, corpora: Mapping[str, Passes]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        total = sum(passes.tokens for passes in corpora.values())
        with contextlib.ExitStack() as stack:
            track = None
            if self.world.is_main:
                track = stack.enter_context(Track("reference", total, "tokens"))
            for name, passes in corpora.items():
                answers = Answers(passes.rows)
                sums = torch.zeros(len(answers), dtype=torch.float64)
                seen = torch.zeros(len(answers), dtype=torch.float64)
                for micro in passes.micro_batches():
                    places = answers.places(micro.rows)
                    sums[places] = answer_log_probs(model, micro.to(self.world.device))[0].cpu().double()
                    seen[places] = 1.0
                    if track is not None:
                        track.advance(micro.batch.tokens * self.world.size)
                sums, seen = self.world.total(sums), self.world.total(seen)
                found[name] = torch.where(seen == 1, sums, torch.nan).float()
        return found

    def _stored(self, about: Mapping[str, str]) -> dict[str, Tensor] | None:
        """What the file holds; None if there is none, or, once that is said, if it is of no use."""
        try:
            return self._read(about) if self.path.exists() else None
        except PunaError as error:
            if self.world.is_main:
                say(f"The reference's log-probabilities are computed again. {error}")
            return None

    def _read(self, about: Mapping[str, str]) -> dict[str, Tensor]:
        try:
            with safe_open(self.path, framework="pt") as file:
                told = dict(file.metadata() or {})
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise PunaError("not a whole safetensors file", where=self.path, found=error) from None
        digest = told.pop("sha256", None)
        if digest != _digest(found):
            raise PunaError(
                "not what was written", where=self.path, found=_digest(found), expected=str(digest)
            )
        changed = sorted(key for key in told.keys() | about.keys() if told.get(key) != about.get(key))
        if changed:
            raise PunaError("made for something else", where=self.path, found=f"{', '.join(changed)} changed")
        return found


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0")
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def fingerprint_of_rows(rows: Sequence[Row]) -> str:
    """A fingerprint of packed rows: their tokens, which of them are learnt, and how they are cut."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(b"row")
        for piece in row.slices:
            digest.update(numpy.array([piece.start, piece.stop], dtype=numpy.int64).tobytes())
            digest.update(numpy.array(piece.document.ids, dtype=numpy.int64).tobytes())
            digest.update(numpy.array(piece.document.trained, dtype=bool).tobytes())
    return digest.hexdigest()[:16]
