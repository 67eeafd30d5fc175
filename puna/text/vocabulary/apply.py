"""A vocabulary map applied to a model: new embedding and head, new special ids, new template."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from puna.core.errors import PunaError, unknown_name
from puna.core.seeds import torch_generator
from puna.model.llama import Llama
from puna.model.spec import INITIAL_DEVIATION
from puna.text.template import find_template
from puna.text.tokenizer import Tokenizer
from puna.text.vocabulary.operator import ORIGINS, Draw, VocabularyMap

_ENTRIES_AT_ONCE = 65_536


@torch.no_grad()
def apply_map(
    model: Llama, mapping: VocabularyMap, tokenizer: Tokenizer, *, pad_to_multiple: int = 1
) -> Llama:
    """A new model whose vocabulary is that of ``tokenizer``; the given one stays as it is.

    Input embedding and head are mapped each on its own; tied ones are one matrix and stay so. BOS,
    EOS, stop and pad ids and the chat template become those of ``tokenizer``. The rows are padded to
    a multiple of ``pad_to_multiple`` with the mean of the real ones, so that the logit of a padded
    row is the mean of the real logits and never the largest; the spec's ``vocab_size`` counts them.
    """
    if model.adapter is not None:
        raise PunaError(
            "a vocabulary is changed in a plain model, and this one carries an adapter",
            fix="merge the adapter first",
        )
    if pad_to_multiple < 1:
        raise PunaError(
            "rows are padded to a multiple of at least 1", where="pad_to_multiple", found=pad_to_multiple
        )
    _check_sizes(model, mapping, tokenizer)
    size = -(-mapping.new_size // pad_to_multiple) * pad_to_multiple
    spec = model.spec.replace(
        vocab_size=size, bos_id=tokenizer.bos_id, eos_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id
    )
    mapped = Llama(spec, dtype=model.dtype, device="meta")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in state:
            state[name] = map_rows(mapping, state[name], size, name)
    mapped.load_state_dict(state, assign=True)
    mapped.tokenizer, mapped.template, mapped.source = tokenizer, find_template(tokenizer), model.source
    mapped.train(model.training)
    return mapped


def map_rows(mapping: VocabularyMap, matrix: Tensor, size: int, name: str = "embedding") -> Tensor:
    """T times ``matrix`` [at least old, hidden], with mean rows up to ``size``: [size, hidden].

    Copied rows are copies to the bit; the others are summed in float32 (float64 for such a matrix)
    and rounded once. Random rows differ between matrices of different ``name``.
    """
    old = matrix[: mapping.old_size]
    wide = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    rows = torch.empty(size, matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    lengths = numpy.diff(mapping.starts)
    copied = numpy.flatnonzero(lengths == 1)
    _set(rows, copied, old[_ids(mapping.columns[mapping.starts[copied]], matrix)])
    summed = numpy.flatnonzero(lengths > 1)
    for part in _batches(summed, lengths[summed]):
        _set(rows, part, _weighted(mapping, part, old, wide))
    means = numpy.flatnonzero(mapping.origins == ORIGINS.index("mean"))
    drawn = numpy.flatnonzero(mapping.origins == ORIGINS.index("random"))
    if len(means):
        _set(rows, means, old.to(wide).mean(0).expand(len(means), -1))
    if mapping.draw is not None:
        _set(rows, drawn, _draw(mapping.draw, len(drawn), old.to(wide), name))
    real = rows[: mapping.new_size]
    rows[mapping.new_size :] = real.to(wide).mean(0).to(rows.dtype)
    return rows


def _weighted(mapping: VocabularyMap, part: numpy.ndarray, old: Tensor, wide: torch.dtype) -> Tensor:
    """Weighted sums of old rows for the rows ``part`` of the map: [part, hidden]."""
    starts, lengths = mapping.starts[part], numpy.diff(mapping.starts)[part]
    place = numpy.repeat(starts - numpy.cumsum(lengths) + lengths, lengths) + numpy.arange(lengths.sum())
    weights = torch.from_numpy(mapping.weights[place]).to(old.device, wide)
    entries = old[_ids(mapping.columns[place], old)].to(wide) * weights[:, None]
    # segment_reduce adds in the order of the entries on every device; index_add would not.
    counted = torch.from_numpy(lengths).to(old.device)
    return torch.segment_reduce(entries, "sum", lengths=counted, axis=0)


def _batches(rows: numpy.ndarray, lengths: numpy.ndarray) -> Sequence[numpy.ndarray]:
    """Cut ``rows`` where their entries pass a bound, so that memory does not grow with the vocabulary."""
    bounds = numpy.flatnonzero(numpy.diff(numpy.cumsum(lengths) // _ENTRIES_AT_ONCE)) + 1
    return numpy.split(rows, bounds) if len(rows) else []


def _draw(draw: Draw, count: int, old: Tensor, name: str) -> Tensor:
    """Baseline rows [count, hidden], the same on every device."""
    generator = torch_generator(draw.seed, "random rows", name)
    normal = torch.randn(count, old.shape[1], generator=generator).to(old)
    if draw.distribution == "fixed":
        return normal * INITIAL_DEVIATION
    if draw.distribution == "matched":
        return old.mean(0) + normal * old.std(0)
    raise unknown_name("distribution", draw.distribution, ("fixed", "matched"))


def _set(rows: Tensor, indices: numpy.ndarray, values: Tensor) -> None:
    rows[_ids(indices, rows)] = values.to(rows.dtype)


def _ids(indices: numpy.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(indices).to(like.device)


def _check_sizes(model: Llama, mapping: VocabularyMap, tokenizer: Tokenizer) -> None:
    if mapping.old_size > model.spec.vocab_size:
        raise PunaError(
            "the map was made for a larger vocabulary than this model has",
            found=f"{mapping.old_size:,} old tokens, {model.spec.vocab_size:,} rows",
            fix="make the map with this model's own tokenizer",
        )
    if tokenizer.vocab_size > mapping.new_size:
        raise PunaError(
            "the map has too few rows for this tokenizer",
            found=f"{mapping.new_size:,} rows, {tokenizer.vocab_size:,} tokens",
            fix="make the map with this tokenizer",
        )
