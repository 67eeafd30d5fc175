"""Moves a checkpoint's tensors into a decoder: names and shapes first, then one tensor at a time.

The decoder is made without storage, each parameter gets its own just before it is read, so the
weights never stand in memory twice and nothing is reserved for a file that does not fit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from puna.core.errors import PunaError, nearest
from puna.core.progress import Track
from puna.model.labels import LabelKind, add_label_head
from puna.model.llama import Llama
from puna.model.spec import LlamaSpec

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Models with fewer weights than this open within seconds and need no progress bar.
_WEIGHTS_WORTH_A_BAR = 1_000_000_000
# No file holds as many; a config that claims more is damaged, and torch cannot count them.
_IMPOSSIBLE = 1 << 50


class WeightSource(Protocol):
    """A checkpoint under the decoder's own parameter names."""

    where: Path
    shapes: Mapping[str, tuple[int, ...]]

    def read_into(self, name: str, target: Tensor) -> None:
        """Copy the tensor ``name`` into ``target``, converting its dtype."""

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """The weights from ``start`` to ``stop`` of the tensor ``name`` laid out flat, the caller's own."""

    def dtype(self, name: str) -> torch.dtype:
        """The type that :meth:`part` gives."""


def fill_llama(
    spec: LlamaSpec,
    source: WeightSource,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    labels: LabelKind | None = None,
) -> Llama:
    """A decoder of ``spec`` with the weights of ``source``, in evaluation mode; ``labels`` have a head too.

    Raises :class:`PunaError` for a missing, left-over or misshapen tensor and for NaN or infinite weights.
    """
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise PunaError(
            "weights need a floating-point dtype of 16 bits or more", where=source.where, found=dtype
        )
    expected = expected_shapes(spec, source.where, labels)
    check_shapes(expected, source.shapes, source.where)
    model = _empty(spec, labels).to(dtype)
    with progress(f"reading {source.where.name}", spec.parameter_count()) as advance:
        for name, shape in expected.items():
            storage = torch.empty(shape, dtype=dtype, device=device)
            source.read_into(name, storage)
            check_finite(name, storage, source.where)
            set_parameter(model, name, storage)
            advance(storage.numel())
    return model.eval()


def expected_shapes(
    spec: LlamaSpec, where: object, labels: LabelKind | None = None
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a decoder of ``spec``, in its own order; nothing is allocated."""
    if spec.parameter_count() > _IMPOSSIBLE:
        raise PunaError(
            "the config describes an impossibly large model", where=where, found=spec.parameter_count()
        )
    return {name: tuple(parameter.shape) for name, parameter in _empty(spec, labels).named_parameters()}


def _empty(spec: LlamaSpec, labels: LabelKind | None) -> Llama:
    """A decoder whose parameters have shapes alone."""
    model = Llama(spec, device="meta")
    if labels is not None:
        add_label_head(model, labels)
    return model


def set_parameter(model: nn.Module, name: str, storage: Tensor) -> None:
    """Make ``storage`` the parameter called ``name``."""
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute, nn.Parameter(storage))


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: object
) -> None:
    """Refuse a checkpoint whose tensors are not exactly those expected."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    if missing:
        close = nearest(missing[0], extra)
        raise PunaError(
            f"tensor {missing[0]!r} is missing{_and_more(missing)}",
            where=where,
            found=f"{close!r} instead" if close else f"{len(found)} tensors",
            expected=f"{missing[0]!r} of shape {list(expected[missing[0]])}",
            fix="the file or its config is not of this model: fetch or write the checkpoint again",
        )
    if extra:
        raise PunaError(
            f"tensor {extra[0]!r} is no parameter of this decoder{_and_more(extra)}",
            where=where,
            found=f"shape {list(found[extra[0]])}",
            expected=f"only the {len(expected)} tensors that the config describes",
            fix="check that the config belongs to these weights",
        )
    wrong = [name for name in expected if tuple(found[name]) != tuple(expected[name])]
    if wrong:
        raise PunaError(
            f"tensor {wrong[0]!r} has another shape than the config says{_and_more(wrong)}",
            where=where,
            found=list(found[wrong[0]]),
            expected=list(expected[wrong[0]]),
            fix="check that the config belongs to these weights",
        )


def check_finite(name: str, tensor: Tensor, where: object) -> None:
    """Refuse NaN and infinite numbers. A sum shows them at the cost of one pass over the tensor."""
    if torch.isfinite(tensor.sum(dtype=torch.float32)):
        return
    bad = int((~torch.isfinite(tensor)).sum())  # a finite tensor's sum may overflow: count before judging
    if bad:
        half = tensor.dtype == torch.float16
        raise PunaError(
            f"tensor {name!r} holds NaN or infinite numbers",
            where=where,
            found=f"{bad:,} of {tensor.numel():,} as {str(tensor.dtype).removeprefix('torch.')}",
            expected="finite numbers",
            fix="open it in float32 or bfloat16 if its numbers are too large for float16"
            if half
            else "the checkpoint is damaged, or its training diverged: use an earlier one",
        )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


@contextlib.contextmanager
def progress(description: str, weights: int) -> Iterator[Callable[[float], None]]:
    """Yield what advances a progress bar by a number of weights; small models get no bar."""
    if weights < _WEIGHTS_WORTH_A_BAR:
        yield lambda amount: None
        return
    with Track(description, weights, "weights") as track:
        yield track.advance
