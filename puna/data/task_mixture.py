"""A mixture of many tasks under a budget: exact numbers by source, every task in it, nothing cut (S73).

Flacuna (arXiv 2307.02053) tunes on Flan-mini: of every source a fixed number of samples, of every task in it
fewer samples than there are, but some. Drawing in proportion to what there is would let the large sets
drown the small ones. Here every task of a source has its turn before any has a second one, so that tasks
of a source differ by one sample at most, as far as they have enough; limits by task cut further.

What is longer than the length that is trained is left out before anything is counted: cut at the end it
would lose its answer, and left out later it would be missing from the table. How the authors chose among a
task's instances and templates is not told; here both are uniform (templates: see the sources).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError, unknown_name
from puna.core.seeds import derive
from puna.core.stage import Context, Outcome
from puna.data.caps import Cap, capped
from puna.data.corpus import Corpus, write_corpus
from puna.data.describe import counts_table, drops_table, leak_table
from puna.data.instructions import inherited
from puna.data.kinds import texts_of
from puna.data.leak import LeakCheck
from puna.data.ledger import Ledger, Tally
from puna.data.settings import TaskMixtureParameters

Length = Callable[[Mapping[str, Any]], int]


@dataclass(frozen=True, slots=True)
class _Row:
    """A row by its place in the corpus; a length of 1 where lengths are not asked for."""

    place: int
    task: str
    tokens: int

    def __len__(self) -> int:
        return self.tokens


@dataclass
class Drawn:
    """What was drawn of one source. ``tasks`` are all of its tasks, by rows that were read and were kept."""

    name: str
    cap: Cap
    places: frozenset[int]
    read: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        """Rows kept."""
        return len(self.places)


def run(context: Context, parameters: TaskMixtureParameters) -> Outcome:
    """Draw from every source, write what was drawn, tell the table."""
    corpora = {name: Corpus.open(path, kind="messages") for name, path in context.inputs["corpora"].items()}
    for name in parameters.caps:
        if name not in corpora:
            raise unknown_name("source", name, corpora, where="caps")
    if free := [name for name in corpora if name not in parameters.caps]:
        raise PunaError(
            f"source {free[0]!r} has no cap", where="caps", fix=f"caps: {{{free[0]}: {{rows: ...}}}}"
        )
    held_out = context.inputs.get("held_out") or {}
    leak = LeakCheck(parameters.leak_words)
    for path in held_out.values():
        apart = Corpus.open(path)
        for row in apart.rows():
            leak.add(row["id"], texts_of(apart.kind, row, system=False))
    length = _length(context.inputs.get("model"), parameters)
    ledger = Ledger()
    drawn = [
        _draw(name, corpus, parameters, leak, length, ledger, seed=derive(context.seed, context.name, name))
        for name, corpus in corpora.items()
    ]
    rows = _rows(corpora, drawn)
    written = write_corpus(
        context.out / "corpus", "messages", rows, provenance=inherited([*corpora.values()]), ledger=ledger
    )
    tables = [table(drawn), counts_table({"mixture": written}), drops_table({"mixture": written})]
    if held_out:
        tables.append(leak_table(leak))
    context.report.setdefault("tables", []).extend(tables)
    return Outcome({"corpus": written.path}, _metrics(drawn, ledger, leak))


def _length(model: str | Path | None, parameters: TaskMixtureParameters) -> Length:
    """What a conversation's length in tokens is, by the model's tokenizer and chat template."""
    if parameters.max_length is None and not any(
        cap.tokens or cap.task_tokens for cap in parameters.caps.values()
    ):
        return lambda row: 1
    if model is None:
        raise PunaError(
            "tokens are counted by a model's tokenizer and chat template",
            where="max_length" if parameters.max_length else "caps",
            fix="give the stage an input model",
        )
    from puna.text import pretrained
    from puna.text.encode import encode_messages
    from puna.text.template import template_for

    tokenizer = pretrained.required_tokenizer(model)
    template = template_for(tokenizer)
    return lambda row: len(encode_messages(tokenizer, template, row["messages"]))


def _draw(
    name: str,
    corpus: Corpus,
    parameters: TaskMixtureParameters,
    leak: LeakCheck,
    length: Length,
    ledger: Ledger,
    *,
    seed: int,
) -> Drawn:
    """The rows of one source within its caps; what is left out is counted in the ledger by its reason."""
    cap, tally = parameters.caps[name], ledger.step(name, "conversations")
    rows = []
    read: Counter[str] = Counter()
    for place, row in enumerate(corpus.rows()):
        read[row["source"]] += 1
        if _leaks(row, leak, parameters, tally):
            continue
        tokens = length(row)
        if parameters.max_length is not None and tokens > parameters.max_length:
            tally.drop("too long")
        else:
            rows.append(_Row(place, row["source"], tokens))
    if lost := sorted(set(read) - {row.task for row in rows}):
        raise PunaError(
            f"nothing is left of task {lost[0]!r}: every row is too long or held out",
            where=f"source {name!r}",
            found=f"{read[lost[0]]:,} rows",
            fix="raise max_length, or leave the task out of the corpus",
        )
    kept = capped(rows, cap, seed=seed, turns_by_task=True, where=f"caps.{name}")
    if cap.rows is not None and len(kept) < cap.rows and parameters.when_short == "error":
        raise PunaError(
            f"source {name!r} has fewer rows than its cap says",
            where=f"caps.{name}",
            found=f"{len(kept):,} rows within the limits",
            expected=f"{cap.rows:,}",
            fix="give it more text, raise task_rows or max_length, or set when_short: take",
        )
    for _ in range(len(kept)):
        tally.keep()
    for _ in range(len(rows) - len(kept)):
        tally.drop("over the cap")
    taken = Counter(row.task for row in kept)
    return Drawn(name, cap, frozenset(row.place for row in kept), read, taken)


def _leaks(row: Mapping[str, Any], leak: LeakCheck, parameters: TaskMixtureParameters, tally: Tally) -> bool:
    """Whether a row is left out because of what it shares with held-out text."""
    if not leak.runs or not leak.check(row["id"], texts_of("messages", row, system=False)):
        return False
    if parameters.leak == "error":
        raise leak.error()
    if parameters.leak == "drop":
        tally.drop(f"{leak.size} words in a row held out")
    return parameters.leak == "drop"


def _rows(corpora: Mapping[str, Corpus], drawn: list[Drawn]) -> Iterator[dict[str, Any]]:
    """The rows that were drawn, source by source, in their order; ids say the source too."""
    for source in drawn:
        for place, row in enumerate(corpora[source.name].rows()):
            if place in source.places:
                yield {**row, "id": f"{source.name}/{row['id']}"}


def table(drawn: list[Drawn]) -> dict[str, Any]:
    """The mixture for the report: rows asked for and drawn, tasks there and present, rows of a task."""
    rows = [
        [
            source.name,
            source.cap.rows or "all",
            source.rows,
            f"{len(source.kept)} of {len(source.read)}",
            min(source.kept.values()),
            max(source.kept.values()),
        ]
        for source in drawn
    ]
    tasks = sum(len(source.kept) for source in drawn)
    rows.append(["all", "", sum(source.rows for source in drawn), tasks, "", ""])
    columns = ["source", "asked for", "drawn", "tasks", "fewest of a task", "most of a task"]
    return {"title": "Mixture of tasks", "columns": columns, "rows": rows}


def _metrics(drawn: list[Drawn], ledger: Ledger, leak: LeakCheck) -> dict[str, float]:
    """Rows and tasks in all and by source, tasks of which nothing was drawn, and drops by reason."""
    found = {
        "rows": float(sum(source.rows for source in drawn)),
        "tasks": float(sum(len(source.kept) for source in drawn)),
        "tasks_missing": float(sum(len(source.read.keys() - source.kept.keys()) for source in drawn)),
        "fewest_of_a_task": float(min(min(source.kept.values()) for source in drawn)),
        "off_cap": float(
            sum(abs(source.rows - source.cap.rows) for source in drawn if source.cap.rows is not None)
        ),
    }
    for source in drawn:
        found[f"rows.{source.name}"] = float(source.rows)
        found[f"tasks.{source.name}"] = float(len(source.kept))
    dropped = ledger.dropped()
    found["dropped.too_long"] = float(dropped["too long"])
    found["dropped.over_the_cap"] = float(dropped["over the cap"])
    found["leak.rows"] = float(leak.leaking)
    return found
