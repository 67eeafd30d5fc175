"""From sources to a corpus: split, duplicates, joined fragments, limits, leak check, written streamed.

The held-out side is made first, so that the training side can leave out what it repeats of it. Each
side is one pass over the sources; nothing but hashes is kept in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.core.progress import say
from puna.core.stage import Outcome
from puna.data.corpus import Corpus, write_corpus
from puna.data.describe import counts_table, drops_table, leak_table, metrics
from puna.data.fragments import Seen, join_fragments
from puna.data.kinds import UNDETERMINED, texts_of
from puna.data.leak import LeakCheck
from puna.data.ledger import Ledger, Tally
from puna.data.settings import CorpusParameters
from puna.data.sources import SOURCES, Item, Reading, SourceSettings
from puna.data.split import Split, make_split


@dataclass
class Built:
    """The corpora a stage made, by side, and what the leak check found on the training rows."""

    corpora: dict[str, Corpus] = field(default_factory=dict)
    leak: LeakCheck = field(default_factory=LeakCheck)

    def outcome(self, report: dict[str, Any]) -> Outcome:
        """The stage's outcome; tables of it are added to ``report``."""
        report.setdefault("tables", []).extend([counts_table(self.corpora), drops_table(self.corpora)])
        if "held_out" in self.corpora:
            report["tables"].append(leak_table(self.leak))
            say(str(self.leak))
        outputs = {side: corpus.path for side, corpus in self.corpora.items()}
        return Outcome(outputs=outputs, metrics=metrics(self.corpora, self.leak))


def build(recipe: CorpusParameters, out: Path, *, seed: int) -> Built:
    """Make the corpora ``train`` and, if anything is held out, ``held_out`` below ``out``."""
    names = _names(recipe)
    split = make_split(recipe.held_out, names, seed)
    built = Built(leak=LeakCheck(recipe.leak_words))
    seen = Seen()
    sides = ("held_out", "train") if recipe.held_out.asked_for else ("train",)
    for side in sides:
        work = _Side(recipe, split, seen, built.leak, held_out=side == "held_out", seed=seed)
        try:
            built.corpora[side] = write_corpus(
                out / side, recipe.kind, work.rows(), provenance=work.provenance, ledger=work.ledger
            )
        except PunaError:
            for name, tally in work.ledger.items():
                say(f"  {name}: {tally.as_json()}")
            raise
    return built


def _names(recipe: CorpusParameters) -> list[str]:
    names = [settings.title for settings in recipe.sources]
    for name in names:
        if names.count(name) > 1:
            raise PunaError(
                "two sources have the same name", found=name, fix="give each a name: {name: ..., ...}"
            )
    for settings in recipe.sources:
        kinds = SOURCES[type(settings)].kinds
        if recipe.kind not in kinds:
            raise PunaError(
                f"this source gives no {recipe.kind}",
                where=settings.title,
                expected=f"kind: {' or '.join(kinds)}",
            )
    return names


class _Side:
    """One pass over the sources for one side of the split."""

    def __init__(
        self,
        recipe: CorpusParameters,
        split: Split,
        seen: Seen,
        leak: LeakCheck,
        *,
        held_out: bool,
        seed: int,
    ) -> None:
        self.recipe = recipe
        self.split = split
        self.seen = seen
        self.leak = leak
        self.held_out = held_out
        self.seed = seed
        self.ledger = Ledger()
        self.provenance: list[dict[str, Any]] = []

    def rows(self) -> Iterator[dict[str, Any]]:
        for settings in self.recipe.sources:
            whole = settings.title in self.recipe.held_out.sources
            nothing_held_out = not whole and not self.recipe.held_out.share
            if (whole and not self.held_out) or (nothing_held_out and self.held_out):
                continue
            yield from self._rows_of(settings)

    def _rows_of(self, settings: SourceSettings) -> Iterator[dict[str, Any]]:
        recipe, name, kind = self.recipe, settings.title, self.recipe.kind
        reading = Reading(
            kind=kind,
            tally=self._step(name, "read"),
            wanted=self.split.side(name, held_out=self.held_out),
            limit=settings.limit,
            on_bad_row=settings.on_bad_row,
            language=recipe.language or UNDETERMINED,
            seed=self.seed,
        )
        items: Iterable[Item] = SOURCES[type(settings)].read(settings, reading)
        if recipe.min_words or recipe.max_characters is not None:
            items = self._within_limits(items, self._step(name, "length"))
        if recipe.deduplicate:
            items = self.seen.filter(items, kind, self._step(name, "duplicates"), held_out=self.held_out)
        checks = recipe.leak == "drop" and recipe.held_out.asked_for and not self.held_out
        if checks:
            items = self._not_shared(items, self._step(name, "shared with held-out"))
        if kind == "documents" and recipe.document_characters is not None:
            items = join_fragments(items, recipe.document_characters)
            if checks:  # Joined lines may run on from one another into a shared run of words.
                items = self._not_shared(items, self._step(name, "joined, shared with held-out", "documents"))
        rows = 0
        for item in items:
            source = name if item.task is None else f"{name}/{item.task}"
            row = {"id": f"{name}/{item.key}", **item.row, "source": source}
            self._watch(row)
            rows += 1
            yield row
        self.provenance.append(_provenance(settings, reading, rows))

    def _step(self, name: str, what: str, unit: str = "rows") -> Tally:
        return self.ledger.step(f"{name}: {what}", unit)

    def _within_limits(self, items: Iterable[Item], tally: Tally) -> Iterator[Item]:
        recipe = self.recipe
        for item in items:
            texts = list(texts_of(recipe.kind, item.row))
            if min(len(text.split()) for text in texts) < recipe.min_words:
                tally.drop("too short")
            elif recipe.max_characters is not None and sum(map(len, texts)) > recipe.max_characters:
                tally.drop("too long")
            else:
                tally.keep()
                yield item

    def _not_shared(self, items: Iterable[Item], tally: Tally) -> Iterator[Item]:
        for item in items:
            if self.leak.shared(texts_of(self.recipe.kind, item.row, system=False)) is not None:
                tally.drop(f"{self.recipe.leak_words} words in a row held out")
            else:
                tally.keep()
                yield item

    def _watch(self, row: dict[str, Any]) -> None:
        """Hand a finished row to the leak check: as held-out text, or as training text to be judged."""
        texts = texts_of(self.recipe.kind, row, system=False)
        if self.held_out:
            self.leak.add(row["id"], texts)
        elif self.leak.check(row["id"], texts) and self.recipe.leak == "error":
            raise self.leak.error()


def _provenance(settings: SourceSettings, reading: Reading, rows: int) -> dict[str, Any]:
    told = settings.model_dump(mode="json", exclude_defaults=True, exclude={"name", "licence"})
    licence = settings.licence or reading.facts.get("licence") or "unknown"
    facts = {key: value for key, value in reading.facts.items() if key != "licence"}
    format_ = SOURCES[type(settings)].format
    return {
        "source": settings.title,
        "format": format_,
        "licence": licence,
        "rows": rows,
        **facts,
        "settings": told,
    }
