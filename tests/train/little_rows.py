"""Rows of random tokens for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from puna.core.seeds import numpy_generator
from puna.text.encode import Encoded
from puna.text.packing import Packed, pack

VOCABULARY = 320


@dataclass
class Replaced:
    """An objective that is a plain function of model and micro-batch."""

    function: Callable[[Any, Any], Any]
    figures: tuple[str, ...] = ()

    def __call__(self, model: Any, micro: Any) -> Any:
        return self.function(model, micro)


def documents(lengths: Sequence[int], seed: int = 0, share: float = 1.0) -> list[Encoded]:
    """Documents of random tokens of these lengths; ``share`` of the tokens are targets."""
    generator = numpy_generator(seed, "documents")
    found = []
    for number, length in enumerate(lengths):
        ids = generator.integers(3, VOCABULARY, length).tolist()
        trained = (generator.random(length) < share).tolist()
        found.append(Encoded(ids, [False, True, *trained[2:]], f"row{number}"))
    return found


def rows(lengths: Sequence[int], length: int = 32, mode: Any = "off", share: float = 1.0) -> Packed:
    return pack(documents(lengths, share=share), length, mode=mode)


MIXED = [5, 30, 12, 8, 21, 17, 3, 26, 9, 14, 11, 32, 7, 19, 4, 23]
