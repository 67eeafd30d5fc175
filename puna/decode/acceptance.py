"""S83 SpecDec++ (arXiv 2405.19715): a trained head decides when a draft is long enough.

The head reads the draft model's final hidden state at a drafted token and says how likely the target
accepts it, given that it accepted all before. Data: texts X that the target wrote; one pass of the
draft over each, teacher-forced, draws a token Y at every place; its label is min(1, p(Y) / q(Y)). The
head then sees the draft's states over a text in which a place holds X with the probability ``mix`` and
Y else, and learns at the places of Y. Rejections weigh more, and the loss is divided by the mass of
the weights. The draft is frozen.

Simplified: states and labels are made once, before training, so that every epoch sees the same mix.
The released head applies one residual block three times (``shared``); the paper's are three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import pydantic
import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.progress import Track
from puna.core.seeds import torch_generator
from puna.decode.drafters import require_same_words
from puna.decode.heads import (
    Head,
    HeadSpec,
    HeadTraining,
    area_under_curve,
    binary_divergence,
    check_width,
    constant_rate,
    load_head,
    train_head,
    unweighted,
)
from puna.decode.sampling import Sampling, make_law
from puna.decode.short_head import short_head
from puna.decode.speculative import DraftSettings, Speculative
from puna.decode.stoppers import HeadStopper
from puna.decode.strategy import strategy
from puna.decode.verifiers import ExactVerifier

if TYPE_CHECKING:
    from puna.decode.protocols import Proposer
    from puna.decode.request import Running
    from puna.model.llama import Llama
    from puna.text.encode import Encoded

KIND = "acceptance"
"""What such a head calls itself."""
_POSITIONS = 64  # whose distributions over the vocabulary exist at a time


@strategy("specdec-pp")
class AdaptiveSettings(DraftSettings):
    """S83: speculative sampling whose drafts end where a trained head expects a rejection."""

    files: ClassVar[Mapping[str, Callable[[str], object]]] = {"head": partial(load_head, kind=KIND)}
    head: str
    """The head, a file that the stage ``acceptance_head`` made."""
    threshold: float = pydantic.Field(0.3, ge=0, le=1)
    """A draft ends once the chance that something in it was rejected exceeds this."""
    least: int = pydantic.Field(2, ge=1)
    """Tokens of a draft at least."""
    draft_tokens: int = pydantic.Field(20, ge=1)
    """Tokens of a draft at most."""

    def build(self) -> Speculative:
        """The strategy with these settings."""
        head = load_head(self.head, kind=KIND)
        make = self.drafter(lambda: HeadStopper(head, self.threshold, self.least))

        def propose_for(request: Running) -> Proposer:
            check_width(head, request.model(self.draft))
            return make(request)

        return Speculative("specdec-pp", propose_for, ExactVerifier(), self.draft_tokens)


@dataclass(frozen=True)
class Places:
    """What a head learns from: ``features`` [n, width], ``labels`` [n] in [0, 1], and whose ``texts`` [n]."""

    features: Tensor
    labels: Tensor
    texts: Tensor

    def of(self, chosen: Tensor) -> Places:
        """Those at the places where ``chosen`` [n] is True."""
        return Places(self.features[chosen], self.labels[chosen], self.texts[chosen])


def batches(texts: Sequence[Sized], tokens: int) -> Iterator[list[int]]:
    """Numbers of texts that are read together, of similar length, padded to at most ``tokens`` positions."""
    order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
    start = 0
    while start < len(order):
        many = max(1, tokens // len(texts[order[start]]))
        yield order[start : start + many]
        start += many


def read_together(model: Llama, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Final hidden states [tokens, hidden] of each of several texts."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    segments = torch.full_like(ids, -1)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        segments[number, : len(row)] = 0
    states = model.hidden(ids.to(model.device), segments=segments.to(model.device))
    return [states[number, : len(row)] for number, row in enumerate(rows)]


def distributions(logits: Tensor, sampling: Sampling) -> Tensor:
    """The laws [n, vocab] that ``sampling`` makes of logits [n, vocab]; float32 where nothing is filtered."""
    filtered = sampling.top_k or sampling.top_p < 1 or sampling.min_p
    if sampling.temperature and not filtered:
        return (logits / sampling.temperature).softmax(-1)
    return torch.stack([make_law(row, sampling).probabilities for row in logits])


@torch.inference_mode()
def collect(
    target: Llama,
    draft: Llama,
    texts: Sequence[Encoded],
    sampling: Sampling,
    *,
    mix: float = 0.15,
    draft_vocabulary: int | None = None,
    batch_tokens: int = 2048,
    seed: int = 0,
) -> Places:
    """Hidden states of the draft at tokens it drew, with the chance that the target accepts them.

    ``texts`` are the target's own; their trained places are what it wrote. ``draft_vocabulary`` is that of
    the strategy.
    """
    made = draft.logits if draft_vocabulary is None else short_head(draft, draft_vocabulary).logits
    generator = torch_generator(seed, "acceptance")
    features: list[Tensor] = []
    labels: list[Tensor] = []
    numbers: list[Tensor] = []
    with Track("reading", sum(map(len, texts)), "tokens") as track:
        for batch in batches(texts, batch_tokens):
            rows = [texts[number].ids for number in batch]
            states = zip(read_together(target, rows), read_together(draft, rows), strict=True)
            mixed: list[list[int]] = []
            drawn_at: list[Tensor] = []
            for number, (ours, theirs) in zip(batch, states, strict=True):
                places = torch.tensor(texts[number].trained).nonzero()[:, 0]
                places = places[places > 0]
                behind = ours[places - 1], theirs[places - 1]
                drawn, chances = _draw(target.logits, made, *behind, sampling, generator)
                keep = torch.rand(len(places), generator=generator) >= mix
                ids = torch.tensor(texts[number].ids)
                ids[places[keep]] = drawn[keep]
                mixed.append(ids.tolist())
                drawn_at.append(places[keep])
                labels.append(chances[keep])
                numbers.append(torch.full((int(keep.sum()),), number))
            for seen, places in zip(read_together(draft, mixed), drawn_at, strict=True):
                features.append(seen[places].float().cpu())
            track.advance(sum(map(len, rows)))
    return Places(torch.cat(features), torch.cat(labels), torch.cat(numbers))


def _draw(
    target: Callable[[Tensor], Tensor],
    draft: Callable[[Tensor], Tensor],
    ours: Tensor,
    theirs: Tensor,
    sampling: Sampling,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Tokens [n] drawn from the draft's laws behind its states ``theirs`` [n, hidden], and min(1, p/q).

    ``target`` and ``draft`` make logits [n, vocab] of hidden states.
    """
    drawn: list[Tensor] = []
    chances: list[Tensor] = []
    for start in range(0, len(ours), _POSITIONS):
        part = slice(start, start + _POSITIONS)
        wanted = distributions(target(ours[part]).cpu(), sampling)
        given = distributions(draft(theirs[part]).cpu(), sampling)
        tokens = torch.multinomial(given, 1, generator=generator)
        ratio = wanted.gather(1, tokens) / given.gather(1, tokens)
        drawn.append(tokens[:, 0])
        chances.append(ratio[:, 0].clamp(max=1.0).float())
    if not drawn:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    return torch.cat(drawn), torch.cat(chances)


def split(places: Places, share: float, *, seed: int) -> tuple[Places, Places]:
    """Training places, and those of a drawn ``share`` of the texts, which are held out; both have some."""
    numbers = torch.unique(places.texts)
    held = round(share * len(numbers))
    if not 0 < held < len(numbers):
        raise PunaError(
            "too few texts to hold some out",
            found=f"{len(numbers)} texts, a share of {share:g}",
            fix="give more texts",
        )
    order = torch.randperm(len(numbers), generator=torch_generator(seed, "held out"))
    chosen = torch.isin(places.texts, numbers[order[:held]])
    return places.of(~chosen), places.of(chosen)


def train_acceptance_head(
    target: Llama,
    draft: Llama,
    texts: Sequence[Encoded],
    sampling: Sampling,
    training: HeadTraining,
    *,
    blocks: int = 3,
    shared: bool = False,
    mix: float = 0.15,
    draft_vocabulary: int | None = None,
    held_out_share: float = 0.2,
    batch_tokens: int = 2048,
    seed: int = 0,
) -> tuple[Head, dict[str, float], list[float]]:
    """Collect, train and judge a head; returns it with its figures and the loss of each step.

    ``kl`` is the held-out binary divergence under the loss's weights, ``kl.constant`` that of the best
    constant rate of the training places; ``plain_kl`` the same without weights, the head's odds
    multiplied by the weight.
    """
    require_same_words(target, draft, "draft")
    places = collect(
        target,
        draft,
        texts,
        sampling,
        mix=mix,
        draft_vocabulary=draft_vocabulary,
        batch_tokens=batch_tokens,
        seed=seed,
    )
    learnt, held = split(places, held_out_share, seed=seed)
    about = {"kind": KIND, "temperature": sampling.temperature, "negative_weight": training.negative_weight}
    head = Head(HeadSpec(draft.spec.hidden_size, blocks, shared, ways=2), seed=seed, about=about)
    losses = train_head(head, learnt.features, learnt.labels, learnt.texts, training, seed=seed)
    with torch.inference_mode():
        found = head(held.features).sigmoid()
    weight = training.negative_weight
    figures = {
        "texts": float(len(texts)),
        "places": float(len(learnt.labels)),
        "places.held_out": float(len(held.labels)),
        "acceptance": float(held.labels.mean()),
        "loss.first": losses[0],
        "loss.last": losses[-1],
        "kl": binary_divergence(found, held.labels, weight),
        "kl.constant": _constant_divergence(learnt, held, weight),
        "plain_kl": binary_divergence(unweighted(found, weight), held.labels),
        "plain_kl.constant": _constant_divergence(learnt, held, 1.0),
        "auc": area_under_curve(found, held.labels > 0.5),
        "parameters": float(head.parameter_count),
    }
    return head, figures, losses


def _constant_divergence(learnt: Places, held: Places, weight: float) -> float:
    """The divergence of the best constant rate of ``learnt`` on ``held``."""
    rate = constant_rate(learnt.labels, weight)
    return binary_divergence(torch.full_like(held.labels, rate), held.labels, weight)
