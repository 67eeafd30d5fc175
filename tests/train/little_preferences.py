"""A corpus with a planted preference for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from puna.core.seeds import numpy_generator
from puna.data.corpus import write_corpus

WORDS = ["the", "cat", "sat", "on", "that", "mat", "went", "again"]


def sentence(generator: Any, words: int) -> str:
    return " ".join(generator.choice(WORDS, words))


def write_preferences(folder: Path, count: int, *, seed: int = 0, name: str = "pair") -> Path:
    """Whatever is asked, answers that begin with "in the end" are preferred to those with "and then"."""
    generator = numpy_generator(seed, "preferences")

    def answer(beginning: str) -> list[dict[str, str]]:
        text = f"{beginning} {sentence(generator, int(generator.integers(1, 3)))}"
        return [{"role": "assistant", "content": text}]

    rows = (
        {
            "id": f"{name}{number}",
            "prompt": [{"role": "user", "content": sentence(generator, 2)}],
            "chosen": answer("in the end"),
            "rejected": answer("and then"),
            "source": "test",
            "language": "en",
        }
        for number in range(count)
    )
    about = [{"source": "test", "licence": "CC0"}]
    return write_corpus(folder, "preferences", rows, provenance=about, ledger={}).path
