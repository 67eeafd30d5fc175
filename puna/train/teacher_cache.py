"""A teacher's distributions on disk: computed once, read in every epoch and by every student.

A folder holds ``teacher.json`` (format, vocabulary, k, rows and where they stand, what the maker
says of the teacher) and ``teacher-00001.safetensors`` and on. A row is one text's positions. Each
keeps the ids (int32) and log-probabilities of its ``k`` likeliest tokens, or all log-probabilities:
at k = 64 and float16 384 bytes a position, against 98 kB for a whole vocabulary of 49k. float16
keeps 11 bits of a log-probability: one between -8 and -16 is off by at most 0.004.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.files import folder_aside, read_json, write_json
from puna.train.distillation import TopTokens

FORMAT = 1
INDEX = "teacher.json"
_DTYPES = {"float16": torch.float16, "float32": torch.float32}
_AGAIN = "make the cache again"


def write_teacher_cache(
    folder: Path | str,
    rows: Iterable[tuple[str, TopTokens | Tensor]],
    *,
    vocabulary: int,
    dtype: Literal["float16", "float32"] = "float16",
    about: Mapping[str, Any] | None = None,
    shard_bytes: float = 1e9,
) -> int:
    """Write ``folder`` whole, or not at all, and return the number of positions.

    ``rows`` yields the name of each row with its :class:`TopTokens` [positions, k], of one k, or
    with all its log-probabilities [positions, vocabulary]. They are rounded to ``dtype`` once, here.
    ``about`` (JSON-like) says which teacher, tokenizer and texts these are. A shard is closed once it
    holds ``shard_bytes``, so this much is held in memory.
    """
    writer = _Writer(vocabulary, dtype, shard_bytes)
    with folder_aside(folder) as aside:
        for name, row in rows:
            writer.add(name, row, aside)
        writer.close_shard(aside)
        if not writer.places:
            raise PunaError("a teacher's cache without a row", where=folder)
        described = {
            "format": FORMAT,
            "vocabulary": vocabulary,
            "k": writer.k,
            "dtype": dtype,
            "about": dict(about or {}),
            "rows": writer.places,
        }
        write_json(aside / INDEX, described)
    return sum(count for _, _, count in writer.places.values())


class _Writer:
    """Collects rows and writes a shard whenever enough of them are together."""

    def __init__(self, vocabulary: int, dtype: str, shard_bytes: float) -> None:
        if dtype not in _DTYPES:
            raise PunaError("a teacher's cache has another dtype", found=dtype, expected=" or ".join(_DTYPES))
        self.vocabulary = vocabulary
        self.dtype = _DTYPES[dtype]
        self.shard_bytes = shard_bytes
        self.k: int | None = None
        self.places: dict[str, tuple[int, int, int]] = {}  # name -> shard, first position, positions
        self._shards = 0
        self._held: dict[str, list[Tensor]] = {}
        self._positions = 0
        self._bytes = 0

    def add(self, name: str, row: TopTokens | Tensor, folder: Path) -> None:
        """Take one row; write the shard that it fills."""
        if name in self.places:
            raise PunaError("two rows of a teacher's cache have one name", found=name)
        tensors = self._tensors(name, row)
        positions = len(tensors["log_probs"])
        self.places[name] = (self._shards, self._positions, positions)
        self._positions += positions
        for key, tensor in tensors.items():
            self._held.setdefault(key, []).append(tensor)
            self._bytes += tensor.nbytes
        if self._bytes >= self.shard_bytes:
            self.close_shard(folder)

    def close_shard(self, folder: Path) -> None:
        """Write what is held, if anything is."""
        if self._held:
            save_file(
                {key: torch.cat(parts) for key, parts in self._held.items()}, folder / _shard(self._shards)
            )
            self._shards += 1
        self._held, self._positions, self._bytes = {}, 0, 0

    def _tensors(self, name: str, row: TopTokens | Tensor) -> dict[str, Tensor]:
        log_probs = row.log_probs if isinstance(row, TopTokens) else row
        kept = log_probs.shape[-1] if isinstance(row, TopTokens) else None
        if not self.places:
            self.k = kept
        width = self.vocabulary if kept is None else kept
        if log_probs.ndim != 2 or log_probs.shape[1] != width or kept != self.k:
            raise PunaError(
                "a row of a teacher's cache has another shape than it should",
                where=name,
                found=list(log_probs.shape),
                expected=f"[positions, {self.vocabulary if self.k is None else self.k}]",
            )
        stored = log_probs.detach().to("cpu", self.dtype)
        if not bool(stored.isfinite().all()):
            raise PunaError(
                "a log-probability is not finite",
                where=name,
                expected=f"numbers that {str(self.dtype).removeprefix('torch.')} holds",
                fix="check the teacher, or keep only its likeliest tokens",
            )
        if not isinstance(row, TopTokens):
            return {"log_probs": stored}
        ids = row.ids.detach().cpu()
        if bool(((ids < 0) | (ids >= self.vocabulary)).any()):
            raise PunaError(
                "an id is not of the vocabulary",
                where=name,
                found=f"{int(ids.min())} to {int(ids.max())}",
                expected=f"0 to {self.vocabulary - 1}",
            )
        return {"ids": ids.to(torch.int32), "log_probs": stored}


class TeacherCache:
    """A folder that :func:`write_teacher_cache` wrote; rows are read when asked for.

    ``vocabulary``, ``k`` (None where whole distributions are kept), ``about`` and ``positions``, the
    number of positions of each row by name, are at hand at once.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        index = self.folder / INDEX
        content = read_json(index)
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, not {FORMAT}")
            self.vocabulary = int(content["vocabulary"])
            self.k: int | None = content["k"]
            self.about: dict[str, Any] = content["about"]
            self._places = {name: (s, start, count) for name, (s, start, count) in content["rows"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PunaError("not a teacher's cache", where=index, found=error, fix=_AGAIN) from None
        self.positions = {name: count for name, (_, _, count) in self._places.items()}
        self._files = self._open_shards()

    def row(self, name: str) -> TopTokens | Tensor:
        """What was written as ``name``: tokens [positions, k] or log-probabilities [positions, vocabulary].

        Log-probabilities keep the dtype of the file. Any of the objectives takes them as a teacher.
        """
        if name not in self._places:
            raise PunaError(
                "the teacher's cache has no such row",
                where=self.folder,
                found=name,
                expected=f"one of {len(self._places):,} rows",
                fix="make the cache from the same texts",
            )
        shard, start, count = self._places[name]
        file = self._files[shard]
        log_probs: Tensor = file.get_slice("log_probs")[start : start + count]
        if self.k is None:
            return log_probs
        return TopTokens(file.get_slice("ids")[start : start + count], log_probs)

    def _open_shards(self) -> dict[int, Any]:
        """Every shard by number, its shapes and dtypes checked against the index."""
        ends: dict[int, int] = {}
        for shard, start, count in self._places.values():
            ends[shard] = max(ends.get(shard, 0), start + count)
        width = self.vocabulary if self.k is None else self.k
        files = {}
        for shard, end in ends.items():
            path = self.folder / _shard(shard)
            try:
                file = cast(Any, safe_open(path, framework="pt", device="cpu"))
                keys = ["log_probs"] if self.k is None else ["ids", "log_probs"]
                shapes = {key: list(file.get_slice(key).get_shape()) for key in keys}
            except (SafetensorError, OSError) as error:
                raise PunaError(
                    "not a readable shard of a teacher's cache", where=path, found=error, fix=_AGAIN
                ) from None
            if any(shape != [end, width] for shape in shapes.values()):
                raise PunaError(
                    "a shard of a teacher's cache has another shape than its index says",
                    where=path,
                    found=shapes,
                    expected=[end, width],
                    fix=_AGAIN,
                )
            files[shard] = file
        return files


def _shard(number: int) -> str:
    return f"teacher-{number + 1:05d}.safetensors"
