"""Conversations out of sentence pairs, mixed with corpora of conversations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.core.seeds import derive, numpy_generator
from puna.data.build import Built
from puna.data.corpus import Corpus, write_corpus
from puna.data.kinds import texts_of
from puna.data.leak import LeakCheck
from puna.data.ledger import Ledger, Tally
from puna.data.settings import PLACEHOLDER, InstructionsParameters, Task
from puna.data.split import HeldOut, make_split

_WHOLE = 1 << 63


def build_instructions(
    parameters: InstructionsParameters, inputs: Mapping[str, Any], out: Path, *, seed: int
) -> Built:
    """Make the corpora ``train`` and, if anything is held out, ``held_out`` below ``out``."""
    pairs = [Corpus.open(path, kind="sentence_pairs") for path in (inputs.get("pairs") or {}).values()]
    chats = [Corpus.open(path, kind="messages") for path in (inputs.get("messages") or {}).values()]
    held_out = [Corpus.open(path) for path in (inputs.get("held_out") or {}).values()]
    _check(parameters, pairs, chats, held_out)
    work = _Work(parameters, seed, inherited(pairs + chats + held_out))
    apart = held_out or (pairs + chats if parameters.held_out_share else [])
    if apart:
        rows = [row for corpus in apart for row in work.rows(corpus, held_out=True)]
        work.write(out, "held_out", rows)
    made = [row for corpus in pairs for row in work.rows(corpus, held_out=False)]
    made = work.limited(made, parameters.limit, "limit on conversations out of pairs")
    mixed = [row for corpus in chats for row in work.rows(corpus, held_out=False)]
    if parameters.messages_share is not None:
        most = round(parameters.messages_share / (1 - parameters.messages_share) * len(made))
        mixed = work.limited(mixed, most, "share of conversations mixed in")
    order = numpy_generator(seed, "instructions", "order").permutation(len(made) + len(mixed))
    together = made + mixed
    work.write(out, "train", [together[index] for index in order])
    return work.built


def _check(
    parameters: InstructionsParameters, pairs: list[Corpus], chats: list[Corpus], held_out: list[Corpus]
) -> None:
    if not pairs and not chats:
        raise PunaError("instructions need pairs or messages among their inputs", where="in")
    if any(corpus.kind == "sentence_pairs" for corpus in pairs + held_out) and not parameters.tasks:
        raise PunaError(
            "no task tells how pairs become conversations",
            where="tasks",
            fix="tasks: {translate: {ask: ['Translate: {source}'], answer: '{target}'}}",
        )
    for corpus in held_out:
        if corpus.kind not in ("sentence_pairs", "messages"):
            raise PunaError("held out can be pairs or messages", where=corpus.path, found=corpus.kind)
    if held_out and parameters.held_out_share:
        raise PunaError(
            "held_out_share is of no use with held-out corpora among the inputs", where="held_out_share"
        )


def inherited(corpora: list[Corpus]) -> list[dict[str, Any]]:
    """Provenance of all inputs, each source once."""
    entries = [entry for corpus in corpora for entry in corpus.meta["provenance"]]
    return [entry for index, entry in enumerate(entries) if entry not in entries[:index]]


@dataclass
class _Work:
    parameters: InstructionsParameters
    seed: int
    provenance: list[dict[str, Any]]
    built: Built = field(default_factory=Built)
    ledger: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        self.built.leak = LeakCheck(self.parameters.leak_words)
        share = HeldOut(share=self.parameters.held_out_share)
        self.split = make_split(share, [], derive(self.seed, "instructions"))

    def rows(self, corpus: Corpus, *, held_out: bool) -> Iterator[dict[str, Any]]:
        """Conversations of one side out of a corpus; every row read is kept or counted as dropped.

        Of pairs, the conversations made of the rows that were kept are counted in a step of their own.
        """
        step = f"{corpus.path.parent.name}/{corpus.path.name}"
        tally = self.ledger.step(step, "rows")
        made = tally if corpus.kind == "messages" else self.ledger.step(f"{step}, asked", "conversations")
        divided = self.parameters.held_out_share > 0
        for row in corpus.rows():
            if divided and self.split.is_held_out(row["source"], document_of(row)) != held_out:
                continue
            # The runs of words come from the pair itself: the wording of the requests is shared by all.
            texts = list(texts_of(corpus.kind, row, system=False))
            if held_out:
                self.built.leak.add(row["id"], texts)
            elif self._leaks(row["id"], texts):
                tally.drop(f"{self.built.leak.size} words in a row held out")
                continue
            if corpus.kind == "messages":
                yield from self._short_enough([row], made)
            elif min(len(text.split()) for text in texts) < self.parameters.min_words:
                tally.drop("too short")
            else:
                tally.keep()
                asked = [self._ask(name, row) for name in self._tasks_for(row["id"])]
                yield from self._short_enough(asked, made)

    def _leaks(self, row_id: str, texts: list[str]) -> bool:
        leak = self.built.leak
        if self.parameters.leak == "drop":
            if leak.shared(texts) is not None:
                return True
            leak.checked += 1
        elif leak.check(row_id, texts) and self.parameters.leak == "error":
            raise leak.error()
        return False

    def _short_enough(self, made: list[dict[str, Any]], tally: Tally) -> Iterator[dict[str, Any]]:
        most = self.parameters.max_characters
        for conversation in made:
            if most is not None and sum(len(said["content"]) for said in conversation["messages"]) > most:
                tally.drop("too long")
            else:
                tally.keep()
                yield conversation

    def _tasks_for(self, row_id: str) -> list[str]:
        tasks = self.parameters.tasks
        if self.parameters.every_task:
            return list(tasks)
        draw = derive(self.seed, "task", row_id) / _WHOLE * sum(task.weight for task in tasks.values())
        for name, task in tasks.items():
            draw -= task.weight
            if draw < 0:
                return [name]
        return [name]

    def _ask(self, name: str, row: dict[str, Any]) -> dict[str, Any]:
        task = self.parameters.tasks[name]
        phrasing = task.ask[derive(self.seed, "phrasing", name, row["id"]) % len(task.ask)]
        messages = [] if task.system is None else [{"role": "system", "content": task.system}]
        messages.append({"role": "user", "content": filled(phrasing, row)})
        messages.append({"role": "assistant", "content": filled(task.answer, row)})
        language = self.parameters.language or _answered_in(task, row)
        return {
            "id": f"{row['id']}/{name}",
            "messages": messages,
            "source": row["source"],
            "language": language,
        }

    def limited(self, rows: list[dict[str, Any]], most: int | None, step: str) -> list[dict[str, Any]]:
        """At most ``most`` of the rows, drawn by the seed, in their order; the rest is counted as dropped."""
        if most is None:
            return rows
        tally = self.ledger.step(step, "conversations")
        drawn = numpy_generator(self.seed, "instructions", step).permutation(len(rows))[:most]
        chosen = set(drawn.tolist())
        for index in range(len(rows)):
            if index in chosen:
                tally.keep()
            else:
                tally.drop("over the limit")
        return [row for index, row in enumerate(rows) if index in chosen]

    def write(self, out: Path, side: str, rows: list[dict[str, Any]]) -> None:
        """Write one side with the ledger of what led to it."""
        self.built.corpora[side] = write_corpus(
            out / side, "messages", rows, provenance=self.provenance, ledger=self.ledger
        )
        self.ledger = Ledger()


def document_of(row: Mapping[str, Any]) -> str:
    """The source document a row of a corpus came from: its id without the place in the document."""
    return str(row["id"]).rpartition("#")[0] or str(row["id"])


def filled(template: str, row: Mapping[str, Any]) -> str:
    """``template`` with {source} and {target} replaced by the sides of a pair; other braces stay."""
    return PLACEHOLDER.sub(lambda match: str(row[f"{match[1]}_text"]), template)


def _answered_in(task: Task, row: Mapping[str, Any]) -> str:
    match = PLACEHOLDER.search(task.answer)
    assert match is not None, "the task's own check demands a placeholder"
    return str(row[f"{match[1]}_language"])
