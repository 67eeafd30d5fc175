"""What labellers promise, measured on real rows: S14's and S75's lines that need no training.

* ``transformers.M``: largest difference of the logits from transformers' class, for a model it opens.
* ``batched.M``: largest difference of a row's logits in a padded batch from those it has alone.
* ``first_moves.M``: by how much the state of the first token moves when the last token is another one.
* ``later_seen.M``: share of pairs (i, j > i) in which the gradient of i's logits to token j is not zero.
* ``patterns_wrong.M``: of all patterns of masks over groups of layers, those under which later tokens
  are seen without a 1 in it, or not seen with one; ``patterns_batched.M``: ``batched`` at the worst of them.
* ``zeros_differ.M``: numbers in the states in which the pattern of zeros is not the causal model, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from puna.core.files import read_json
from puna.evaluate.labelling import Labelled
from puna.model.labels import head_of, label_logits, labels_of
from puna.model.unmasking import all_patterns, unmask
from puna.text import pretrained
from puna.text.labelled import encode_labelled
from puna.text.packing import Row, Slice, collate

if TYPE_CHECKING:
    from puna.evaluate.labelling_stages import LabelChecks
    from puna.model.llama import Llama
    from puna.text.packing import Batch


def checks(inputs: Mapping[str, Any], parameters: LabelChecks, *, seed: int) -> dict[str, float]:
    """All figures by name, for every model."""
    labelled = Labelled.read(inputs["corpus"], parameters.rows, seed=seed)
    found: dict[str, float] = {}
    for name, path in inputs["models"].items():
        model = pretrained.load(path, dtype="float32").eval()
        encoded = encode_labelled(labelled.rows, labelled.kind, model.tokenizer, labels_of(model).names)  # type: ignore[arg-type]
        batch = collate(
            [
                Row((Slice(each, 0, min(len(each), parameters.max_length)),))
                for each in encoded
                if len(each) > 1
            ]
        )
        difference = against_transformers(model, Path(path), batch)
        if difference is not None:
            found[f"transformers.{name}"] = difference
        found[f"batched.{name}"] = batched_as_alone(model, batch)
        found[f"first_moves.{name}"] = first_moves(model, batch)
        found[f"later_seen.{name}"] = later_seen(model, _alone(batch, 0))
        if parameters.groups is not None:
            figures = patterns(model, batch, parameters.groups)
            found |= {f"{figure}.{name}": value for figure, value in figures.items()}
    return found


@torch.no_grad()
def against_transformers(model: Llama, folder: Path, batch: Batch) -> float | None:
    """Largest difference of logits from those of the class that the config names; None if it names none."""
    import transformers

    config = read_json(folder / "config.json")
    if config["model_type"] == "puna":
        return None
    theirs = getattr(transformers, config["architectures"][0]).from_pretrained(folder, dtype="float32").eval()
    real = batch.segments >= 0
    ids = torch.where(real, batch.input_ids, theirs.config.pad_token_id)
    logits = theirs(ids, attention_mask=real.long()).logits
    ours = label_logits(model, batch.input_ids, batch.positions, batch.segments)
    away = (logits - ours).abs()
    return float(away[real].max() if labels_of(model).per == "word" else away.max())


@torch.no_grad()
def batched_as_alone(model: Llama, batch: Batch) -> float:
    """Largest difference of a row's logits beside others, padded, from those it has alone."""
    together = label_logits(model, batch.input_ids, batch.positions, batch.segments)
    worst = 0.0
    for row in range(len(batch.input_ids)):
        alone = label_logits(model, _alone(batch, row))[0]
        beside = together[row] if labels_of(model).per == "text" else together[row, : len(alone)]
        worst = max(worst, float((beside - alone).abs().max()))
    return worst


@torch.no_grad()
def first_moves(model: Llama, batch: Batch) -> float:
    """Largest change of the first token's state when the last token of its row is another one."""
    worst = 0.0
    for row in range(len(batch.input_ids)):
        ids = _alone(batch, row)
        other = ids.clone()
        other[0, -1] = (other[0, -1] + 1) % model.spec.vocab_size
        worst = max(worst, float((model.hidden(ids)[0, 0] - model.hidden(other)[0, 0]).abs().max()))
    return worst


def later_seen(model: Llama, ids: Tensor, most: int = 12) -> float:
    """Share of pairs of the first ``most`` places in which the earlier one's logits depend on the later."""
    ids = ids[:, :most]
    seen, pairs = 0, 0
    added = torch.zeros(1, ids.shape[1], model.spec.hidden_size, requires_grad=True)

    def add(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        return output + added

    handle = model.model.embed_tokens.register_forward_hook(add)
    try:
        logits = head_of(model)(model.hidden(ids))[0]  # [time, labels]
        for place in range(ids.shape[1] - 1):
            (gradient,) = torch.autograd.grad(logits[place].square().sum(), added, retain_graph=True)
            later = gradient[0, place + 1 :].abs().sum(-1)
            seen += int((later > 0).sum())
            pairs += len(later)
    finally:
        handle.remove()
    return seen / pairs


def patterns(model: Llama, batch: Batch, groups: int) -> dict[str, float]:
    """Who sees whom under every pattern, and whether that of zeros is the causal model to the bit."""
    before = model.spec.blocks
    wrong = worst = 0.0
    try:
        unmask(model, "0" * groups)
        with torch.no_grad():
            zeros = model.hidden(batch.input_ids, batch.positions, batch.segments)
        for pattern in all_patterns(groups):
            unmask(model, pattern)
            seen = later_seen(model, _alone(batch, 0))
            wrong += (seen > 0) != ("1" in pattern)
            worst = max(worst, batched_as_alone(model, batch))
    finally:
        model.set_blocks(before)
    causal = model.spec.replace(causal=True)
    model.set_blocks(causal.blocks)
    with torch.no_grad():
        plain = model.hidden(batch.input_ids, batch.positions, batch.segments)
    model.set_blocks(before)
    return {
        "patterns_wrong": wrong,
        "patterns_batched": worst,
        "zeros_differ": float((zeros != plain).sum()),
    }


def _alone(batch: Batch, row: int) -> Tensor:
    """The ids of one row, [1, time], without padding."""
    return batch.input_ids[row : row + 1, batch.segments[row] >= 0]
