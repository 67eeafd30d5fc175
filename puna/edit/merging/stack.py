"""What a merge method is given and says of itself: a stack of one tensor's deltas, settings, a registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from puna.core.errors import PunaError, unknown_name
from puna.text.stored_weights import count_of, parts_of

_HELD = 1 << 24
"""Weights that a stack keeps between passes, all models together: 64 MB."""


@dataclass
class Stack:
    """One tensor of the merged model: the base's and each model's, in parts of whole rows.

    ``models`` give deltas, or weights for a method over weights. ``labels`` name the models' draws.
    ``thresholds`` are those of methods that trim the model as a whole. ``statistics`` gives what was
    measured of each model for this tensor.
    """

    name: str
    shape: tuple[int, ...]
    base: Callable[[int, int], Tensor] | None
    models: Sequence[Callable[[int, int], Tensor]]
    labels: Sequence[str] = ()
    seed: int = 0
    thresholds: Sequence[float] = ()
    statistics: Sequence[Callable[[int, int], Tensor]] = ()
    _held: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, base: Tensor | None, models: Sequence[Tensor], **more: Any) -> Stack:
        """A stack of tensors in memory."""
        like = models[0] if base is None else base

        def reader(tensor: Tensor) -> Callable[[int, int], Tensor]:
            return lambda start, stop: tensor.reshape(-1)[start:stop].float()

        more = {"name": "tensor", "labels": [str(index) for index in range(len(models))], **more}
        read = None if base is None else reader(base)
        return cls(shape=tuple(like.shape), base=read, models=[reader(model) for model in models], **more)

    @property
    def width(self) -> int:
        """Weights in a row; a vector is one row."""
        return self.shape[-1] if self.shape else 1

    def model(self, index: int) -> Iterator[Tensor]:
        """The parts of one model, [rows, width]."""
        keep = count_of(self.shape) * len(self.models) <= _HELD
        for number, (start, stop) in enumerate(parts_of(self.shape)):
            part = self._held.get((index, number))
            if part is None:
                part = self.models[index](start, stop).view(-1, self.width)
                if keep:
                    self._held[index, number] = part
            yield part

    def bases(self) -> Iterator[Tensor]:
        """The parts of the base, [rows, width]."""
        assert self.base is not None
        for start, stop in parts_of(self.shape):
            yield self.base(start, stop).view(-1, self.width)

    def parts(self) -> Iterator[tuple[Tensor, ...]]:
        """Part by part those of all models."""
        yield from zip(*(self.model(index) for index in range(len(self.models))), strict=True)

    def products(self, *, rows: bool = False) -> Tensor:
        """Inner products of the models with one another, float64: [models, models], or for each row."""
        sums = []
        for parts in self.parts():
            stack = torch.stack([part.double() for part in parts])  # [models, rows, width]
            each = torch.einsum("arw,brw->abr", stack, stack)
            sums.append(each if rows else each.sum(-1, keepdim=True))
        found = torch.cat(sums, dim=-1)
        return found if rows else found.sum(-1)


Settings = Mapping[str, Any]
"""Settings of a tensor by name: a list of one for each model, or one for all."""


@dataclass(frozen=True)
class Option:
    """A setting of a method, for each model or for all; without a default (None) it must be given."""

    default: float | bool | str | None
    each: bool = False
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    says: str = ""

    def check(self, value: Any, where: str) -> Any:
        """The value if it is one of this setting, else a :class:`PunaError`."""
        if isinstance(value, str) and self.choices and value in self.choices:
            return value
        if isinstance(self.default, bool):
            if isinstance(value, bool):
                return value
            raise PunaError(
                "not a value of this setting", where=where, found=value, expected=self._expected()
            )
        if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
            try:
                value = float(value)
            except ValueError:
                value = None
        bad = value is None or isinstance(value, bool) or not isinstance(value, (int, float))
        bad = bad or value != value or abs(value) == float("inf")
        bad = bad or (self.least is not None and value < self.least)
        if bad or (self.most is not None and value > self.most):
            raise PunaError(
                "not a value of this setting", where=where, found=value, expected=self._expected()
            )
        return float(value)

    def _expected(self) -> str:
        if isinstance(self.default, bool):
            return "true or false" + "".join(f" or {choice}" for choice in self.choices)
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        bounds = [f"at least {self.least:g}"] if self.least is not None else []
        bounds += [f"at most {self.most:g}"] if self.most is not None else []
        return " and ".join(["a number", *bounds])


MergeFunction = Callable[[Stack, Settings], Iterator[Tensor]]
WHOLE_BASE = -1


@dataclass(frozen=True)
class Method:
    """A registered merge method.

    ``over`` deltas from a base, or weights. ``taken_whole(settings)`` tells the model whose weights the
    result is without any arithmetic (:data:`WHOLE_BASE` for the base), or None. ``statistics`` is what
    has to be measured of each model first. ``trims_model`` asks for thresholds over the whole model.
    """

    name: str
    title: str
    paper: str
    merge: MergeFunction
    options: Mapping[str, Option]
    over: Literal["deltas", "weights"]
    taken_whole: Callable[[Settings], int | None]
    least: int = 1
    most: int | None = None
    statistics: Literal["fisher", "gram"] | None = None
    trims_model: bool = False


METHODS: dict[str, Method] = {}


def get_method(name: str, *, where: object = None) -> Method:
    """The method of that name; an unknown one is an error with the nearest name."""
    if name not in METHODS:
        raise unknown_name("merge method", name, METHODS, where=where)
    return METHODS[name]


def register(method: Method) -> None:
    """Make a method known by its name."""
    if method.name in METHODS:
        raise ValueError(f"two merge methods are named {method.name!r}")
    METHODS[method.name] = method
