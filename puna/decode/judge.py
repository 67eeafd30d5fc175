"""S44 Judge Decoding (arXiv 2501.19309): a linear judge keeps right tokens that the target words otherwise.

One linear layer on the target's final hidden state at a token itself says whether that token is
right: having read a mistake, the target shows it. The paper has people mark where wrong answers fail;
here mistakes are made (``mistakes.py``). Tokens of a mistake are wrong, all tokens of the untouched
text are right, and what follows a mistake is not learnt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import pydantic
import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.progress import Track
from puna.core.seeds import numpy_generator
from puna.decode.acceptance import batches, read_together
from puna.decode.heads import (
    Head,
    HeadSpec,
    HeadTraining,
    area_under_curve,
    check_width,
    load_head,
    train_head,
)
from puna.decode.mistakes import Spoilt
from puna.decode.request import TARGET
from puna.decode.speculative import DraftSettings, Speculative
from puna.decode.strategy import strategy
from puna.decode.verifiers import TopVerifier, UnionVerifier

if TYPE_CHECKING:
    from puna.decode.protocols import Proposer
    from puna.decode.request import Running
    from puna.model.llama import Llama

KIND = "judge"
"""What such a head calls itself."""


@strategy("judge-decoding")
class JudgeSettings(DraftSettings):
    """S44: drafted tokens also stand where a judge finds them right. Lossy: not the target's own law."""

    files: ClassVar[Mapping[str, Callable[[str], object]]] = {"head": partial(load_head, kind=KIND)}
    head: str
    """The judge, a file that the stage ``judge_head`` made."""
    threshold: float = pydantic.Field(0.5, ge=0)
    """A token stands if the judge is surer than this; from 1 on it is never asked."""
    draft_tokens: int = pydantic.Field(25, ge=1)
    """Tokens of a draft at most."""

    def build(self) -> Speculative:
        """The strategy with these settings."""
        head, make = load_head(self.head, kind=KIND), self.drafter()

        def propose_for(request: Running) -> Proposer:
            check_width(head, request.model(TARGET))
            return make(request)

        verifier = UnionVerifier(head, self.threshold)
        return Speculative("judge-decoding", propose_for, verifier, self.draft_tokens)


@strategy("top-k-speculative")
class TopSettings(DraftSettings):
    """Drafted tokens also stand if they are among the target's likeliest. Lossy; the judge's plain rival."""

    count: int = pydantic.Field(2, ge=1)
    """How many of the target's likeliest tokens are good enough."""
    draft_tokens: int = pydantic.Field(25, ge=1)
    """Tokens of a draft at most."""

    def build(self) -> Speculative:
        """The strategy with these settings."""
        make, verifier = self.drafter(), TopVerifier(self.count)
        return Speculative("top-k-speculative", make, verifier, self.draft_tokens)


@dataclass(frozen=True)
class Judged:
    """What is learnt at tokens of both versions of texts, each tensor over the tokens.

    ``at`` and ``before`` are states [n, hidden] at a token and one token earlier, ``labels`` 1 at right
    ones, ``texts`` whose text it is. ``spot`` marks the first token of a mistake, and the right one that
    stands in its place.
    """

    at: Tensor
    before: Tensor
    labels: Tensor
    texts: Tensor
    spot: Tensor


@torch.inference_mode()
def collect(model: Llama, spoilt: Sequence[Spoilt], *, batch_tokens: int = 2048) -> Judged:
    """States of the model at the right tokens of every text and at the mistaken ones of its other version."""
    rows = [ids for pair in spoilt for ids in (pair.right, pair.wrong[: pair.mistaken[1]])]
    parts: list[tuple[Tensor, ...]] = []
    with Track("reading", sum(map(len, rows)), "tokens") as track:
        for batch in batches(rows, batch_tokens):
            read = read_together(model, [rows[number] for number in batch])
            for number, states in zip(batch, read, strict=True):
                pair, mistaken = spoilt[number // 2], bool(number % 2)
                start, end = pair.mistaken[0] if mistaken else max(pair.start, 1), len(states)
                places = torch.arange(start, end)
                label, text = (torch.full((len(places),), value) for value in (1.0 - mistaken, number // 2))
                at, before = (states[where].float().cpu() for where in (places, places - 1))
                parts.append((at, before, label, text, places == pair.mistaken[0]))
                track.advance(len(rows[number]))
    return Judged(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


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

    ``auc`` compares the held-out corrupted tokens (the first of each mistake) with all right ones,
    ``auc.words`` and ``auc.numbers`` by kind, ``auc.matched`` with those they stand for. ``auc.before`` is
    that of a second head, trained alike on the states one token earlier. ``auc.in.NAME`` and
    ``auc.before.in.NAME`` are of the texts from that source alone.
    """
    if len(spoilt) < 8:
        raise PunaError(
            "too few texts to learn from", found=f"{len(spoilt)} with a mistake", expected="8 or more"
        )
    data = collect(model, spoilt, batch_tokens=batch_tokens)
    order = numpy_generator(seed, "held out").permutation(len(spoilt))
    held = torch.isin(data.texts, torch.from_numpy(order[: max(1, round(held_out_share * len(spoilt)))]))
    learnt = ~held
    if balance:  # both kinds of tokens weigh alike
        mass = float(data.labels[learnt].sum())
        training = dataclasses.replace(training, negative_weight=mass / (float(learnt.sum()) - mass))
    made: dict[str, tuple[Head, list[float], Tensor]] = {}
    for name, states in (("at", data.at), ("before", data.before)):
        head = Head(HeadSpec(model.spec.hidden_size), seed=seed, about={"kind": KIND, "place": name})
        known = (states[learnt], data.labels[learnt], data.texts[learnt])
        losses = train_head(head, *known, training, seed=seed)
        with torch.inference_mode():
            made[name] = (head, losses, head(states[held]))
    head, losses, scores = made["at"]
    numbers = torch.tensor([pair.number for pair in spoilt])[data.texts[held]]
    right, spot = data.labels[held] == 1, data.spot[held]
    seen = Seen(scores, made["before"][2], right, spot & ~right)
    figures = {
        "texts": float(len(spoilt)),
        "tokens": float(learnt.sum()),
        "mistakes": float((data.spot[learnt] & (data.labels[learnt] == 0)).sum()),
        "tokens.held_out": float(held.sum()),
        "loss.first": losses[0],
        "loss.last": losses[-1],
        "auc.matched": area_under_curve(scores[spot], right[spot]),
        "kept.right": float((scores[right] > 0).float().mean()),
        "kept.wrong": float((scores[seen.corrupted] > 0).float().mean()),
        **seen.areas(),
        **seen.areas(".words", right | ~numbers),
        **seen.areas(".numbers", right | numbers),
    }
    sources = [pair.source for pair in spoilt]
    for source in sorted(set(sources) - {""}):
        mine = torch.tensor([other == source for other in sources])[data.texts[held]]
        figures |= seen.areas(f".in.{source}", mine)
    return head, figures, losses


@dataclass(frozen=True)
class Seen:
    """Scores [n] of held-out tokens, those ``earlier`` of the head one token before, and what they are."""

    scores: Tensor
    earlier: Tensor
    right: Tensor
    corrupted: Tensor

    def areas(self, name: str = "", of: Tensor | None = None) -> dict[str, float]:
        """Areas under the curve over the tokens ``of``; of a mistake its first one alone counts.

        Nothing where one kind of tokens is missing.
        """
        counted = (self.right | self.corrupted) & (of if of is not None else torch.ones_like(self.right))
        right = self.right[counted]
        if bool(right.all()) or not bool(right.any()):
            return {}
        return {
            f"auc{name}": area_under_curve(self.scores[counted], right),
            f"auc.before{name}": area_under_curve(self.earlier[counted], right),
        }
