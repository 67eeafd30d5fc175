"""S44 Judge Decoding (arXiv 2501.19309): a linear judge keeps right tokens that the target words otherwise.

One linear layer on the target's final hidden state at a token itself says whether that token is
right: having read a mistake, the target shows it. The paper has people mark where wrong answers fail;
here mistakes are made: in real text a word or a number is put in the place of another one of its
kind. Tokens of what was put in are wrong, all tokens of the untouched text are right, and what follows
a mistake is not learnt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
import pydantic
import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.progress import Track
from puna.core.seeds import numpy_generator
from puna.decode.acceptance import batches, read_together
from puna.decode.heads import Head, HeadSpec, HeadTraining, area_under_curve, load_head, train_head
from puna.decode.speculative import DraftSettings, Speculative
from puna.decode.strategy import strategy
from puna.decode.verifiers import TopVerifier, UnionVerifier
from puna.text.encode import Encoded

if TYPE_CHECKING:
    from puna.model.llama import Llama
    from puna.text.tokenizer import Tokenizer

KIND = "judge"
"""What such a head calls itself."""
_WORD = re.compile(r"[^\W\d_]{3,}|\d+")
_LEAST_BEFORE = 5  # words of a text before a mistake


@strategy("judge-decoding")
class JudgeSettings(DraftSettings):
    """S44: drafted tokens also stand where a judge finds them right. Lossy: not the target's own law."""

    head: str
    """The judge, a file that the stage ``judge_head`` made."""
    threshold: float = pydantic.Field(0.5, ge=0)
    """A token stands if the judge is surer than this; from 1 on it is never asked."""
    draft_tokens: int = pydantic.Field(25, ge=1)
    """Tokens of a draft at most."""

    def build(self) -> Speculative:
        """The strategy with these settings."""
        verifier = UnionVerifier(load_head(self.head, kind=KIND), self.threshold)
        return Speculative("judge-decoding", self.drafter(lambda: None), verifier, self.draft_tokens)


@strategy("top-k-speculative")
class TopSettings(DraftSettings):
    """Drafted tokens also stand if they are among the target's likeliest. Lossy; the judge's plain rival."""

    count: int = pydantic.Field(2, ge=1)
    """How many of the target's likeliest tokens are good enough."""
    draft_tokens: int = pydantic.Field(25, ge=1)
    """Tokens of a draft at most."""

    def build(self) -> Speculative:
        """The strategy with these settings."""
        return Speculative(
            "top-k-speculative", self.drafter(lambda: None), TopVerifier(self.count), self.draft_tokens
        )


@dataclass(frozen=True)
class Spoilt:
    """Ids of a text, ``right``, and of the same with one mistake, ``wrong``, at the places ``mistaken``."""

    right: list[int]
    wrong: list[int]
    mistaken: tuple[int, int]
    number: bool

    @property
    def first(self) -> int:
        """The first place at which the two differ: the corrupted token."""
        pairs = zip(self.right, self.wrong, strict=False)
        return next(place for place, (right, wrong) in enumerate(pairs) if right != wrong)


def spoil(texts: Sequence[str], tokenizer: Tokenizer, *, tokens: int, seed: int) -> list[Spoilt]:
    """One mistake in each text that has a word to spoil, cut to ``tokens``; the others are left out.

    A word is replaced by another of the texts of about its length and case, a number by another of as
    many digits.
    """
    generator = numpy_generator(seed, "mistakes")
    words = sorted({word for text in texts for word in _WORD.findall(text) if not word[0].isdigit()})
    found = []
    for text in texts:
        start = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
        right = [*start, *tokenizer.encode(text)][:tokens]
        reach = len(tokenizer.decode(right))  # of the text, what the cut tokens show
        spots = [match for match in _WORD.finditer(text, 0, reach) if match.end() < reach][_LEAST_BEFORE:]
        if not spots:
            continue
        spot = spots[int(generator.integers(len(spots)))]
        other = _other(spot[0], words, generator)
        if other is None:
            continue
        ids = [*start, *tokenizer.encode(text[: spot.start()] + other + text[spot.end() :])][:tokens]
        span = _differing(right, ids, len(start) + len(tokenizer.encode(text[: spot.start()] + other)))
        if span is not None:
            found.append(Spoilt(right, ids, span, spot[0][0].isdigit()))
    return found


def _other(word: str, words: Sequence[str], generator: numpy.random.Generator) -> str | None:
    """Another word of about the same length and case, or another number of as many digits."""
    if word[0].isdigit():
        if len(word) == 1:
            choices = [digit for digit in "0123456789" if digit != word]
            return choices[int(generator.integers(len(choices)))]
        for _ in range(20):
            other = "".join(str(digit) for digit in generator.integers(0, 10, len(word)))
            if other != word:
                return other
        return None
    alike = [
        other
        for other in words
        if abs(len(other) - len(word)) <= 2
        and other.lower() != word.lower()
        and (other.istitle(), other.isupper()) == (word.istitle(), word.isupper())
    ]
    return alike[int(generator.integers(len(alike)))] if alike else None


def _differing(right: Sequence[int], wrong: Sequence[int], end: int) -> tuple[int, int] | None:
    """From the first token that differs to ``end``, where what was put in ends; None if that is nothing."""
    same = next(
        (place for place, (a, b) in enumerate(zip(right, wrong, strict=False)) if a != b),
        min(len(right), len(wrong)),
    )
    return (same, max(end, same + 1)) if same < min(len(right), len(wrong)) else None


@dataclass(frozen=True)
class Judged:
    """States [n, hidden] at tokens, and one token earlier; labels [n] (1 right); whose text; which matter.

    ``spot`` marks the corrupted token of each text and the right one that stands in its place.
    """

    at: Tensor
    before: Tensor
    labels: Tensor
    texts: Tensor
    spot: Tensor


@torch.inference_mode()
def collect(model: Llama, spoilt: Sequence[Spoilt], *, batch_tokens: int = 2048) -> Judged:
    """What a judge learns from: states of the model over both versions of every text."""
    rows = [ids for pair in spoilt for ids in (pair.right, pair.wrong)]
    at: list[Tensor] = []
    before: list[Tensor] = []
    labels: list[Tensor] = []
    texts: list[Tensor] = []
    spot: list[Tensor] = []
    with Track("reading", sum(map(len, rows)), "tokens") as track:
        for batch in batches([Encoded(ids, [True] * len(ids), "") for ids in rows], batch_tokens):
            for number, states in zip(batch, read_together(model, [rows[n] for n in batch]), strict=True):
                pair, wrong = spoilt[number // 2], bool(number % 2)
                start, end = pair.mistaken if wrong else (1, len(states))
                places = torch.arange(start, min(end, len(states)))
                at.append(states[places].float().cpu())
                before.append(states[places - 1].float().cpu())
                labels.append(torch.full((len(places),), 0.0 if wrong else 1.0))
                texts.append(torch.full((len(places),), number // 2))
                spot.append(places == pair.first)
                track.advance(len(rows[number]))
    parts = (torch.cat(part) for part in (at, before, labels, texts, spot))
    return Judged(*parts)


def train_judge_head(
    model: Llama,
    spoilt: Sequence[Spoilt],
    training: HeadTraining,
    *,
    held_out_share: float = 0.25,
    balance: bool = True,
    batch_tokens: int = 2048,
    seed: int = 0,
) -> tuple[Head, dict[str, float], list[float]]:
    """Collect, train and judge the judge; returns it with its figures and the loss of each step.

    ``auc`` is over all held-out tokens at which something was learnt: right ones against corrupted ones;
    ``auc.before`` that of a probe on the states one token earlier; ``auc.matched`` compares the corrupted
    tokens with those they stand for, ``auc.words`` and ``auc.numbers`` with all right ones by kind.
    """
    if len(spoilt) < 8:
        raise PunaError(
            "too few texts to learn from", found=f"{len(spoilt)} with a mistake", expected="8 or more"
        )
    data = collect(model, spoilt, batch_tokens=batch_tokens)
    order = numpy_generator(seed, "held out").permutation(len(spoilt))
    held_texts = torch.tensor(order[: max(1, round(held_out_share * len(spoilt)))].copy())
    held = torch.isin(data.texts, held_texts)
    learnt = ~held
    if balance:  # both kinds of tokens weigh alike
        right = float(data.labels[learnt].sum())
        training = HeadTraining(
            training.epochs,
            training.batch,
            training.learning_rate,
            training.warmup_ratio,
            right / (float(learnt.sum()) - right),
        )
    scores: dict[str, Tensor] = {}
    heads: dict[str, tuple[Head, list[float]]] = {}
    for name, states in (("at", data.at), ("before", data.before)):
        head = Head(HeadSpec(model.spec.hidden_size), seed=seed, about={"kind": KIND, "place": name})
        losses = train_head(
            head, states[learnt], data.labels[learnt], data.texts[learnt], training, seed=seed
        )
        heads[name] = (head, losses)
        with torch.inference_mode():
            scores[name] = head(states[held])
    labels, spot = data.labels[held] == 1, data.spot[held]
    counted = labels | spot  # of mistakes the first token alone
    numbers = torch.tensor([spoilt[int(text)].number for text in data.texts[held]])
    figures = {
        "texts": float(len(spoilt)),
        "tokens": float(learnt.sum()),
        "tokens.held_out": float(held.sum()),
        "auc": area_under_curve(scores["at"][counted], labels[counted]),
        "auc.before": area_under_curve(scores["before"][counted], labels[counted]),
        "auc.matched": area_under_curve(scores["at"][spot], labels[spot]),
        "recall": float((scores["at"][labels] > 0).float().mean()),
        "false_accepts": float((scores["at"][spot & ~labels] > 0).float().mean()),
        "loss.first": heads["at"][1][0],
        "loss.last": heads["at"][1][-1],
    }
    for name, kind in (("words", ~numbers), ("numbers", numbers)):
        chosen = labels | (spot & kind)
        if bool((~labels[chosen]).any()):
            figures[f"auc.{name}"] = area_under_curve(scores["at"][chosen], labels[chosen])
    return heads["at"][0], figures, heads["at"][1]
