"""Checkpoints in any form: which form a path holds, and the one way to open each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from puna.core.errors import PunaError
from puna.core.files import read_json
from puna.model.adapter_files import ADAPTER_CONFIG, read_adapter
from puna.model.gguf_header import MAGIC, read_gguf_metadata
from puna.model.gguf_reader import open_gguf_weights, read_gguf
from puna.model.gguf_writer import write_gguf
from puna.model.hf import CONFIG, OWN_CONFIG, open_hf, read_hf, refuse_pickle, write_hf
from puna.model.llama import Llama
from puna.model.spec import LlamaSpec
from puna.model.weights import WeightSource, check_shapes, expected_shapes

__all__ = [
    "Detection",
    "check_vocabulary",
    "detect",
    "open_weights",
    "read_gguf_metadata",
    "read_weights",
    "write_gguf",
    "write_hf",
]

CheckpointKind = Literal["hf", "gguf", "adapter"]


@dataclass(frozen=True)
class Detection:
    """What a path holds and what told so; printed, it is one line."""

    path: Path
    kind: CheckpointKind
    reason: str

    def __str__(self) -> str:
        names = {
            "hf": "a Hugging Face checkpoint folder",
            "gguf": "a GGUF file",
            "adapter": "a PEFT adapter folder",
        }
        return f"{self.path}: {names[self.kind]} ({self.reason})"


def detect(path: Path | str) -> Detection:
    """Tell the form of a checkpoint from its content, not from its name."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) == MAGIC:
                return Detection(path, "gguf", "it starts with 'GGUF'")
        refuse_pickle(path)
        raise PunaError(
            "not a checkpoint",
            where=path,
            expected="a GGUF file or a folder",
            fix="give the folder that holds the file and its config.json"
            if path.suffix == ".safetensors"
            else None,
        )
    if not path.is_dir():
        raise PunaError("no such file or folder", where=path)
    if (path / ADAPTER_CONFIG).exists():
        return Detection(path, "adapter", f"it holds {ADAPTER_CONFIG}")
    for name in (OWN_CONFIG, CONFIG):
        if (path / name).exists():
            return Detection(path, "hf", f"it holds {name}")
    names = sorted(file.name for file in path.iterdir())
    ggufs = [name for name in names if name.endswith(".gguf")]
    refuse_pickle(path)
    raise PunaError(
        "no checkpoint in this folder" if names else "the folder is empty",
        where=path,
        found=", ".join(names[:5]) or None,
        expected=f"{CONFIG} with safetensors, or {ADAPTER_CONFIG}",
        fix=f"give the file itself: {path / ggufs[0]}" if ggufs else None,
    )


def read_weights(
    path: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    overrides: Mapping[str, Any] | None = None,
    open_base: Callable[[str], Llama] | None = None,
) -> Llama:
    """Open a checkpoint folder, a GGUF file or an adapter folder as a decoder in evaluation mode.

    ``overrides`` change fields of the spec before the weights are read (a new rope rule, window or
    length; not a shape). The base of an adapter is opened by ``open_base``, called with the name
    that the adapter gives; dtype, device and overrides of the base are that function's business.
    """
    detection = detect(path)
    if detection.kind == "adapter":
        return _read_adapter_on_base(detection.path, open_base)

    def adjust(spec: LlamaSpec) -> LlamaSpec:
        return spec.replace(**overrides) if overrides else spec

    read = read_gguf if detection.kind == "gguf" else read_hf
    return read(detection.path, dtype=dtype, device=device, adjust=adjust)


def open_weights(path: Path | str) -> tuple[LlamaSpec, WeightSource]:
    """The spec of a checkpoint folder or GGUF file, and its weights to be read one by one, in parts.

    Names and shapes are checked as :func:`read_weights` does; finite numbers are the reader's business.
    """
    detection = detect(path)
    if detection.kind == "adapter":
        raise PunaError(
            "an adapter is no whole model",
            where=detection.path,
            fix="name its base together with it, or merge it first",
        )
    opened = open_gguf_weights if detection.kind == "gguf" else open_hf
    spec, source = opened(detection.path)
    check_shapes(expected_shapes(spec, source.where), source.shapes, source.where)
    return spec, source


def _read_adapter_on_base(folder: Path, open_base: Callable[[str], Llama] | None) -> Llama:
    config = read_json(folder / ADAPTER_CONFIG)
    name = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(name, str) or not name or open_base is None:
        raise PunaError(
            "the adapter does not say which model it belongs to",
            where=folder / ADAPTER_CONFIG,
            found=f"base_model_name_or_path {name!r}",
            fix="open its base model first, then read_adapter(model, folder)",
        )
    model = open_base(name)
    read_adapter(model, folder)
    return model


def check_vocabulary(model: Llama, tokenizer_size: int) -> None:
    """Refuse a tokenizer whose largest id has no row in the embedding. Spare rows are fine."""
    if tokenizer_size > model.spec.vocab_size:
        raise PunaError(
            "the tokenizer is larger than the embedding",
            where=model.source,
            found=f"{tokenizer_size:,} tokens",
            expected=f"at most {model.spec.vocab_size:,}, the rows of the embedding",
            fix="use the tokenizer of this checkpoint, or extend the vocabulary of the model",
        )
