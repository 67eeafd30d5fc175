"""Opening and saving whole models: weights, tokenizer, chat template and stop tokens together."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from puna.core import assets
from puna.core.errors import PunaError, nearest, unknown_name
from puna.core.files import folder_aside, read_json
from puna.model.adapter_files import ADAPTER_CONFIG, prepare_base, read_adapter, write_adapter
from puna.model.adapters import AdapterState, merge_lora
from puna.model.checkpoint import check_vocabulary, detect, read_weights, write_gguf, write_hf
from puna.model.gguf_writer import GgufKind
from puna.model.labels import require_words
from puna.model.llama import Llama
from puna.text.gguf_vocabulary import gguf_metadata
from puna.text.template import Template, find_template
from puna.text.tokenizer import TOKENIZER_FILES, Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = ("hf", "gguf", "adapter")
Format = Literal["hf", "gguf", "adapter"]
SPECIAL_IDS = ("bos_id", "eos_ids", "pad_id")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def load(
    source: str | Path, *, dtype: str | torch.dtype = "float32", device: str = "cpu", **overrides: Any
) -> Llama:
    """Open a model: an asset's name, a checkpoint folder, a ``.gguf`` file, an adapter folder or a hub id.

    Sets ``tokenizer``, ``template`` and ``source`` of the model (the first two are None where the
    checkpoint has none) and makes the spec's special ids those of the tokenizer, with every stop
    token among ``eos_ids``. ``overrides`` change fields of the spec (not shapes); ``bos_id``,
    ``eos_ids`` and ``pad_id`` change the tokenizer with it (:meth:`Tokenizer.with_special_ids`). An
    adapter is put on its base and not merged; a tokenizer or template beside it takes precedence.
    """
    kind = _dtype(dtype)
    path = locate(source)
    if detect(path).kind == "adapter":
        model = _load_base(path, kind, device, overrides)
        prepare_base(model, path)
        read_adapter(model, path)
    else:
        model = read_weights(path, dtype=kind, device=device, overrides=overrides)
    tokenizer = read_tokenizer(path)
    if tokenizer is not None:
        if model.tokenizer is not None:  # an adapter's base: its stop tokens are stated beside its weights
            tokenizer = tokenizer.with_stop_tokens(_shared(model.tokenizer.stop_tokens, tokenizer))
        tokenizer = tokenizer.with_special_ids(
            {key: overrides[key] for key in SPECIAL_IDS if key in overrides}
        )
        model.tokenizer, model.template = tokenizer, find_template(tokenizer)
    model.source = str(source) if not Path(source).exists() else str(path.resolve())
    settle_tokens(model)
    return model


def load_merged(source: str | Path, *, dtype: str | torch.dtype = "float32", device: str = "cpu") -> Llama:
    """:func:`load` for decoding: an adapter is added to the weights, so that no step pays for it."""
    model = load(source, dtype=dtype, device=device)
    if isinstance(model.adapter, AdapterState):  # attention prompts are no weights, and stay
        merge_lora(model)
    return model


def load_plain(source: str | Path, *, dtype: str | torch.dtype = "float32", device: str = "cpu") -> Llama:
    """:func:`load` for what works on weights alone: an adapter is merged, attention prompts are refused."""
    model = load(source, dtype=dtype, device=device)
    if model.adapter is not None:
        merge_lora(model)
    return model


def save(
    model: Llama,
    out: str | Path,
    format: Format = "hf",
    *,
    kind: GgufKind = "f16",
    packed: bool = False,
    within: str | Path | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a model with its tokenizer, chat template and generation config; returns what was written.

    ``hf``: a folder that transformers opens. ``gguf``: a file for llama.cpp, ``out`` itself if it
    ends in ``.gguf``, else ``model-<kind>.gguf`` in that folder. ``adapter``: the adapter alone in
    PEFT's layout; it names its base by a path relative to its own folder if that lies in the folder
    ``within``, so that the two can be moved together, and holds ``weights``, by parameter, in place of
    those that the model computes with. A folder is written whole or not at all and replaces only a
    checkpoint. ``packed`` writes an ``hf`` folder with quantised matrices as integers
    (:func:`puna.model.hf.write_hf`).
    """
    target = Path(out)
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    settle_tokens(model)
    if format == "gguf":
        file = target if target.suffix == ".gguf" else target / f"model-{kind}.gguf"
        require_words(model, "a GGUF file")
        if model.tokenizer is None:
            raise PunaError("a GGUF file needs a tokenizer and the model has none", where=file)
        metadata = gguf_metadata(model.tokenizer, model.template, rows=model.spec.vocab_size)
        write_gguf(model, file, kind=kind, metadata=metadata)
        return file
    _check_replaceable(target)
    with folder_aside(target) as aside:
        if format == "hf":
            write_hf(model, aside, packed=packed)
        else:
            write_adapter(model, aside, base_name=base_name(model, target, within), weights=weights)
        if model.tokenizer is not None:
            model.tokenizer.save(
                aside, template=model.template.source if model.template is not None else None
            )
    return target


def locate(source: str | Path) -> Path:
    """The path of a model: what lies there, else an asset, which is fetched, else a hub id, downloaded."""
    name = str(source)
    path = Path(source).expanduser()
    if path.exists():
        return path
    if isinstance(source, str) and assets.is_asset(name):
        return assets.fetch(name)
    tried = f"tried it as a path ({path.absolute()}) and as an asset"
    close = nearest(name, assets.names())
    fix = f"did you mean {close!r}?" if close else "give an asset, a folder, a .gguf file or a hub id"
    if isinstance(source, Path) or not _HUB_ID.fullmatch(name) or path.suffix in (".gguf", ".safetensors"):
        raise PunaError(f"no model {name!r}", found=tried, fix=fix)
    return _from_hub(name, tried, fix)


def read_tokenizer(path: Path | str) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder or GGUF file; None if a folder holds none."""
    path = Path(path)
    if path.is_file():
        return Tokenizer.from_gguf(path)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        return None
    return Tokenizer.from_folder(path)


def required_tokenizer(where: Path | str) -> Tokenizer:
    """The tokenizer of a folder, GGUF file, asset or hub id; a :class:`PunaError` if there is none."""
    tokenizer = read_tokenizer(locate(where))
    if tokenizer is None:
        raise PunaError("there is no tokenizer here", where=where, expected="a folder with tokenizer.json")
    return tokenizer


def settle_tokens(model: Llama) -> None:
    """Make tokenizer and spec agree on special ids: every stop token counts, the template's too.

    Stop tokens that were given on opening stay as they are. Refuses a tokenizer that is larger than
    the embedding. Idempotent.
    """
    tokenizer: Tokenizer | None = model.tokenizer
    if tokenizer is None:
        return
    check_vocabulary(model, tokenizer.vocab_size)
    template: Template | None = model.template
    end = template.end_of_turn if template is not None and not tokenizer.stops_given else None
    ends = [end] if end is not None else []
    model.tokenizer = tokenizer = tokenizer.with_stop_tokens(ends)
    model.spec = model.spec.replace(
        bos_id=tokenizer.bos_id, eos_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id
    )


def _shared(tokens: Iterable[str], tokenizer: Tokenizer) -> list[str]:
    """Those of ``tokens`` that ``tokenizer`` has too."""
    return [token for token in tokens if token in tokenizer.vocabulary()]


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    return DTYPES[dtype]


def base_of(folder: Path) -> Path | str:
    """The base of an adapter: its path, or else the name of an asset or hub id as the adapter states it.

    A relative path is one from the adapter's own folder.
    """
    name = _stated_base(folder)
    beside = (folder / name).resolve()
    if beside.exists():
        return beside
    if name.startswith(".") or Path(name).is_absolute():
        raise _no_base(folder, name, f"looked for {beside}")
    return name


def _no_base(folder: Path, name: str, looked_for: object) -> PunaError:
    return PunaError(
        "the base model of this adapter is not there",
        where=folder / ADAPTER_CONFIG,
        found=f"base_model_name_or_path {name!r}; {looked_for}",
        fix="move the adapter together with its base, or write there where its base is now",
    )


def _load_base(folder: Path, dtype: torch.dtype, device: str, overrides: dict[str, Any]) -> Llama:
    """The model that an adapter belongs to."""
    base = base_of(folder)
    try:
        path = locate(base)
    except PunaError as error:
        raise _no_base(folder, str(base), f"looked for {folder / base}; {error.found}") from None
    return load(path, dtype=dtype, device=device, **overrides)


def _stated_base(folder: Path) -> str:
    config = read_json(folder / ADAPTER_CONFIG)
    name = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(name, str) or not name:
        raise PunaError(
            "the adapter does not say which model it belongs to",
            where=folder / ADAPTER_CONFIG,
            found=f"base_model_name_or_path {name!r}",
            fix="write the name or path of its base model there",
        )
    return name


def base_name(model: Llama, target: Path, within: str | Path | None) -> str:
    """How an adapter in the folder ``target`` names its base."""
    if model.source is None:
        raise PunaError(
            "an adapter must name its base model, and this model was not loaded from anywhere",
            fix="save the model itself and load it, or set model.source to where its base can be found",
        )
    base: Path | str = model.source
    relative = False
    if (Path(base) / ADAPTER_CONFIG).is_file():
        relative = not Path(_stated_base(Path(base))).is_absolute()
        base = base_of(Path(base))
    if not Path(base).exists():
        return str(base)
    path = Path(base).resolve()
    if relative or (within is not None and path.is_relative_to(Path(within).resolve())):
        return Path(os.path.relpath(path, target.resolve())).as_posix()
    return str(path)


def _check_replaceable(target: Path) -> None:
    """Refuse to replace a folder that holds something else than a checkpoint, or folders beside one."""
    if target.is_file():
        raise PunaError("there is a file of this name", where=target, expected="a folder, or none yet")
    if target.is_dir() and any(target.iterdir()):
        marks = ("config.json", "puna.json", ADAPTER_CONFIG)
        folders = any(file.is_dir() for file in target.iterdir())
        if folders or not any((target / mark).is_file() for mark in marks):
            raise PunaError(
                "this folder holds something else than a checkpoint and would be replaced",
                where=target,
                found=", ".join(sorted(file.name for file in target.iterdir())[:5]),
                fix="choose another folder",
            )


def _from_hub(name: str, tried: str, fix: str) -> Path:
    try:
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the hub's client raises its own, requests' and the system's errors
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        found = f"{tried} and on a model hub ({type(error).__name__}: {first})"
        raise PunaError(f"no model {name!r}", found=found, fix=fix) from None
