"""Learning from another model's distributions: the teacher in the loop, live or kept on disk.

The student meets the teacher at every labelled position, over the whole vocabulary or the teacher's
``top_k`` likeliest tokens; the losses are those of ``distillation.py``. A live teacher reads each
micro-batch beside the student. A stored one reads every row once, before the first step, and is let
go: its likeliest tokens are then taken from disk, in every epoch and after every restart. A teacher
reads a row alone for that; where a micro-batch is one row, live and stored give the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.files import fingerprint
from puna.core.progress import Track, say
from puna.text import pretrained
from puna.text.packing import IGNORED, Row, collate
from puna.train.compatibility import Compatible
from puna.train.distillation import (
    Direction,
    LinearTeacher,
    PositionLoss,
    TopTokens,
    hidden_cosine,
    linear_kl,
    linear_top_k_kl,
    linear_top_tokens,
)
from puna.train.distributed import World
from puna.train.loader import MicroBatch
from puna.train.objectives import Loss, Objective
from puna.train.preferences import fingerprint_of_rows
from puna.train.settings import WITH_TEACHER
from puna.train.stages import Train
from puna.train.teacher_cache import TeacherCache, write_teacher_cache

if TYPE_CHECKING:
    from puna.model.llama import Llama
    from puna.text.packing import Batch


def teachers_of(
    inputs: Mapping[str, Any], student: Llama, parameters: Train, dtype: str, world: World
) -> dict[str, Llama]:
    """The models that are learnt from, ``teacher`` and ``older``; none where the objective has no teacher."""
    wanted = parameters.objective in WITH_TEACHER
    source, earlier = inputs.get("teacher"), inputs.get("older")
    if (source is not None) != wanted:
        raise PunaError(
            f"objective {parameters.objective!r} {'learns from a teacher' if wanted else 'has no teacher'}",
            where="teacher",
            found=source or "no such input",
            fix="give the stage an input teacher" if wanted else f"take {' or '.join(WITH_TEACHER)}",
        )
    if (earlier is not None) != (parameters.compatible is not None):
        raise PunaError(
            "there is no earlier version to learn from"
            if earlier is None
            else "nothing is learnt from the earlier version",
            where="older",
            found=earlier or "no such input",
            fix="give the stage an input older"
            if earlier is None
            else f"set compatible, with objective {' or '.join(WITH_TEACHER)}",
        )
    named = {"teacher": source, "older": earlier}
    teachers = {
        name: open_teacher(path, student, dtype=dtype, world=world)
        for name, path in named.items()
        if path is not None
    }
    if parameters.hidden_cosine:
        ours, theirs = (
            (len(one.spec.blocks), one.spec.hidden_size) for one in (student, teachers["teacher"])
        )
        if ours != theirs:
            raise PunaError(
                "hidden states are compared layer by layer",
                where="hidden_cosine",
                found=f"a student of {ours[0]} layers of {ours[1]}, a teacher of {theirs[0]} of {theirs[1]}",
                expected="as many layers of one width; halves that are left out count",
            )
    return teachers


def distillation(
    teachers: Mapping[str, Llama],
    parameters: Train,
    rows: Sequence[Row],
    folder: Path,
    recipe: Mapping[str, Any],
    world: World,
) -> Distill | Compatible:
    """The objective that ``parameters`` ask for, with the teachers in it, or what they said of ``rows``.

    That is kept in ``folder``, under their names; ``recipe`` is what the run's weights depend on, the
    teachers' fingerprints by name among it.
    """
    size = teachers["teacher"].spec.vocab_size
    if parameters.top_k is not None and parameters.top_k > size:
        raise PunaError(
            "more tokens than there are", where="top_k", found=parameters.top_k, expected=f"at most {size:,}"
        )
    settings = DistillSettings(
        parameters.divergence, parameters.temperature, parameters.top_k, parameters.hidden_cosine
    )
    learnt: dict[str, Distill] = {}
    for name, teacher in teachers.items():
        learnt[name] = Distill(settings, live=teacher)
        if parameters.store_teacher:
            assert parameters.top_k is not None
            known = fingerprint([recipe[name], recipe["dtype"], parameters.top_k, fingerprint_of_rows(rows)])
            stored = store_teacher(
                teacher, rows, folder / name, k=parameters.top_k, recipe=known, world=world
            )
            learnt[name] = Distill(settings, stored=stored)
    if parameters.compatible is None:
        return learnt["teacher"]
    chosen = parameters.compatible
    return Compatible(learnt["teacher"], learnt["older"], chosen.where, chosen.cross_entropy)


def open_teacher(source: str | Path, student: Llama, *, dtype: str, world: World) -> Llama:
    """The model in ``source`` as a teacher of ``student``: its adapter merged, no gradients, no dropout.

    A tokenizer other than the student's is an error: the two distributions would be over different words.
    """
    teacher = pretrained.load_plain(source, dtype=dtype, device=str(world.device))
    theirs, ours = (
        None if one.tokenizer is None else one.tokenizer.fingerprint for one in (teacher, student)
    )
    if theirs != ours or teacher.spec.vocab_size != student.spec.vocab_size:
        raise PunaError(
            "teacher and student must share one vocabulary",
            where=source,
            found=f"{teacher.spec.vocab_size:,} tokens, tokenizer {theirs}",
            expected=f"{student.spec.vocab_size:,} tokens, tokenizer {ours}",
            fix="take a teacher with the student's tokenizer",
        )
    return teacher.eval().requires_grad_(False)


@dataclass(frozen=True)
class DistillSettings:
    """What is compared: ``direction`` of the divergence, ``temperature`` of both sides, ``top_k`` tokens
    (None: the whole vocabulary), and the weight of hidden states behind every layer."""

    direction: Direction = "forward"
    temperature: float = 1.0
    top_k: int | None = None
    hidden_cosine: float = 0.0


@dataclass(frozen=True)
class Distill:
    """The objective: divergence from a teacher, summed over labelled positions. One teacher is given.

    With ``hidden_cosine`` the sum over layers of 1 - cosine of hidden states is added: Puzzle's global
    distillation (2411.19146) at 1, which has no loss of the text's own tokens.

    ``live`` is a model of the student's vocabulary in the student's dtype; ``stored`` holds its
    likeliest tokens at the labelled positions of each packed row.
    """

    settings: DistillSettings
    live: Llama | None = None
    stored: StoredTeacher | None = None
    figures: tuple[str, ...] = ()

    def __call__(self, model: Llama, micro: MicroBatch) -> Loss:
        """Sum over the labelled positions of ``micro``."""
        batch = micro.batch
        labelled = batch.labels != IGNORED
        if not self.settings.hidden_cosine:
            hidden = model.hidden(batch.input_ids, batch.positions, batch.segments)[labelled]
            found = self.divergence(model, hidden, self.said(micro, hidden.device))
            return Loss(found.total, found.positions)
        assert self.live is not None
        with _behind_layers(model) as ours, _behind_layers(self.live) as theirs:
            hidden = model.hidden(batch.input_ids, batch.positions, batch.segments)[labelled]
            said = self.said(micro, hidden.device)
        found = self.divergence(model, hidden, said)
        total, tokens = found.total, found.positions
        for one, other in zip(ours, theirs, strict=True):
            apart = hidden_cosine(one, other, labelled)
            total = total + self.settings.hidden_cosine * apart.total
            tokens = tokens + self.settings.hidden_cosine * apart.positions
        return Loss(total, tokens)

    def said(self, micro: MicroBatch, device: torch.device) -> LinearTeacher | TopTokens:
        """What the teacher says at the labelled positions of ``micro``, in reading order."""
        if self.stored is not None:
            return self.stored.tokens(micro, device)
        assert self.live is not None
        if self.settings.top_k is not None:
            return _likeliest(self.live, micro.batch, self.settings.top_k)
        states = _states(self.live, micro.batch)[micro.batch.labels != IGNORED]
        return LinearTeacher(states, self.live.head_weight.detach())

    def divergence(self, model: Llama, hidden: Tensor, said: LinearTeacher | TopTokens) -> PositionLoss:
        """Of the student's final hidden states [positions, width] from what the teacher says there."""
        head, settings = model.head_weight, self.settings
        if isinstance(said, TopTokens):
            return linear_top_k_kl(hidden, head, said, settings.direction, temperature=settings.temperature)
        return linear_kl(hidden, head, said, settings.direction, temperature=settings.temperature)


@contextlib.contextmanager
def _behind_layers(model: Llama) -> Iterator[list[Tensor]]:
    """A block in which what leaves each layer is noted, [rows, time, width]; each runs once in there."""
    found: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _module, _inputs, output: found.append(output))
        for layer in model.model.layers
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _states(teacher: Llama, batch: Batch) -> Tensor:
    """Final hidden states of the teacher, [rows, time, its width]."""
    return teacher.hidden(batch.input_ids, batch.positions, batch.segments)


def _likeliest(teacher: Llama, batch: Batch, k: int) -> TopTokens:
    """The teacher's ``k`` likeliest tokens at the labelled positions, [targets, k]."""
    states = _states(teacher, batch)[batch.labels != IGNORED]
    return linear_top_tokens(states, teacher.head_weight, k)


def bytes_beside(objective: Objective) -> int:
    """Bytes of the weights of live teachers; 0 for any other objective."""
    taught = (objective.newer, objective.older) if isinstance(objective, Compatible) else (objective,)
    live = [one.live for one in taught if isinstance(one, Distill) and one.live is not None]
    return sum(tensor.nbytes for model in live for tensor in model.parameters())


class StoredTeacher:
    """A teacher's likeliest tokens at the labelled positions of packed rows, in a folder."""

    def __init__(self, cache: TeacherCache) -> None:
        self._cache = cache

    def tokens(self, micro: MicroBatch, device: torch.device) -> TopTokens:
        """Those of the rows of a micro-batch, in reading order: [targets, k]."""
        parts = [self._cache.row(str(int(row))) for row in micro.rows]
        found = [part for part in parts if isinstance(part, TopTokens)]
        assert len(found) == len(parts), "rows are stored with their likeliest tokens"
        ids = torch.cat([part.ids for part in found]).to(device)
        return TopTokens(ids, torch.cat([part.log_probs for part in found]).to(device))


def store_teacher(
    teacher: Llama, rows: Sequence[Row], folder: Path, *, k: int, recipe: str, world: World
) -> StoredTeacher:
    """The teacher's ``k`` likeliest tokens for ``rows``, from ``folder`` if they are there, else made there.

    ``recipe`` is a fingerprint of all they depend on. Of several processes the first one makes them.
    Time is one forward pass over the rows; disk takes 8 k bytes a position.
    """
    known = _opened(folder, recipe) if folder.exists() else None
    world.wait()  # all have looked before the first process writes
    if known is None and world.is_main:
        write_teacher_cache(
            folder,
            _read(teacher, rows, k, world),
            vocabulary=teacher.spec.vocab_size,
            dtype="float32",
            about={"recipe": recipe},
        )
    world.wait()
    return StoredTeacher(known or TeacherCache(folder))


def _opened(folder: Path, recipe: str) -> TeacherCache | None:
    """The cache in ``folder``; None, once that is said, if it is of no use."""
    try:
        cache = TeacherCache(folder)
    except PunaError as error:
        say(f"The teacher reads the rows again. {error}")
        return None
    if cache.about.get("recipe") != recipe:
        say(f"The teacher reads the rows again: {folder} was made for something else.")
        return None
    return cache


def _read(teacher: Llama, rows: Sequence[Row], k: int, world: World) -> Iterator[tuple[str, TopTokens]]:
    with Track("teacher", sum(row.tokens for row in rows), "tokens") as track:
        for number, row in enumerate(rows):
            yield str(number), _likeliest(teacher, collate([row]).to(world.device), k)
            track.advance(row.tokens)
