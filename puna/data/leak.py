"""Leak check: runs of words that training text shares with held-out text.

The rule is the usual one of 13 words in a row, compared in lower case without punctuation. Scripts
written without spaces (Han, kana, Thai, Lao, Khmer, Burmese) count each character as a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from puna.core.errors import PunaError

WORDS = 13
_EXAMPLES = 5
_WITHOUT_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
_WORD = re.compile(rf"[{_WITHOUT_SPACES}]|[^\W{_WITHOUT_SPACES}]+")


def words(text: str) -> list[str]:
    """The words of ``text`` in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def ngrams(text: str, size: int) -> Iterator[tuple[str, ...]]:
    """All runs of ``size`` words in ``text``; none if it is shorter."""
    found = words(text)
    return (tuple(found[start : start + size]) for start in range(len(found) - size + 1))


@dataclass
class LeakCheck:
    """Holds the held-out runs of words and counts the training rows that share one."""

    size: int = WORDS
    checked: int = 0
    leaking: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)
    _held_out: dict[int, str] = field(default_factory=dict)

    def add(self, row_id: str, texts: Iterable[str]) -> None:
        """Take a held-out row into account."""
        for text in texts:
            for run in ngrams(text, self.size):
                self._held_out.setdefault(hash(run), row_id)

    def shared(self, texts: Iterable[str]) -> tuple[str, str] | None:
        """The first run of words shared with a held-out row, and that row's id; None if there is none."""
        for text in texts:
            for run in ngrams(text, self.size):
                row_id = self._held_out.get(hash(run))
                if row_id is not None:
                    return " ".join(run), row_id
        return None

    def check(self, row_id: str, texts: Iterable[str]) -> bool:
        """Whether a training row shares a run of words with held-out text; counted, with examples."""
        self.checked += 1
        found = self.shared(texts)
        if found is None:
            return False
        self.leaking += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append({"train": row_id, "held_out": found[1], "words": found[0]})
        return True

    @property
    def runs(self) -> int:
        """Number of different held-out runs of words."""
        return len(self._held_out)

    def error(self) -> PunaError:
        """The error that tells the first example."""
        example = self.examples[0]
        return PunaError(
            f"training text shares {self.size} words in a row with held-out text",
            where=example["train"],
            found=f"{example['words']!r}, also in {example['held_out']}",
            fix="leave such rows out: leak: drop",
        )

    def __str__(self) -> str:
        rows = f"{self.leaking} of {self.checked:,} training rows"
        found = f"{rows} share {self.size} words in a row with held-out rows"
        told = [f"{e['train']} and {e['held_out']}: {e['words']}" for e in self.examples]
        return "\n  ".join([f"leak check: {found}", *told])
