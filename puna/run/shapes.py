"""The shape of a model that a plan is made for: by name, from its files, or as the recipe says."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puna.core import assets
from puna.core.errors import PunaError, nearest
from puna.model.spec import LlamaSpec
from puna.run import source

_TABLE = Path(__file__).parent / "shapes.yaml"


@functools.cache
def _table() -> Mapping[str, Any]:
    table: Mapping[str, Any] = source.read(_TABLE).value
    return table


def names() -> list[str]:
    """Names of the built-in shapes."""
    return list(_table())


def known(name: str) -> LlamaSpec | None:
    """The built-in shape of that name, or of the model with that id; None if there is none."""
    for shape, about in _table().items():
        if name == shape or name in about["also"]:
            return LlamaSpec.from_config(about["config"], where=f"shapes.yaml, {shape}")
    return None


def of_model(name: str, *, assumed: str | None = None) -> LlamaSpec:
    """The decoder behind a model's name, without its weights and without a download.

    Looks for a folder or GGUF file, a built-in shape, an asset or hub model that is already here;
    else takes the shape ``assumed``. A name that leads nowhere is an error.
    """
    found = None if Path(name).expanduser().exists() else known(name)
    if found is None:
        path = _local_path(name)
        found = of_path(path) if path is not None else known(assumed) if assumed else None
    if found is None:
        close = nearest(name, names())
        raise PunaError(
            f"the shape of model {name!r} is not known here",
            expected=f"a model on this machine, or a built-in shape: {', '.join(names())}",
            fix=f"did you mean {close!r}?" if close else "give --model, or 'shape' under the recipe's scale",
        )
    return found


def _local_path(name: str) -> Path | None:
    path = Path(name).expanduser()
    if path.exists():
        return path
    if assets.is_asset(name):
        return assets.local(assets.describe(name))
    if name.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(name, "config.json")
        return Path(config).parent if isinstance(config, str) else None
    return None


def of_path(path: Path) -> LlamaSpec:
    """The decoder in a checkpoint folder, a GGUF file, or under an adapter."""
    from puna.model.checkpoint import detect
    from puna.model.gguf_header import open_gguf
    from puna.model.gguf_layout import ROPE_FACTORS, spec_from_metadata
    from puna.model.hf import read_config

    kind = detect(path).kind
    if kind == "hf":
        return LlamaSpec.from_config(read_config(path), where=path)
    if kind == "gguf":
        file = open_gguf(path)
        tensors = {name: tensor.shape for name, tensor in file.tensors.items() if name != ROPE_FACTORS}
        # Rope factors change no size and no count of operations.
        return spec_from_metadata(file.metadata, tensors, None, path)
    from puna.text.pretrained import base_of

    return of_model(str(base_of(path)))
