"""BIG-bench's tasks in JSON: an input and what is to be answered, as a question and its answer, a label, or
the input alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pydantic

from puna.core.errors import PunaError, nearest
from puna.data.kinds import BadRowError
from puna.data.sources.common import (
    Item,
    Phrasings,
    PlacedSettings,
    Reading,
    asset_or_path,
    phrasing,
    source,
)

_TASK = "task.json"


class BigbenchSettings(PlacedSettings):
    """One task: a folder of tasks and the task's name, or its JSON file itself."""

    format: Literal["bigbench"] = "bigbench"
    task: str | None = None
    """Name of the task's folder, where the asset or path holds several."""
    ask: Phrasings = ("{input}",)
    """What the user says, with the place {input}; of several phrasings one is drawn for each example."""
    language: str | None = None
    """Language tag of the task."""

    @pydantic.field_validator("ask")
    @classmethod
    def _has_place(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for phrase in value:
            if "{input}" not in phrase:
                raise ValueError(f"the request has no place {{input}}: {phrase!r}")
        return value

    def default_name(self) -> str:
        """The task's name, else the asset's or folder's."""
        return self.task or self.asset or Path(self.path or "").parent.name

    def files(self) -> list[Path]:
        """The task's file, unless an asset holds it."""
        return [] if self.path is None else [_file(Path(self.path), self.task)]


@source(BigbenchSettings, "documents", "messages", "labelled_texts")
def read_bigbench(settings: BigbenchSettings, reading: Reading) -> Iterator[Item]:
    """An example is a source document of its own: a question, and the first of its answers.

    Of a choice the answer is the one with the highest score; where several have it, the row is bad. As a
    labelled text the input is the text, ``ask`` put around it, and the answer its label; as a document it is
    alone, without the answer.
    """
    path = _file(asset_or_path(settings.asset, settings.path, reading), settings.task)
    for number, example in enumerate(_examples(path)):
        name = f"example {number}"
        if not reading.wants(name):
            continue
        try:
            asked, answered = _text(example, "input"), _answer(example)
        except BadRowError as error:
            reading.bad_row(error, where=f"{path}, {name}")
            continue
        reading.tally.keep()
        asked = phrasing(settings.ask, reading, settings.title, name).replace("{input}", asked)
        row: dict[str, Any] = {"text": asked}
        if reading.kind == "labelled_texts":
            row["label"] = answered
        if reading.kind == "messages":
            said = {"role": "user", "content": asked}
            row = {"messages": [said, {"role": "assistant", "content": answered}]}
        yield Item(name, {**row, "language": settings.language or reading.language})


def _file(path: Path, task: str | None) -> Path:
    if path.is_file():
        if task is not None:
            raise PunaError("a file holds one task", where=path, fix="leave out the task's name")
        return path
    tasks = sorted(folder.parent.name for folder in path.glob(f"*/{_TASK}"))
    if task in tasks:
        return path / str(task) / _TASK
    close = nearest(task, tasks) if task else None
    raise PunaError(
        f"no task {task!r} here" if task else "which task is meant?",
        where=path,
        expected=f"one of {len(tasks)} tasks, such as {', '.join(tasks[:2])}" if tasks else f"*/{_TASK}",
        fix=f"did you mean {close!r}?" if close else None,
    )


def _examples(path: Path) -> list[Any]:
    try:
        task = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PunaError("not a readable JSON file", where=path, found=error) from None
    examples = task.get("examples") if isinstance(task, dict) else None
    if not isinstance(examples, list):
        raise PunaError("not a BIG-bench task", where=path, expected="an object with a list of examples")
    return examples


def _text(example: Any, key: str) -> str:
    value = example.get(key) if isinstance(example, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise BadRowError("not a text", key, value)
    return value.strip()


def _answer(example: dict[str, Any]) -> str:
    scores = example.get("target_scores")
    if isinstance(scores, dict) and scores and all(isinstance(s, (int, float)) for s in scores.values()):
        best = [choice for choice, score in scores.items() if score == max(scores.values())]
        if len(best) > 1:
            raise BadRowError("several choices are the best", "target_scores", best)
        return str(best[0])
    target = example.get("target")
    return _text({"target": target[0]} if isinstance(target, list) and target else example, "target")
