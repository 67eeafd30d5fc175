"""Parameters of this room's stages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from puna.core import assets
from puna.core.stage import Parameters, PlanOnly
from puna.data.caps import Cap
from puna.data.kinds import Kind
from puna.data.sources import AnySource
from puna.data.split import HeldOut

PLACEHOLDER = re.compile(r"\{(source|target)\}")


class CorpusParameters(Parameters):
    """Sources, how they are split, and what is left out."""

    kind: Kind = "documents"
    """Kind of the rows."""
    sources: list[AnySource] = pydantic.Field(min_length=1)
    """Where the rows come from, each a mapping with the settings of its format."""
    language: str | None = None
    """Language tag of sources that do not tell their own."""
    held_out: HeldOut = HeldOut()
    """What is held out of training, before anything else."""
    deduplicate: bool = True
    """Keep each text once; what is held out is not trained on."""
    document_characters: pydantic.PositiveInt | None = 2000
    """Join fragments (messages of a catalogue, paragraphs of a page) into documents of about this many
    characters; null leaves each a document of its own."""
    min_words: pydantic.NonNegativeInt = 0
    """Leave out rows one of whose texts has fewer words. Applies to fragments before they are joined."""
    max_characters: pydantic.PositiveInt | None = None
    """Leave out rows with more characters. Applies to fragments before they are joined."""
    leak: Literal["drop", "report", "error"] = "drop"
    """What to do with training rows that share a run of words with held-out rows."""
    leak_words: pydantic.PositiveInt = 13
    """Length of that run in words."""

    expected_tokens: Annotated[dict[Literal["train", "held_out"], pydantic.PositiveInt], PlanOnly()] = (
        pydantic.Field(default_factory=dict)
    )
    """How many tokens each side will hold, where that is known: what a plan goes by."""

    def files(self) -> list[Path]:
        """The files that decide what the corpus holds, the list of assets among them."""
        listed = [assets.CATALOGUE] if any(getattr(source, "asset", None) for source in self.sources) else []
        return listed + [file for source in self.sources for file in source.files()]


class Task(Parameters):
    """A way to make a conversation out of a sentence pair: somebody asks, the assistant answers."""

    ask: list[str] = pydantic.Field(min_length=1)
    """Phrasings of the request, with {source} or {target} where the text goes; one is drawn for each pair."""
    answer: str = "{target}"
    """The assistant's answer, with {target} or {source}."""
    system: str | None = None
    """A system message before the request."""
    weight: pydantic.PositiveFloat = 1.0
    """How often the task is drawn, relative to the others."""

    @pydantic.model_validator(mode="after")
    def _both_sides(self) -> Task:
        answered = set(PLACEHOLDER.findall(self.answer))
        if not answered:
            raise ValueError("the answer holds neither {source} nor {target}")
        for ask in self.ask:
            asked = set(PLACEHOLDER.findall(ask))
            if not asked:
                raise ValueError(f"this request holds neither {{source}} nor {{target}}: {ask!r}")
            if asked & answered:
                raise ValueError(f"this request already holds its answer: {ask!r}")
        return self


class InstructionsParameters(Parameters):
    """How sentence pairs become conversations, and what is mixed in."""

    tasks: dict[str, Task] = pydantic.Field(default_factory=dict)
    """Tasks for sentence pairs by name, such as translation into a language and back."""
    every_task: bool = False
    """Make a conversation for each task of every pair, instead of one for a task that is drawn."""
    language: str | None = None
    """Language tag of the conversations; without it the language of the side they answer with."""
    min_words: pydantic.NonNegativeInt = 1
    """Leave out pairs with fewer words on either side."""
    max_characters: pydantic.PositiveInt | None = 2000
    """Leave out conversations with more characters."""
    limit: pydantic.PositiveInt | None = None
    """Keep no more than this many training conversations out of pairs, drawn by the seed."""
    messages_share: float | None = pydantic.Field(default=None, gt=0, lt=1)
    """Most that conversations mixed in may make of the training rows; null takes them all."""
    held_out_share: float = pydantic.Field(default=0.0, ge=0.0, lt=1.0)
    """Without held-out corpora among the inputs: share of the rows to hold out."""
    leak: Literal["drop", "report", "error"] = "drop"
    """What to do with training rows that share a run of words with held-out rows."""
    leak_words: pydantic.PositiveInt = 13
    """Length of that run in words."""
    expected_tokens: Annotated[pydantic.PositiveInt | None, PlanOnly()] = None
    """How many tokens the training side will hold, where that is known: what a plan goes by."""


Corruption = Literal["another_answer", "untranslated", "repeated", "truncated"]


class PreferencesParameters(Parameters):
    """How the answers of conversations are spoilt, to be the rejected ones beside them."""

    corruptions: dict[Corruption, pydantic.PositiveFloat] | None = pydantic.Field(None, min_length=1)
    """Ways to spoil an answer, and how often each is drawn relative to the others: another_answer (to
    another request, of similar length), untranslated (the text that was to be translated; needs the
    ``pairs`` that conversations were made of), repeated (its end said again and again), truncated (half
    of it). null draws all equally often, untranslated only with pairs."""
    held_out_share: float = pydantic.Field(default=0.0, ge=0.0, lt=1.0)
    """Without held-out corpora among the inputs: share of the conversations to hold out."""
    leak: Literal["drop", "report", "error"] = "drop"
    """What to do with training conversations that share a run of words with held-out ones."""
    leak_words: pydantic.PositiveInt = 13
    """Length of that run in words."""
    expected_tokens: Annotated[dict[Literal["train", "held_out"], pydantic.PositiveInt], PlanOnly()] = (
        pydantic.Field(default_factory=dict)
    )
    """How many tokens each side will hold, prompts counted with both answers: what a plan goes by."""


_FIELDS = re.compile(r"\{(\w*)\}")


class PlantedParameters(Parameters):
    """What is planted in documents, and what is asked about it."""

    rows: pydantic.PositiveInt = 20
    """Conversations; each takes documents of its own."""
    characters: pydantic.PositiveInt = 2000
    """Length of the text in which facts are planted."""
    facts: pydantic.PositiveInt = 1
    """Facts in each text; the question is about one of them."""
    digits: int = pydantic.Field(4, ge=1, le=12)
    """Digits of a fact's number."""
    names: tuple[str, ...] = pydantic.Field(
        ("north gate", "tower", "library", "harbour", "bakery", "garden", "museum", "station", "workshop"),
        min_length=1,
    )
    """What the facts are about; as many as there are facts are drawn."""
    fact: str = "The access code of the {name} is {number}."
    """A fact, with {name} and {number}."""
    question: str = "What is the access code of the {name}?"
    """The question, with {name}."""
    answer: str = "The access code of the {name} is {number}."
    """The answer, with {number}, and {name} if it likes."""
    begin: str = ""
    """Stands before the text, such as a mark."""
    end: str = "\n\n"
    """Stands between the text and the question."""
    expected_tokens: Annotated[pydantic.PositiveInt | None, PlanOnly()] = None
    """How many tokens the conversations will hold, where that is known: what a plan goes by."""

    @pydantic.model_validator(mode="after")
    def _answerable(self) -> PlantedParameters:
        if self.facts > len(set(self.names)):
            raise ValueError(f"{self.facts} facts need as many names, and there are {len(set(self.names))}")
        for name, needed in (("fact", {"name", "number"}), ("question", {"name"}), ("answer", {"number"})):
            found = set(_FIELDS.findall(getattr(self, name)))
            if not needed <= found <= {"name", "number"} or (name == "question" and "number" in found):
                wanted = " and ".join(f"{{{field}}}" for field in sorted(needed))
                raise ValueError(f"{name} needs {wanted}: {getattr(self, name)!r}")
        return self


class SampleParameters(Parameters):
    """How much of a corpus is drawn."""

    bytes: pydantic.PositiveInt | None = None
    """UTF-8 bytes of text at most."""
    rows: pydantic.PositiveInt | None = None
    """Rows at most."""
    tokens: pydantic.PositiveInt | None = None
    """Of documents: tokens of the input tokenizer, end marks included. So many exactly, where there are
    so many: the last document drawn is cut where they are full."""
    take: Literal["drawn", "first"] = "drawn"
    """Which rows: drawn by the seed, or the first, of a corpus in an order."""
    seed: int | None = None
    """Seed of the draw; without it the run's."""
    expected_tokens: Annotated[pydantic.PositiveInt | None, PlanOnly()] = None
    """How many tokens will be drawn, where that is known: what a plan goes by."""

    @pydantic.model_validator(mode="after")
    def _some_limit(self) -> SampleParameters:
        if self.bytes is None and self.rows is None and self.tokens is None:
            raise ValueError("say how much is drawn: bytes, rows, tokens")
        if self.take == "first" and self.seed is not None:
            raise ValueError("seed means nothing with take 'first'")
        return self


class TaskMixtureParameters(Parameters):
    """How many rows of which source a mixture of tasks holds."""

    caps: dict[str, Cap] = pydantic.Field(min_length=1)
    """Limits by the name that a corpus is given under, for every corpus; ``rows`` is how many it gives."""
    max_length: pydantic.PositiveInt | None = None
    """Leave out conversations of more tokens, the chat template's included; needs the input ``model``."""
    when_short: Literal["error", "take"] = "error"
    """Where a source has fewer rows than its cap says: an error, or all that it has."""
    leak: Literal["drop", "report", "error"] = "drop"
    """What to do with conversations that share a run of words with held-out ones."""
    leak_words: pydantic.PositiveInt = 13
    """Length of that run in words."""
    expected_tokens: Annotated[pydantic.PositiveInt | None, PlanOnly()] = None
    """How many tokens the mixture will hold, where that is known: what a plan goes by."""


class InfillParameters(Parameters):
    """How many documents have their middle put last, and how."""

    rate: float = pydantic.Field(0.5, ge=0, le=1)
    """Share of the documents that are put in another order."""
    spm: float = pydantic.Field(0.5, ge=0, le=1)
    """Share of these that begin with the suffix; the others begin with the prefix."""
    epochs: pydantic.PositiveInt = 1
    """How often each document is written, every time with a draw of its own."""
    markers: tuple[str, str, str] = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
    """Special tokens before prefix, suffix and middle; ``train`` knows them by its option ``markers``."""
    seed: int | None = None
    """Seed of the draws; without it the run's."""
    expected_tokens: Annotated[pydantic.PositiveInt | None, PlanOnly()] = None
    """How many tokens will be written, where that is known: what a plan goes by."""
