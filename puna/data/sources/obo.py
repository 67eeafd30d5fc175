"""An ontology in OBO format as labelled words: its definitions, with the terms that stand in them marked.

The labels are silver: a run of words is an entity where it is the name or an exact synonym of a term below
``root``, the longest first, without regard to case. Nobody read them, and a term that is paraphrased is not
marked. A definition in which no term stands is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pydantic

from puna.core.errors import PunaError
from puna.data.sources.common import Item, PlacedSettings, Reading, asset_or_path, source

_WORDS = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]")
_QUOTED = re.compile(r'^"((?:[^"\\]|\\.)*)"')


class OboSettings(PlacedSettings):
    """Definitions of an ontology, and which of its terms are entities."""

    format: Literal["obo"] = "obo"
    root: str = "HP:0000118"
    """Id of the term below which terms are entities; HP:0000118 is "phenotypic abnormality"."""
    entity: str = pydantic.Field("PHENOTYPE", min_length=1)
    """Type of the entities, behind B- and I-."""
    least_characters: int = pydantic.Field(4, ge=1)
    """Names shorter than this mark nothing: abbreviations stand for many things."""
    most_words: int = pydantic.Field(40, ge=1)
    """Definitions longer than this are left out."""

    def default_name(self) -> str:
        """The asset's or the file's name."""
        return self.asset or Path(self.path or "").name.split(".")[0]

    def files(self) -> list[Path]:
        """The file, unless an asset holds it."""
        return [] if self.path is None else [Path(self.path)]


@source(OboSettings, "labelled_words")
def read_obo(settings: OboSettings, reading: Reading) -> Iterator[Item]:
    """A term's definition is a source document of one row."""
    path = asset_or_path(settings.asset, settings.path, reading)
    terms = _terms(path)
    names = _names(terms, settings, path)
    longest = max(map(len, names))
    reading.facts["entities"] = len(names)
    for term in terms:
        definition = _QUOTED.match(term.get("def", [""])[0])
        if definition is None or "is_obsolete" in term:
            continue
        if not reading.wants(term["id"][0]):
            continue
        words = _WORDS.findall(_unescaped(definition[1]))
        labels = _labels([word.lower() for word in words], names, longest, settings.entity)
        if not words or len(words) > settings.most_words:
            reading.tally.drop("too long" if words else "without a word")
        elif not any(label.startswith("B-") for label in labels):
            reading.tally.drop("without an entity")
        else:
            reading.tally.keep()
            yield Item(term["id"][0], {"words": words, "labels": labels, "language": "en"})


def _terms(path: Path) -> list[dict[str, list[str]]]:
    """The values of each term's tags, by tag."""
    try:
        stanzas = path.read_text(encoding="utf-8").split("\n[")
    except (OSError, UnicodeDecodeError) as error:
        raise PunaError("not a readable OBO file", where=path, found=error) from None
    found = []
    for stanza in stanzas:
        if not stanza.startswith("Term]"):
            continue
        term: dict[str, list[str]] = {}
        for line in stanza.splitlines()[1:]:
            tag, colon, value = line.partition(": ")
            if colon:
                term.setdefault(tag, []).append(value)
        if "id" in term:
            found.append(term)
    if not found:
        raise PunaError("no term in this file", where=path, expected="an ontology in OBO format")
    return found


def _names(terms: list[dict[str, list[str]]], settings: OboSettings, path: Path) -> set[tuple[str, ...]]:
    """The names that mark an entity, each as its words in lower case."""
    children: dict[str, list[dict[str, list[str]]]] = {}
    for term in terms:
        for parent in term.get("is_a", []):
            children.setdefault(parent.partition(" !")[0].strip(), []).append(term)
    below: dict[str, dict[str, list[str]]] = {}
    waiting = [settings.root]
    while waiting:
        for term in children.get(waiting.pop(), []):
            if term["id"][0] not in below and "is_obsolete" not in term:
                below[term["id"][0]] = term
                waiting.append(term["id"][0])
    names = set()
    for term in below.values():
        synonyms = [text for text in term.get("synonym", []) if '" EXACT' in text]
        quoted = [match[1] for match in map(_QUOTED.match, synonyms) if match]
        for name in [*term.get("name", []), *map(_unescaped, quoted)]:
            if len(name) >= settings.least_characters:
                names.add(tuple(word.lower() for word in _WORDS.findall(name)))
    names.discard(())
    if not names:
        raise PunaError("no term lies below the root", where=path, found=settings.root)
    return names


def _labels(words: list[str], names: set[tuple[str, ...]], longest: int, entity: str) -> list[str]:
    """A label for each of ``words``, the longest names first, from left to right."""
    labels = ["O"] * len(words)
    place = 0
    while place < len(words):
        for length in range(min(longest, len(words) - place), 0, -1):
            if tuple(words[place : place + length]) in names:
                labels[place : place + length] = [f"B-{entity}"] + [f"I-{entity}"] * (length - 1)
                place += length
                break
        else:
            place += 1
    return labels


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: " " if match[1] == "n" else match[1], text)
