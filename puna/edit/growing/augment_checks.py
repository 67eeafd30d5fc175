"""The work of ``augment_checks`` and ``feature_collapse``: what augmenting a model changed, or not (S82)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from puna.core.stage import Context, Outcome
from puna.edit.calibration import calibration_batches
from puna.evaluate import collapse
from puna.model.stepper import Read
from puna.model.steppers import make_stepper
from puna.text import pretrained
from puna.text.packing import Batch
from puna.train.objectives import linear_cross_entropy

if TYPE_CHECKING:
    from puna.edit.growing.augment_stages import AugmentChecks, FeatureCollapse, Text
    from puna.model.llama import Llama


def run(context: Context, parameters: AugmentChecks) -> Outcome:
    """The stage ``augment_checks``."""
    plain, richer = (
        pretrained.load_plain(context.inputs[name], dtype="float32").eval() for name in ("model", "augmented")
    )
    batches = _read(plain, context, parameters)
    counts = [sum(weight.numel() for weight in model.parameters()) for model in (plain, richer)]
    metrics = {"added": float(counts[1] - counts[0]), "added_by_formula": added_by_formula(richer)}
    metrics |= _compared([_logits(model, batches) for model in (plain, richer)], "logits")
    metrics |= _compared([_in_engine(model, batches) for model in (plain, richer)], "engine")
    metrics["engine.native"] = float(make_stepper(richer, cache_tokens=16).name == "native")
    return Outcome({}, metrics | gradients(richer, batches))


def added_by_formula(model: Llama) -> float:
    """2 d s weights for each shortcut of width s, 2 n w for each series of n terms over w channels."""
    hidden = model.spec.hidden_size
    return float(
        sum(2 * hidden * block.shortcut + 2 * block.series * block.width for block in model.spec.blocks)
    )


def gradients(model: Llama, batches: Sequence[Batch]) -> dict[str, float]:
    """Of the mean loss of a token: the least norm over the layers of a shortcut's second matrix's gradient,
    and of the second scales' where there are two terms.
    """
    model.zero_grad()
    targets = sum(batch.targets for batch in batches)
    for batch in batches:
        hidden = model.hidden(batch.input_ids, batch.positions, batch.segments)
        loss = linear_cross_entropy(hidden, model.head_weight, batch.labels).total / targets
        loss.backward()  # type: ignore[no-untyped-call]
    norms: dict[str, list[float]] = {}
    for layer, block in zip(cast(Any, model.model.layers), model.spec.blocks, strict=True):
        if block.shortcut:
            norms.setdefault("gradient.shortcut", []).append(
                float(layer.self_attn.expand_proj.weight.grad.norm())
            )
        if block.series > 1:
            of_scales = layer.mlp.act_fn.weight.grad.view(-1, block.series)
            norms.setdefault("gradient.series", []).append(float(of_scales[:, 1].norm()))
    model.zero_grad()
    return {name: min(found) for name, found in norms.items()}


def _logits(model: Llama, batches: Sequence[Batch]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(batch.input_ids, batch.positions, batch.segments) for batch in batches]


def _in_engine(model: Llama, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Logits of each row as one text, by the kernels that the engine takes."""
    length = max(batch.input_ids.shape[1] for batch in batches)
    stepper = make_stepper(model, cache_tokens=length)
    found = []
    for ids in (row.tolist() for batch in batches for row in batch.input_ids):
        sequence = stepper.sequence()
        found.append(stepper.logits(stepper.step([Read(sequence, ids, outputs=len(ids))])[0]))
        sequence.free()
    return found


def _compared(both: Sequence[list[torch.Tensor]], name: str) -> dict[str, float]:
    """How many logits differ, and by how much the most."""
    pairs = list(zip(*both, strict=True))
    differ = sum(int((one != other).sum()) for one, other in pairs)
    largest = max(float((one - other).abs().max()) for one, other in pairs)
    return {f"{name}.differ": float(differ), f"{name}.largest": largest}


def run_collapse(context: Context, parameters: FeatureCollapse) -> Outcome:
    """The stage ``feature_collapse``."""
    found: dict[str, collapse.Collapse] = {}
    for name, source in context.inputs["models"].items():
        model = pretrained.load_plain(source, dtype="float32").eval()
        batches = _read(model, context, parameters)
        found[name] = collapse.measure(model, batches, variance=parameters.variance)
    metrics: dict[str, float] = {}
    for name, one in found.items():
        for kind, numbers in (("dimensions", one.dimensions), ("distance", one.distance)):
            metrics |= {f"{kind}.{name}.deep": one.deep(numbers), f"{kind}.{name}.last": float(numbers[-1])}
    share = f"{parameters.variance:.0%}"
    context.report["tables"] = [
        {
            "title": "Hidden states in the last third of the layers, first tokens left out",
            "columns": ["model", "layers", "tokens", f"dimensions for {share} of the variance", "d_M / norm"],
            "rows": [
                [
                    *(name, str(len(one.dimensions)), str(one.tokens)),
                    *(f"{one.deep(one.dimensions):.1f}", f"{one.deep(one.distance):.3f}"),
                ]
                for name, one in found.items()
            ],
        }
    ]
    context.report["curves"] = [
        _curve(f"Dimensions for {share} of the variance", {n: one.dimensions for n, one in found.items()}),
        _curve("Distance from the mean over the norm", {n: one.distance for n, one in found.items()}),
    ]
    return Outcome({}, metrics)


def _curve(title: str, numbers: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """By depth, so that models of fewer layers lie beside those of more."""
    series = [
        {
            "name": name,
            "x": [(layer + 1) / len(found) for layer in range(len(found))],
            "y": [float(number) for number in found],
        }
        for name, found in numbers.items()
    ]
    return {"title": title, "x": "depth", "y": "", "series": series}


def _read(model: Llama, context: Context, parameters: Text) -> list[Batch]:
    return calibration_batches(
        model,
        context.inputs["corpus"],
        rows=parameters.rows,
        length=parameters.length,
        batch_rows=parameters.batch_rows,
        seed=context.seed,
    )
