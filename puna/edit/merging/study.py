"""What merges keep of the models that went into them (S56), and what DARE promises of a single delta.

Each variant is merged into memory, scored on every corpus and forgotten. What is kept of an expert's skill is
the share of its gain over the base on its own corpus: 1 is the expert, 0 the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from puna.core.errors import PunaError
from puna.data.corpus import Corpus
from puna.edit.merging import sparsify
from puna.edit.merging.delta import DeltaSet
from puna.edit.merging.plan import Plan
from puna.model.llama import Llama
from puna.model.weights import set_parameter
from puna.text.encode import encode_rows
from puna.text.packing import IGNORED, Row, collate, group_of, pack, usual_mode
from puna.text.stored_weights import Weights, parts_of

if TYPE_CHECKING:
    from puna.text.tokenizer import Tokenizer

_LENGTH = 512  # tokens of a packed row
Z = 3.0
"""Standard errors within which a mean of draws is to lie."""


@dataclass(frozen=True)
class Questions:
    """Packed rows of a corpus, and the bytes of its documents' text (0 for conversations)."""

    rows: Sequence[Row]
    bytes: int

    @classmethod
    def read(cls, path: str | Path, model: Llama, count: int, length: int | None = None) -> Questions:
        """The first ``count`` rows of messages or documents, cut at ``length`` tokens if that is given."""
        corpus = Corpus.open(Path(path))
        if corpus.kind not in ("messages", "documents"):
            raise PunaError("merges are scored on messages or documents", where=path, found=corpus.kind)
        rows = [row for _, row in zip(range(count), corpus.rows(), strict=False)]
        tokenizer: Tokenizer | None = model.tokenizer
        assert tokenizer is not None  # a corpus was made for it
        encoded = encode_rows(rows, corpus.kind, tokenizer, model.template)
        size = sum(len(row["text"].encode()) for row in rows) if corpus.kind == "documents" else 0
        longest = max(map(len, encoded), default=0)
        mode, group = usual_mode(corpus.kind), group_of(corpus.kind)
        packed = pack(encoded, length or max(_LENGTH, longest), mode=mode, group=group)
        return cls(list(packed), size)

    @torch.no_grad()
    def score(self, model: Llama) -> dict[str, float]:
        """``loss`` (nats a target token); of documents ``bpb``, of conversations ``exact``.

        That is the share of answers of which every token is the likeliest after what stands before it, as
        a greedy answer would have it.
        """
        nats = targets = 0.0
        answers: list[bool] = []
        for row in self.rows:
            batch = collate([row])
            hidden = model.hidden(batch.input_ids, batch.positions, batch.segments)[0]
            labels = batch.labels[0]
            asked = labels != IGNORED
            logits = model.logits(hidden[asked])  # [targets, vocab]
            nats += float(functional.cross_entropy(logits, labels[asked], reduction="sum"))
            targets += int(asked.sum())
            right, segments = logits.argmax(-1) == labels[asked], batch.segments[0][asked]
            answers += [bool(right[segments == segment].all()) for segment in set(segments.tolist())]
        found = {"loss": nats / targets}
        if self.bytes:
            return {**found, "bpb": nats / math.log(2) / self.bytes}
        return {**found, "exact": sum(answers) / len(answers)}


def fill(model: Llama, plan: Plan) -> None:
    """Make the merged weights those of ``model``, a decoder of the plan's spec without storage or with."""
    for name, shape in plan.shapes.items():
        set_parameter(model, name, torch.empty(shape, dtype=model.dtype))
    places = dict.fromkeys(plan.shapes, 0)
    weights: Mapping[str, nn.Parameter] = dict(model.named_parameters())
    with torch.no_grad():
        for name, part in plan.merged():
            start = places[name]
            weights[name].view(-1)[start : start + part.numel()] = part.to(model.dtype)
            places[name] += part.numel()


def kept(scores: Mapping[str, Mapping[str, Mapping[str, float]]], experts: Sequence[str]) -> dict[str, float]:
    """Of ``scores[variant][corpus]`` the metrics ``kept.VARIANT.EXPERT``, by each expert's corpus.

    The share of the expert's gain in loss over the base that a variant has; base and experts are in it too.
    """
    found = {}
    for expert in experts:
        before, after = scores["base"][expert]["loss"], scores[expert][expert]["loss"]
        if not after < before:
            raise PunaError(
                "the expert is not better than the base on its own corpus",
                where=expert,
                found=f"loss {after:.4f}, base {before:.4f}",
                fix="train it longer, or give it the corpus of what it learnt",
            )
        for variant, corpora in scores.items():
            if expert in corpora:
                found[f"kept.{variant}.{expert}"] = (before - corpora[expert]["loss"]) / (before - after)
    return found


def delta_metrics(delta: DeltaSet) -> dict[str, float]:
    """How large a delta is: quantiles of its magnitudes, share of zeros, and its norm beside the base's.

    Quantiles are exact, over all elements of the base's tensors, each once.
    """
    names = list(delta.shapes)
    count = sum(torch.Size(delta.shapes[name]).numel() for name in names)
    squares = base_squares = 0.0
    zeros = 0
    largest = 0.0
    for name in names:
        for place in parts_of(delta.shapes[name]):
            part, base = delta.part(name, *place), delta.base.part(name, *place)
            squares += float(part.double().square().sum())
            base_squares += float(base.double().square().sum())
            zeros += int((part == 0).sum())
            largest = max(largest, float(part.abs().max()))

    def passes() -> Iterator[Tensor]:
        return (delta.part(name, *place) for name in names for place in parts_of(delta.shapes[name]))

    found = {"parameters": float(count), "zeros": zeros / count, "largest": largest}
    found["relative"] = math.sqrt(squares / base_squares) if base_squares else 0.0
    for share in (0.5, 0.9, 0.99):
        rank = max(1, count - math.ceil(share * count) + 1)
        found[f"quantile.{round(100 * share)}"] = sparsify.magnitude_of_rank(passes, rank, count)
    return found


def dare_checks(
    delta: DeltaSet, names: Sequence[str], *, density: float, draws: int, seed: int
) -> dict[str, float]:
    """The mean of many draws of DARE, on up to 65,536 changed elements of each of some tensors.

    ``within`` is the share of elements whose mean over ``draws`` lies within 3 standard errors of the delta
    (a normal law has 0.9973), ``bias_z`` how far their sum lies from the delta's in standard errors,
    and ``kept_z`` the same of how many elements were kept.
    """
    elements = inside = kept_count = 0
    shift = variance = 0.0
    for name in names:
        value = delta.tensor(name).reshape(-1)
        value = value[value != 0][: 1 << 16]
        total = torch.zeros(value.numel(), dtype=torch.float64)
        for draw in range(draws):
            drawn = sparsify.draws(seed, f"draw {draw}", name, 0, value.numel())
            dropped = sparsify.drop(value, density, drawn)
            total += dropped.double()
            kept_count += int((dropped != 0).sum())
        error = value.double().abs() * math.sqrt((1 - density) / density / draws)
        away = total / draws - value.double()
        elements += value.numel()
        inside += int((away.abs() <= Z * error).sum())
        shift += float((away * value.sign()).sum())
        variance += float(error.square().sum())
    if not elements:
        raise PunaError("the delta is zero on these tensors", where=delta.label, found=list(names))
    trials = elements * draws
    spread = math.sqrt(trials * density * (1 - density))
    return {
        "elements": float(elements),
        "within": inside / elements,
        "bias_z": abs(shift) / math.sqrt(variance),
        "kept_z": abs(kept_count - trials * density) / spread,
    }


def weights_that_differ(plan: Plan, model: Weights) -> int:
    """How many weights of a merge are not the very bits of ``model``'s, read as float32."""
    differ, places = 0, dict.fromkeys(plan.shapes, 0)
    for name, part in plan.merged():
        start = places[name]
        own = model.part(name, start, start + part.numel())
        differ += int((part.view(torch.int32) != own.view(torch.int32)).sum())
        places[name] += part.numel()
    return differ
