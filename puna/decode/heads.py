"""Small trained heads on a frozen model's hidden states: will the target accept, is this token right?

A head is a logit of a probability: residual blocks x + SiLU(Wx + b), any number of them, and a linear
layer of one way (sigmoid) or two (softmax). It learns soft labels by a weighted binary cross-entropy.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from puna.core.errors import PunaError
from puna.core.files import write_aside
from puna.core.seeds import torch_generator

if TYPE_CHECKING:
    from puna.model.llama import Llama

_FORMAT = "1"


@dataclass(frozen=True)
class HeadSpec:
    """``width`` of the hidden states, residual ``blocks``, all one and the same if ``shared``, ``ways``."""

    width: int
    blocks: int = 0
    shared: bool = False
    ways: int = 1

    def __post_init__(self) -> None:
        if self.width < 1 or self.blocks < 0 or self.ways not in (1, 2):
            raise PunaError("no such head", found=asdict(self), expected="a width, blocks, one or two ways")


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] to the same."""
        return hidden + functional.silu(self.linear(hidden))


class Head(nn.Module):
    """A head, in float32; ``about`` (JSON-like) says what it was trained for."""

    def __init__(self, spec: HeadSpec, *, seed: int = 0, about: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.about = dict(about or {})
        own = min(spec.blocks, 1) if spec.shared else spec.blocks
        self.blocks = nn.ModuleList(_Block(spec.width) for _ in range(own))
        self.last = nn.Linear(spec.width, spec.ways)
        generator = torch_generator(seed, "head")
        bound = spec.width**-0.5  # as torch draws linear layers
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-bound, bound, generator=generator)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [...] of hidden states [..., width]."""
        hidden = hidden.float()
        for place in range(self.spec.blocks):
            hidden = self.blocks[0 if self.spec.shared else place](hidden)
        logits: Tensor = self.last(hidden)
        return logits[..., 0] if self.spec.ways == 1 else logits[..., 1] - logits[..., 0]

    @torch.inference_mode()
    def probability(self, hidden: Tensor) -> float:
        """The probability that goes with one hidden state [width]."""
        return float(self(hidden).sigmoid())

    @property
    def parameter_count(self) -> int:
        """Weights that a call reads."""
        own = self.spec.width * (self.spec.width + 1)
        return self.spec.blocks * own + self.spec.ways * (self.spec.width + 1)


@dataclass(frozen=True)
class HeadTraining:
    """``batch`` texts a step; ``negative_weight`` of what is not so; a cosine after a warm-up."""

    epochs: int = 3
    batch: int = 32
    learning_rate: float = 5e-5
    warmup_ratio: float = 0.03
    negative_weight: float = 1.0


def weighted_loss(logits: Tensor, labels: Tensor, negative_weight: float) -> Tensor:
    """Cross-entropy of soft labels in [0, 1], where no weighs more than yes, over the mass of the weights."""
    yes, no = labels, negative_weight * (1 - labels)
    losses = yes * functional.softplus(-logits) + no * functional.softplus(logits)
    return losses.sum() / (yes + no).sum()


def train_head(
    head: Head, features: Tensor, labels: Tensor, texts: Tensor, settings: HeadTraining, *, seed: int
) -> list[float]:
    """Train on ``features`` [n, width] with ``labels`` [n]; ``texts`` [n] says of which text each is.

    A step takes all places of ``settings.batch`` texts. Returns the loss of each step.
    """
    if not len(features):
        raise PunaError("a head has nothing to learn from")
    numbers = torch.unique(texts)
    places = [(texts == number).nonzero()[:, 0] for number in numbers]
    per_epoch = math.ceil(len(places) / settings.batch)
    steps = per_epoch * settings.epochs
    warmup = math.ceil(settings.warmup_ratio * steps)
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    losses: list[float] = []
    head.train()
    with torch.enable_grad():
        for epoch in range(settings.epochs):
            order = torch.randperm(len(places), generator=torch_generator(seed, "head", "order", epoch))
            for start in range(0, len(places), settings.batch):
                chosen = torch.cat([places[int(text)] for text in order[start : start + settings.batch]])
                loss = weighted_loss(head(features[chosen]), labels[chosen], settings.negative_weight)
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * _factor(len(losses), warmup, steps)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(float(loss.detach()))
    head.eval()
    if not all(map(math.isfinite, losses)):
        raise PunaError("the head's loss is not finite", found=losses[-1], fix="lower learning_rate")
    return losses


def _factor(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def binary_divergence(probabilities: Tensor, labels: Tensor, negative_weight: float = 1.0) -> float:
    """Mean KL(label || probability) in nats over soft labels [n] under the loss's weights.

    A label y that weighs yes 1 and no w is, in the eyes of the loss, y / (y + w (1 - y)) with the mass
    y + w (1 - y): the divergence is 0 where the head predicts just that. Without weight it is the plain one.
    """
    labels, found = labels.double(), probabilities.double().clamp(1e-12, 1 - 1e-12)
    mass = labels + negative_weight * (1 - labels)
    seen = labels / mass
    each = torch.special.xlogy(seen, seen / found) + torch.special.xlogy(1 - seen, (1 - seen) / (1 - found))
    return float((mass * each).sum() / mass.sum())


def constant_rate(labels: Tensor, negative_weight: float = 1.0) -> float:
    """The one probability whose weighted loss over ``labels`` [n] is least."""
    yes = float(labels.double().sum())
    no = negative_weight * float((1 - labels.double()).sum())
    return yes / (yes + no)


def unweighted(probabilities: Tensor, negative_weight: float) -> Tensor:
    """The plain probability behind a head trained with ``negative_weight``: its odds times the weight."""
    yes = negative_weight * probabilities
    return yes / (yes + 1 - probabilities)


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve of ``scores`` [n] for bool ``labels`` [n]; ties count half."""
    labels = labels.bool()
    positive = int(labels.sum())
    negative = len(labels) - positive
    if not positive or not negative:
        raise PunaError(
            "an area under a curve needs both kinds of labels", found=f"{positive} yes, {negative} no"
        )
    _, places, counts = torch.unique(scores.double(), return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts.double() - 1) / 2)[places]  # mean rank of equal scores, from 1
    return float((ranks[labels].sum() - positive * (positive + 1) / 2) / (positive * negative))


def save_head(head: Head, path: Path | str) -> Path:
    """Write ``path``, a safetensors file whose header says what the head is."""
    about = {"format": _FORMAT, "spec": json.dumps(asdict(head.spec)), "about": json.dumps(head.about)}
    tensors = {name: tensor.detach().contiguous() for name, tensor in head.state_dict().items()}
    with write_aside(path) as aside:
        save_file(tensors, aside, metadata=about)
    return Path(path)


def load_head(path: Path | str, *, kind: str | None = None) -> Head:
    """Read what :func:`save_head` wrote; a head of another kind (``about["kind"]``) is an error.

    A file that did not change is read once.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise PunaError(
            "there is no head", where=path, fix="train one: puna stage acceptance_head, judge_head"
        )
    head = _read(str(file), file.stat().st_mtime_ns)
    found = head.about.get("kind")
    if kind is not None and found != kind:
        raise PunaError("a head of another kind is needed here", where=path, found=found, expected=kind)
    return head


def check_width(head: Head, model: Llama) -> None:
    """Refuse a head that reads hidden states of another width than the model has."""
    if head.spec.width != model.spec.hidden_size:
        raise PunaError(
            "the head was trained on another model's hidden states",
            where=f"a head of kind {head.about.get('kind')!r}",
            found=f"width {head.spec.width}",
            expected=f"width {model.spec.hidden_size}",
            fix="train one for this model: puna stage acceptance_head, judge_head",
        )


@functools.lru_cache(maxsize=16)
def _read(path: str, changed: int) -> Head:
    try:
        with safe_open(path, framework="pt") as file:
            told = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if told.get("format") != _FORMAT:
            raise ValueError(f"format {told.get('format')}, not {_FORMAT}")
        head = Head(HeadSpec(**json.loads(told["spec"])), about=json.loads(told["about"]))
        head.load_state_dict(tensors, strict=True)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise PunaError("not a head", where=path, found=str(error).splitlines()[0]) from None
    return head.eval().requires_grad_(False)
