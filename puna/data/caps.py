"""At most so much of a source and of every task in it: each task has a turn before any has a second one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol, TypeVar

import pydantic

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.core.stage import Parameters


class Cap(Parameters):
    """At most so much of a source, or of each task in it: a task is what the rows' column ``source`` says."""

    tokens: int | None = pydantic.Field(None, ge=1)
    """Tokens of the source."""
    rows: int | None = pydantic.Field(None, ge=1)
    """Rows of the source's corpus."""
    task_tokens: int | None = pydantic.Field(None, ge=1)
    """Tokens of each task."""
    task_rows: int | None = pydantic.Field(None, ge=1)
    """Rows of each task."""

    @pydantic.model_validator(mode="after")
    def _caps_something(self) -> Cap:
        if all(getattr(self, name) is None for name in Cap.model_fields):
            raise ValueError(f"a cap says at least one of {', '.join(Cap.model_fields)}")
        return self


class Sized(Protocol):
    """A row that belongs to a task and has a length in tokens."""

    @property
    def task(self) -> str:
        """What its caps by task go by."""
        ...

    def __len__(self) -> int: ...


Row = TypeVar("Row", bound=Sized)


def capped(
    rows: Sequence[Row],
    cap: Cap | None,
    *,
    seed: int,
    turns_by_task: bool = False,
    where: str = "mixture.caps",
) -> list[Row]:
    """Rows within the limits of ``cap``, drawn by ``seed``, in the order they had.

    A row that would pass a limit is left out and the next is tried. With limits by task, or where
    ``turns_by_task`` asks for it, every task has its turn before any has a second one, and a task of
    which nothing is left is an error.
    """
    if cap is None:
        return list(rows)
    order = numpy_generator(seed, "train", "cap").permutation(len(rows)).tolist()
    by_task = turns_by_task or cap.task_rows is not None or cap.task_tokens is not None
    if by_task:
        turns: Counter[str] = Counter()
        turn: dict[int, int] = {}
        for place in order:
            turn[place] = turns[rows[place].task]
            turns[rows[place].task] += 1
        order.sort(key=turn.__getitem__)  # stable
    taken: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    kept: list[int] = []
    total = 0
    for place in order:
        task, size = rows[place].task, len(rows[place])
        limits = (
            (len(kept) + 1, cap.rows),
            (total + size, cap.tokens),
            (taken[task] + 1, cap.task_rows),
            (tokens[task] + size, cap.task_tokens),
        )
        if any(limit is not None and value > limit for value, limit in limits):
            continue
        kept.append(place)
        taken[task] += 1
        tokens[task] += size
        total += size
    empty = [row.task for row in rows if not taken[row.task]] if by_task else []
    if empty or not kept:
        raise PunaError(
            f"no row of task {empty[0]!r} fits the caps" if empty else "no row fits the caps",
            where=where,
            fix="raise them",
        )
    return [rows[place] for place in sorted(kept)]
