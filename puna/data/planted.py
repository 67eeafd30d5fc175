"""Questions whose answer stands in a text: facts planted at random places of real documents.

A conversation is a document between marks, then a question about one of the facts; its answer is
known, so that answers can be checked without a judge. The needles of long-context tests are the case
of one fact in a long document, a toy reading test that of a few facts in a short one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.data.corpus import Corpus
from puna.data.ledger import Ledger
from puna.data.settings import PlantedParameters


@dataclass
class Planter:
    """Makes conversations out of the documents of a corpus; ``ledger`` counts the documents that went in."""

    parameters: PlantedParameters
    seed: int
    ledger: Ledger = field(default_factory=Ledger)

    def rows(self, corpus: Corpus) -> Iterator[dict[str, Any]]:
        """``parameters.rows`` conversations; a document serves once, and too little text is an error."""
        settings = self.parameters
        tally = self.ledger.step("documents", "rows")
        texts = self._texts(corpus)
        for number in range(settings.rows):
            generator = numpy_generator(self.seed, "planted", number)
            parts, source, languages, size = [], set[str](), set[str](), 0
            while size < settings.characters:
                row = next(texts, None)
                if row is None:
                    raise PunaError(
                        "the corpus has too little text for so many conversations",
                        where=corpus.path,
                        found=f"{number} of {settings.rows} conversations",
                        fix="lower rows or characters, or give more text",
                    )
                tally.keep()
                parts.append(row["text"].strip())
                source.add(row["source"])
                languages.add(row["language"])
                size += len(parts[-1]) + 2
            text = "\n\n".join(parts)[: settings.characters]
            about = {"source": "+".join(sorted(source)), "language": sorted(languages)[0]}
            yield {"id": f"planted{number}", "messages": self._messages(text, generator), **about}
        for _ in texts:
            tally.drop("not needed")

    def _texts(self, corpus: Corpus) -> Iterator[Mapping[str, Any]]:
        """The documents in an order drawn by the seed."""
        rows = list(corpus.rows())
        order = numpy_generator(self.seed, "planted", "documents").permutation(len(rows))
        return iter([rows[int(place)] for place in order])

    def _messages(self, text: str, generator: numpy.random.Generator) -> list[dict[str, str]]:
        settings = self.parameters
        names = generator.permutation(len(settings.names))[: settings.facts]
        facts = []
        for place in names:
            low = 10 ** (settings.digits - 1)
            number = str(int(generator.integers(low, 10 * low)))
            facts.append({"name": settings.names[int(place)], "number": number})
        spots = sorted(_line_ends(text, generator) for _ in facts)
        for spot, fact in reversed(list(zip(spots, facts, strict=True))):
            text = f"{text[:spot]}\n{settings.fact.format(**fact)}\n{text[spot:]}"
        asked = facts[int(generator.integers(len(facts)))]
        question = settings.question.format(**asked)
        content = f"{settings.begin}{text}{settings.end}{question}"
        return [
            {"role": "user", "content": content},
            {"role": "assistant", "content": settings.answer.format(**asked)},
        ]


def _line_ends(text: str, generator: numpy.random.Generator) -> int:
    """A random place at a line's end, or the text's."""
    ends = [place for place, letter in enumerate(text) if letter == "\n"] or [len(text)]
    return ends[int(generator.integers(len(ends)))]
