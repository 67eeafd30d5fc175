"""Reads and writes Hugging Face checkpoint folders: config.json and safetensors, single or sharded."""

from __future__ import annotations

import functools
import json
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.files import folder_aside, read_json, write_json
from puna.model.hf_config import config_from_spec
from puna.model.labels import SCORE, LabelKind, labels_in
from puna.model.llama import Llama
from puna.model.nf4 import quantised_layers
from puna.model.packed_files import (
    PARTS,
    PackedScheme,
    common_grid,
    packed_tensors,
    quantisation_config,
    quantisation_of,
)
from puna.model.spec import LlamaSpec
from puna.model.uniform_grid import UniformGrid
from puna.model.weights import EMBEDDING, HEAD, WeightSource, check_finite, fill_llama, progress

CONFIG = "config.json"
OWN_CONFIG = "puna.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_READABLE = tuple(_TYPES)
_INTEGERS = ("I8", "I32", "I64")  # in packed checkpoints
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_DAMAGED = "the file is damaged or cut short: fetch or write it again"
# Buffers that checkpoints of transformers before 4.32 carry; positions are computed from the config.
_OLD_BUFFERS = "rotary_emb.inv_freq"
_log = logging.getLogger(__name__)


class SafetensorsFile:
    """One safetensors file: shapes and types from its header, tensors when asked for."""

    def __init__(self, path: Path, types: tuple[str, ...] = _READABLE) -> None:
        self.path = path
        self._offsets: dict[str, int] | None = None
        try:
            self._file = cast(Any, safe_open(path, framework="pt", device="cpu"))
            self.shapes: dict[str, tuple[int, ...]] = {}
            self.types: dict[str, str] = {}
            for name in self._file.keys():  # noqa: SIM118 - no dictionary
                view = self._file.get_slice(name)
                self.shapes[name] = tuple(view.get_shape())
                self.types[name] = view.get_dtype()
                if view.get_dtype() not in types:
                    raise PunaError(
                        f"tensor {name!r} is stored in a type that holds no plain weights",
                        where=path,
                        found=view.get_dtype(),
                        expected=f"one of {', '.join(types)}",
                        fix="use an unquantised checkpoint",
                    )
        except FileNotFoundError:
            raise PunaError("file not found", where=path) from None
        except (SafetensorError, OSError) as error:
            raise PunaError(
                "not a readable safetensors file", where=path, found=error, fix=_DAMAGED
            ) from None

    def get(self, name: str) -> Tensor:
        """One tensor, mapped from the file and not copied."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    @property
    def metadata(self) -> dict[str, str]:
        """The texts by name in the file's header."""
        return dict(self._file.metadata() or {})

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """The weights from ``start`` to ``stop`` of the tensor laid out flat, in their stored type.

        Read with the file's own calls: pages of a mapped file would stay and count as this process's memory.
        """
        kind = _TYPES[self.types[name]]
        part = torch.empty(stop - start, dtype=kind)
        view, place = bytes_of(part), self._begin(name) + start * kind.itemsize
        while view:
            read = os.preadv(self._descriptor, [view], place)
            if not read:
                raise PunaError("the file ends too early", where=self.path, fix=_DAMAGED)
            view, place = view[read:], place + read
        return part

    @functools.cached_property
    def _descriptor(self) -> int:
        """The file, open for as long as this object lives."""
        opened = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, opened)
        return opened

    def _begin(self, name: str) -> int:
        """Where the tensor begins in the file; safetensors checked the header when it was opened."""
        if self._offsets is None:
            with self.path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            self._offsets = {
                key: 8 + length + entry["data_offsets"][0]
                for key, entry in header.items()
                if key != "__metadata__"
            }
        return self._offsets[name]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, byte by byte."""
    return memoryview(cast(Any, tensor.view(-1).view(torch.uint8).numpy()))


def refuse_pickle(path: Path) -> None:
    """Raise for a file, or a folder with nothing better than files, whose weights are pickled."""
    if not path.is_dir():
        pickles = [path.name] if path.suffix in _PICKLES else []
    else:
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise PunaError(
            "pickled weights are refused, since opening a pickle can run any program",
            where=path,
            found=", ".join(pickles[:3]),
            expected="safetensors",
            fix="where you trust it, open it once with transformers and write it with save_pretrained",
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a checkpoint folder; puna.json speaks for specs that config.json cannot describe."""
    own = folder / OWN_CONFIG
    path = own if own.exists() else folder / CONFIG
    config = read_json(path)
    if not isinstance(config, dict):
        raise PunaError("not a config", where=path, found=type(config).__name__, expected="a JSON object")
    return config


def read_hf(
    folder: Path | str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    adjust: Callable[[LlamaSpec], LlamaSpec] = lambda spec: spec,
) -> Llama:
    """Open a checkpoint folder (:func:`open_hf`); ``adjust`` may change the spec before the weights come."""
    spec, source = open_hf(folder)
    config = read_config(Path(folder))
    labels = labels_in(config, bias=f"{SCORE}.bias" in source.shapes, where=folder)
    if labels is not None:  # there is no head for words that could be one of its own
        spec = spec.replace(tied=True)
    model = fill_llama(adjust(spec), source, dtype=dtype, device=device, labels=labels)
    if isinstance(source, PackedSource):
        model.grids = source.grids
    return model


def open_hf(folder: Path | str) -> tuple[LlamaSpec, WeightSource]:
    """The spec of a checkpoint folder and where its weights lie; none is read yet.

    Left aside, and said on the log: rotary buffers of old checkpoints. A tied model may carry a
    head of its own: an equal one is dropped, a different one is kept and the model opens untied,
    as in transformers.
    """
    folder = Path(folder)
    config = read_config(folder)
    scheme = quantisation_of(config, folder)
    if scheme is not None:
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    types = _READABLE if scheme is None else (*_READABLE, *_INTEGERS)
    files = {name: file for file in _files(folder, types) for name in file.shapes}
    old = [name for name in files if name.endswith(_OLD_BUFFERS)]
    if old:
        _log.warning("%s: %d rotary buffers of an old checkpoint are left aside", folder, len(old))
        for name in old:
            del files[name]
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(files):  # before a spec of that many blocks is built
        raise PunaError(
            "the config has more layers than the checkpoint has tensors",
            where=folder / CONFIG,
            found=layers,
            expected=f"at most {len(files)}",
        )
    spec = LlamaSpec.from_config(config, where=folder / CONFIG)
    spec = _settle_head(spec, files, folder)
    if scheme is None:
        return spec, FolderSource(folder, files)
    if scheme.activation_bits is not None:
        bits = f"{scheme.activation_bits} bits"
        _log.warning("%s: what enters its matrices is meant for %s, and is not rounded here", folder, bits)
    return spec, PackedSource(folder, files, scheme)


class FolderSource:
    """The safetensors files of a folder under the decoder's parameter names."""

    def __init__(self, folder: Path, files: Mapping[str, SafetensorsFile]) -> None:
        self.where = folder
        self._files = files
        self.shapes: Mapping[str, tuple[int, ...]] = {name: file.shapes[name] for name, file in files.items()}

    def read_into(self, name: str, target: Tensor) -> None:
        """Copy one tensor."""
        target.copy_(self._files[name].get(name))

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Some weights of one tensor, laid out flat, as they are stored."""
        return self._files[name].part(name, start, stop)

    def dtype(self, name: str) -> torch.dtype:
        """The type that it is stored in."""
        return _TYPES[self._files[name].types[name]]


class PackedSource:
    """The same of a quantised checkpoint; ``grids`` are those of the matrices read so far."""

    def __init__(self, folder: Path, files: Mapping[str, SafetensorsFile], scheme: PackedScheme) -> None:
        self.where, self._files, self._scheme = folder, files, scheme
        self.grids: dict[str, UniformGrid] = {}
        self._modules = {
            name.removesuffix(".weight_scale") for name in files if name.endswith(".weight_scale")
        }
        self.shapes: Mapping[str, tuple[int, ...]] = dict(self._find_shapes())

    def _find_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, file in self._files.items():
            module, _, part = name.rpartition(".")
            if module not in self._modules:
                yield name, file.shapes[name]
            elif part == "weight_shape":
                yield f"{module}.weight", tuple(file.get(name).tolist())
            elif part not in PARTS:  # the weight itself where it is stored as integers, and a bias
                yield name, file.shapes[name]

    def read_into(self, name: str, target: Tensor) -> None:
        """Decode one matrix, or copy one tensor."""
        module, _, part = name.rpartition(".")
        if module not in self._modules or part != "weight":
            target.copy_(self._files[name].get(name))
            return
        names = {part: f"{module}.{part}" for part in ("weight", *PARTS)}
        parts = {part: self._files[each].get(each) for part, each in names.items() if each in self._files}
        weight, grid = self._scheme.read(parts)
        self.grids[name] = grid
        target.copy_(weight)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """A part of a matrix is decoded with the whole of it."""
        whole = torch.empty(self.shapes[name])
        self.read_into(name, whole)
        return whole.view(-1)[start:stop].clone()

    def dtype(self, name: str) -> torch.dtype:
        """Decoded."""
        return torch.float32


def _files(folder: Path, types: tuple[str, ...]) -> Iterator[SafetensorsFile]:
    """The weight files of a folder; of shards, each tensor must lie where the index says."""
    if (folder / SINGLE).exists():
        yield SafetensorsFile(folder / SINGLE, types)
        return
    if not (folder / INDEX).exists():
        refuse_pickle(folder)
        stray = sorted(file.name for file in folder.glob("*.safetensors"))
        raise PunaError(
            "no weights in this folder",
            where=folder,
            found=", ".join(stray[:3]) or "no safetensors file",
            expected=f"{SINGLE}, or shards with {INDEX}",
        )
    index = read_json(folder / INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise PunaError(
            "not an index of shards", where=folder / INDEX, expected="a weight_map of tensor to file name"
        )
    shards = dict.fromkeys(places.values())
    strange = [shard for shard in shards if Path(shard).name != shard or not shard.endswith(".safetensors")]
    if strange:
        refuse_pickle(folder / strange[0])
        raise PunaError(
            "the index names a file that is no shard of this folder",
            where=folder / INDEX,
            found=strange[0],
            expected="the plain name of a safetensors file",
        )
    for shard in shards:
        file = SafetensorsFile(folder / shard, types)
        misplaced = sorted(file.shapes.keys() ^ {name for name, place in places.items() if place == shard})
        if misplaced:
            raise PunaError(
                f"the index and the shard disagree about {misplaced[0]!r}",
                where=folder / shard,
                found="in the shard only" if misplaced[0] in file.shapes else "in the index only",
                fix="fetch or write the checkpoint again, whole",
            )
        yield file


def _settle_head(spec: LlamaSpec, files: dict[str, SafetensorsFile], folder: Path) -> LlamaSpec:
    """Of a tied model with a head in its file, drop the head if it is the embedding's equal, or untie."""
    if not spec.tied or HEAD not in files or EMBEDDING not in files:
        return spec
    if torch.equal(files[HEAD].get(HEAD), files[EMBEDDING].get(EMBEDDING)):
        del files[HEAD]
        return spec
    _log.warning(
        "%s: the config ties head and embedding, but the file holds two different ones; opened untied", folder
    )
    return spec.replace(tied=False)


def write_hf(
    model: Llama,
    folder: Path | str,
    *,
    shard_bytes: float = 5e9,
    extra_config: Mapping[str, Any] | None = None,
    packed: bool = False,
) -> None:
    """Write ``folder`` whole, or not at all: config.json, generation_config.json and safetensors.

    Weights keep the model's dtype. Above ``shard_bytes`` they are cut into shards with an index.
    A uniform spec gives a folder that transformers opens; any other also gets puna.json.
    ``extra_config`` adds keys to config.json. ``packed`` writes the matrices that lie on a grid
    (``Llama.grids``) as integers in the layout of compressed-tensors.
    """
    tensors = plain_parameters(model, folder)
    grid = None
    if packed:
        grid = quantisation_config(*common_grid(model.grids, folder))
        for name, each in model.grids.items():
            tensors |= packed_tensors(name, tensors.pop(name), each, folder)
    labels = model.labels
    if labels is not None and labels.per == "word" and not labels.bias:  # transformers' class has one
        tensors[f"{SCORE}.bias"] = torch.zeros(len(labels.names), dtype=model.dtype)
    with folder_aside(folder) as aside:
        write_configs(model.spec, model.dtype, aside, extra_config, quantised=grid, labels=labels)
        _write_tensors(tensors, aside, shard_bytes)


def write_configs(
    spec: LlamaSpec,
    dtype: torch.dtype,
    folder: Path,
    extra: Mapping[str, Any] | None = None,
    *,
    quantised: Mapping[str, Any] | None = None,
    labels: LabelKind | None = None,
) -> None:
    """Write what a checkpoint folder says of its weights: all files but the weights themselves."""
    own = not spec.uniform or (labels is not None and not labels.plain)
    config = {
        **config_from_spec(spec, own=own),
        **({"quantization_config": quantised} if quantised else {}),
    }
    if labels is not None:
        config |= labels.to_config(config["architectures"][0])
    name = str(dtype).removeprefix("torch.")
    ids = {"bos_token_id": spec.bos_id, "eos_token_id": config["eos_token_id"], "pad_token_id": spec.pad_id}
    # Both names of the dtype key: transformers 5 reads the first, its elders the second.
    write_json(folder / CONFIG, {**config, "dtype": name, "torch_dtype": name, **(extra or {})})
    write_json(
        folder / "generation_config.json",
        {"_from_model_config": True, **{key: value for key, value in ids.items() if value is not None}},
    )
    if own:
        write_json(folder / OWN_CONFIG, config)


def plain_parameters(model: Llama, where: object) -> dict[str, Tensor]:
    """All parameters by name, each checked to be finite; refused with an adapter or a base in NF4."""
    held = next(quantised_layers(model), None)
    if held is not None and not any(".base_layer." in name for name, _ in model.named_parameters()):
        raise PunaError(
            "weights in NF4 are not written",
            where=where,
            found=held[0],
            fix="decode them first (puna.model.nf4.dequantize_base)",
        )
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if any(".base_layer." in name or ".prompt." in name for name in tensors):
        raise PunaError(
            "the model carries an adapter",
            where=where,
            fix="merge it first (merge_lora), or write the adapter alone (write_adapter)",
        )
    for name, tensor in tensors.items():
        check_finite(name, tensor, where)
    return tensors


def _write_tensors(tensors: dict[str, Tensor], folder: Path, shard_bytes: float) -> None:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    single = len(shards) == 1
    places: dict[str, str] = {}
    with progress("writing weights", sum(tensor.numel() for tensor in tensors.values())) as advance:
        for number, names in enumerate(shards, start=1):
            file = SINGLE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            part = {name: tensors[name].cpu().contiguous() for name in names}
            save_file(part, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(names, file)
            advance(sum(tensor.numel() for tensor in part.values()))
    if not single:
        total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        write_json(folder / INDEX, {"metadata": total, "weight_map": places})
