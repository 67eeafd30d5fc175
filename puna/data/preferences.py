"""Preference pairs out of conversations: the answer that is there is chosen, a spoilt one is rejected.

The ways to spoil an answer are failures that small models really show: to answer something else, to
leave a text untranslated, to say things over and over, to stop in the middle. Which one a
conversation gets is drawn by the seed and its id, among those that apply to it. Pairs made so teach
to avoid these failures; they do not tell what people would prefer.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.core.seeds import derive
from puna.data.build import Built
from puna.data.corpus import Corpus, write_corpus
from puna.data.instructions import document_of, inherited
from puna.data.kinds import texts_of
from puna.data.leak import LeakCheck
from puna.data.ledger import Ledger, Tally
from puna.data.settings import PreferencesParameters
from puna.data.split import HeldOut, make_split

_WHOLE = 1 << 63
_NEIGHBOURS = 8  # answers of the most similar lengths that one is drawn from
_REPEATED = 4  # times that the last words of an answer are said again

_NO_ANSWER = "does not end with an answer to something"
_NOTHING_APPLIES = "no way to spoil the answer applies"


def build_preferences(
    parameters: PreferencesParameters, inputs: Mapping[str, Any], out: Path, *, seed: int
) -> Built:
    """Make the corpora ``train`` and, if anything is held out, ``held_out`` below ``out``."""
    chats = [Corpus.open(path, kind="messages") for path in inputs["messages"].values()]
    apart = [Corpus.open(path, kind="messages") for path in (inputs.get("held_out") or {}).values()]
    pairs = [Corpus.open(path, kind="sentence_pairs") for path in (inputs.get("pairs") or {}).values()]
    if apart and parameters.held_out_share:
        raise PunaError(
            "held_out_share is of no use with held-out corpora among the inputs", where="held_out_share"
        )
    work = _Work(parameters, seed, inherited(chats + apart), _ways(parameters, pairs), Originals(pairs))
    if apart or parameters.held_out_share:
        work.write(out, "held_out", work.rows(apart or chats, held_out=True))
    work.write(out, "train", work.rows(chats, held_out=False))
    return work.built


def _ways(parameters: PreferencesParameters, pairs: list[Corpus]) -> dict[str, float]:
    """The corruptions that are drawn from, by weight."""
    if parameters.corruptions is None:
        names = ("another_answer", "repeated", "truncated", *(["untranslated"] if pairs else []))
        return dict.fromkeys(names, 1.0)
    if bool(pairs) != ("untranslated" in parameters.corruptions):
        raise PunaError(
            "the corruption 'untranslated' and an input of pairs go together",
            where="corruptions",
            found=f"{', '.join(parameters.corruptions)}, {len(pairs)} corpora of pairs",
            fix="give both or neither",
        )
    return {str(name): weight for name, weight in parameters.corruptions.items()}


class Originals:
    """For each text of sentence pairs, the texts that stand beside it on the other side."""

    def __init__(self, pairs: Iterable[Corpus]) -> None:
        self._beside: dict[str, list[str]] = {}
        for corpus in pairs:
            for row in corpus.rows():
                source, target = row["source_text"], row["target_text"]
                self._beside.setdefault(source, []).append(target)
                self._beside.setdefault(target, []).append(source)

    def asked(self, request: str, answer: str) -> str | None:
        """The text that ``request`` holds and ``answer`` is the translation of; None if there is none."""
        found = (text for text in self._beside.get(answer, ()) if text in request)
        return max(found, key=len, default=None)


@dataclass(frozen=True)
class Answered:
    """A conversation cut before its last answer."""

    row: Mapping[str, Any]

    @property
    def prompt(self) -> list[dict[str, str]]:
        """What comes before the answer."""
        return list(self.row["messages"][:-1])

    @property
    def answer(self) -> str:
        """The text of the answer."""
        return str(self.row["messages"][-1]["content"])


class Pool:
    """Answers of one side sorted by length, to find those of similar length to another."""

    def __init__(self, answered: Iterable[Answered]) -> None:
        self._sorted = sorted({(len(one.answer), one.answer, _request(one)) for one in answered})

    def another(self, one: Answered, draw: int) -> str | None:
        """An answer to another request than that of ``one``, of a length near its own; None without any."""
        place = bisect_left(self._sorted, (len(one.answer), one.answer, ""))
        low, high, near = place - 1, place, list[str]()
        while len(near) < _NEIGHBOURS and (low >= 0 or high < len(self._sorted)):
            below = self._away(low, one)
            above = self._away(high, one)
            number = low if below <= above else high
            low, high = (low - 1, high) if below <= above else (low, high + 1)
            _, answer, request = self._sorted[number]
            if answer != one.answer and request != _request(one):
                near.append(answer)
        return near[draw % len(near)] if near else None

    def _away(self, number: int, one: Answered) -> float:
        """How much longer or shorter the answer at ``number`` is."""
        if not 0 <= number < len(self._sorted):
            return math.inf
        return abs(self._sorted[number][0] - len(one.answer))


def _request(one: Answered) -> str:
    return str(one.prompt[-1]["content"])


def repeated(answer: str) -> str:
    """The answer, after which its last third of words is said again and again."""
    words = answer.split()
    last = " ".join(words[-math.ceil(len(words) / 3) :])
    return " ".join([answer, *[last] * _REPEATED])


def truncated(answer: str) -> str | None:
    """The first half of the answer's words; None if it has one word only."""
    words = answer.split()
    return " ".join(words[: len(words) // 2]) or None


@dataclass
class _Work:
    parameters: PreferencesParameters
    seed: int
    provenance: list[dict[str, Any]]
    corruptions: dict[str, float]
    originals: Originals
    built: Built = field(default_factory=Built)
    ledger: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        self.built.leak = LeakCheck(self.parameters.leak_words)
        share = HeldOut(share=self.parameters.held_out_share)
        self.split = make_split(share, [], derive(self.seed, "preferences"))

    def rows(self, corpora: list[Corpus], *, held_out: bool) -> list[dict[str, Any]]:
        """Pairs of one side; every conversation read is kept or counted as dropped.

        What is said in another answer's place comes from the same side, so that sides stay apart.
        """
        answered: list[Answered] = []
        for corpus in corpora:
            step = f"{corpus.path.parent.name}/{corpus.path.name}"
            tally = self.ledger.step(step, "conversations")
            answered += [Answered(row) for row in corpus.rows() if self._wanted(row, tally, held_out)]
        spoilt = self.ledger.step("rejected answers", "pairs")
        pool = Pool(answered)
        found = []
        for one in answered:
            pair = self._pair(one, pool)
            if pair is None:
                spoilt.drop(_NOTHING_APPLIES)
            else:
                spoilt.keep()
                found.append(pair)
        return found

    def _wanted(self, row: dict[str, Any], tally: Tally, held_out: bool) -> bool:
        divided = self.parameters.held_out_share > 0
        if divided and self.split.is_held_out(row["source"], document_of(row)) != held_out:
            return False  # it is counted on its own side
        texts = list(texts_of("messages", row, system=False))
        leak = self.built.leak
        if held_out:
            leak.add(row["id"], texts)
        elif self.parameters.leak == "drop" and leak.shared(texts) is not None:
            tally.drop(f"{leak.size} words in a row held out")
            return False
        elif leak.check(row["id"], texts) and self.parameters.leak == "error":
            raise leak.error()
        roles = [message["role"] for message in row["messages"]]
        if len(roles) < 2 or roles[-1] != "assistant" or roles[-2] == "system":
            tally.drop(_NO_ANSWER)
            return False
        tally.keep()
        return True

    def _pair(self, one: Answered, pool: Pool) -> dict[str, Any] | None:
        """The pair of a conversation; None if no corruption applies to it."""
        row_id = one.row["id"]
        ways: dict[str, Callable[[], str | None]] = {
            "another_answer": lambda: pool.another(one, derive(self.seed, "another answer", row_id)),
            "untranslated": lambda: self.originals.asked(_request(one), one.answer),
            "repeated": lambda: repeated(one.answer),
            "truncated": lambda: truncated(one.answer),
        }
        left = dict(self.corruptions)
        while left:
            name = _drawn(left, derive(self.seed, "corruption", row_id, *sorted(left)))
            del left[name]
            rejected = ways[name]()
            if rejected is not None and rejected != one.answer:
                return {
                    "id": f"{row_id}/{name}",
                    "prompt": one.prompt,
                    "chosen": [{"role": "assistant", "content": one.answer}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                    "source": one.row["source"],
                    "language": one.row["language"],
                }
        return None

    def write(self, out: Path, side: str, rows: list[dict[str, Any]]) -> None:
        """Write one side with the ledger of what led to it."""
        self.built.corpora[side] = write_corpus(
            out / side, "preferences", rows, provenance=self.provenance, ledger=self.ledger
        )
        self.ledger = Ledger()


def _drawn(weights: Mapping[str, float], draw: int) -> str:
    """The name that ``draw``, a number below 2 ** 63, falls on."""
    place = draw / _WHOLE * sum(weights.values())
    for name, weight in weights.items():
        place -= weight
        if place < 0:
            return name
    return name


def corruptions_table(corpora: Mapping[str, Corpus]) -> dict[str, Any]:
    """How many answers were spoilt in which way, by side, as a table for the report."""
    rows = []
    for side, corpus in corpora.items():
        made = Counter(row["id"].rpartition("/")[2] for row in corpus.rows())
        rows += [[side, name, count] for name, count in sorted(made.items())]
    return {"title": "Rejected answers", "columns": ["side", "corruption", "pairs"], "rows": rows}
