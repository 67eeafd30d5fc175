"""Differences of models from one base, read tensor by tensor and part by part, never whole.

A delta of a model is its weights minus those of the base it came from (task vectors, 2212.04089; DARE's
delta parameters, 2311.03099). It is full, two checkpoints subtracted while they are read, or of low rank,
an adapter in PEFT's layout whose product is formed for the rows asked for. All arithmetic is float32.
What is written down names its base by a hash of the base's weights, and is refused on any other.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.files import folder_aside, read_json, write_json
from puna.model.adapter_files import ADAPTER_CONFIG, StoredAdapter, open_adapter
from puna.model.hf import SafetensorsFile
from puna.model.tensor_writer import TensorWriter
from puna.text import pretrained
from puna.text.stored_weights import Weights, parts_of

DELTA_CONFIG = "delta.json"
DELTA_WEIGHTS = "delta.safetensors"
_log = logging.getLogger(__name__)


@dataclass
class DeltaSet:
    """One model's difference from ``base``, by the base's tensor names, float32.

    :meth:`between` for a model, :meth:`of_adapter` for a LoRA alone, :meth:`read` for what
    :meth:`write` left. ``changed`` are the tensors that can differ from zero.
    """

    base: Weights
    label: str
    changed: frozenset[str]
    _model: Weights | None = None
    _adapter: StoredAdapter | None = None
    _stored: SafetensorsFile | None = field(default=None, repr=False)

    @classmethod
    def between(cls, base: Weights, model: Weights) -> DeltaSet:
        """``model`` minus ``base``; other names or shapes are an error.

        A model that is this base under an adapter gives the adapter's own product, unrounded.
        """
        if model.adapter is not None and model.where == base.where and base.adapter is None:
            return cls._over(base, model.adapter)
        check_same_shapes(base, model)
        return cls(base, model.label, frozenset(base.shapes), _model=model)

    @classmethod
    def of_adapter(cls, base: Weights, folder: str | Path) -> DeltaSet:
        """The adapter of ``folder``; one that states another base than ``base`` is an error."""
        path = pretrained.locate(folder)
        _check_stated_base(base, path)
        return cls._over(base, open_adapter(path, base.shapes))

    @classmethod
    def _over(cls, base: Weights, adapter: StoredAdapter) -> DeltaSet:
        changed = frozenset([*adapter.full, *adapter.low_rank])
        return cls(base, str(adapter.where), changed, _adapter=adapter)

    @classmethod
    def read(cls, base: Weights, folder: str | Path) -> DeltaSet:
        """The delta that :meth:`write` left in ``folder``; one of another base is an error."""
        path = Path(folder)
        stated = read_json(path / DELTA_CONFIG)
        if not isinstance(stated, dict) or not isinstance(stated.get("base_sha256"), str):
            raise PunaError("not a delta's description", where=path / DELTA_CONFIG, expected="base_sha256")
        if stated["base_sha256"] != base.fingerprint:
            raise PunaError(
                "this delta was taken from another base",
                where=path,
                found=f"a base of SHA-256 {stated['base_sha256'][:16]}..., called {stated.get('base')}",
                expected=f"{base.fingerprint[:16]}..., the weights of {base.label}",
                fix="give the base that it was taken from",
            )
        file = SafetensorsFile(path / DELTA_WEIGHTS)
        strange = [name for name in file.shapes if base.shapes.get(name) != file.shapes[name]]
        if strange:
            raise PunaError("the delta holds a tensor that the base has not", where=path, found=strange[0])
        return cls(base, str(path), frozenset(file.shapes), _stored=file)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor of the base."""
        return self.base.shapes

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Part of a tensor's difference laid out flat, float32."""
        if name not in self.changed:
            return torch.zeros(stop - start)
        if self._stored is not None:
            return self._stored.part(name, start, stop).float()
        if self._model is not None:
            return self._model.part(name, start, stop).sub_(self.base.seen_part(name, start, stop))
        assert self._adapter is not None
        if name in self._adapter.full:
            return self._adapter.full_part(name, start, stop).sub_(self.base.part(name, start, stop))
        found = self._adapter.low_rank_part(name, start, stop, self.shapes[name])
        assert found is not None  # it is one of ``changed``
        return found

    def tensor(self, name: str) -> Tensor:
        """A whole tensor's difference, in the tensor's shape."""
        shape = self.shapes[name]
        parts = [self.part(name, start, stop) for start, stop in parts_of(shape)]
        return torch.cat(parts).view(shape) if parts else torch.zeros(shape)

    def write(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
        """Write the delta as a folder, with the hash of its base; bfloat16 keeps 8 bits of each element."""
        target = Path(folder)
        names = [name for name in self.shapes if name in self.changed]
        with folder_aside(target) as aside:
            with TensorWriter(
                aside, {name: self.shapes[name] for name in names}, dtype, DELTA_WEIGHTS
            ) as out:
                for name in names:
                    for start, stop in parts_of(self.shapes[name]):
                        out.add(name, self.part(name, start, stop))
            facts = {"base": self.base.where.name, "base_sha256": self.base.fingerprint, "of": self.label}
            write_json(aside / DELTA_CONFIG, facts)
        return target


def added(base: Tensor, delta: Tensor) -> Tensor:
    """``base`` plus ``delta``; where that is zero the base keeps its very bits, a negative zero too."""
    # 0 - delta turns no nonzero number, and -0 - 0 is -0; a choice by a mask takes twenty times as long.
    return base - (0.0 - delta)


def check_same_shapes(base: Weights, model: Weights) -> None:
    """Refuse a model whose tensors are not those of the base."""
    ours, theirs = base.shapes, model.shapes
    unlike = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if not unlike:
        return
    name = unlike[0]
    vocabulary = base.spec.vocab_size != model.spec.vocab_size
    raise PunaError(
        f"tensor {name!r} is not the same in both models",
        where=model.label,
        found=list(theirs[name]) if name in theirs else "none of that name",
        expected=f"{list(ours[name])} as in {base.label}"
        if name in ours
        else f"none, as in {base.label}: the models are not of one family",
        fix="the vocabularies differ in size: say which tokenizer the merged model takes (tokenizer_source)"
        if vocabulary
        else "merge models that were trained from one base",
    )


def _check_stated_base(base: Weights, adapter: Path) -> None:
    """Refuse an adapter whose stated base can be found and has other weights than ``base``."""
    try:
        stated = pretrained.locate(pretrained.base_of(adapter))
    except PunaError as error:
        _log.warning("%s: the base it states cannot be checked: %s", adapter, error.message)
        return
    if stated.resolve() == base.where.resolve() and base.adapter is None:
        return
    theirs = Weights.open(stated)
    if theirs.fingerprint != base.fingerprint:
        raise PunaError(
            "this adapter belongs to another base",
            where=adapter / ADAPTER_CONFIG,
            found=f"{stated}, SHA-256 {theirs.fingerprint[:16]}...",
            expected=f"{base.label}, SHA-256 {base.fingerprint[:16]}...",
            fix="give the base that it was trained on",
        )
