"""A library of trained variants in a folder, and children assembled out of it.

``library.json`` says of which parent it is (by a hash of its weights) and which variants each layer has;
``layer-N.safetensors`` holds their weights in float32, as ``half.variant.name`` with names as in the layer,
and the layer's channels in the order of their contribution.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.files import fingerprint, read_json
from puna.edit.sub_blocks.variants import HALVES, NONE, PARENT, Half, changed, initial, of_half
from puna.model.llama import Block, Llama
from puna.model.spec import LlamaSpec
from puna.text import pretrained

META = "library.json"
ORDER = "order"
_FORMAT = 1

Choice = tuple[tuple[str, str], ...]
"""Of each layer the variants of attention and feed-forward."""


def layer_file(layer: int) -> str:
    """The name of a layer's file."""
    return f"layer-{layer}.safetensors"


def open_parent(source: str | Path, dtype: str, device: str) -> tuple[Llama, str]:
    """The parent without gradients, an adapter merged, and the hash of its weights in float32."""
    parent = pretrained.load_plain(source, device=device).eval().requires_grad_(False)
    content = hashlib.sha256()
    for name, tensor in sorted(parent.state_dict().items()):
        content.update(f"{name} {tuple(tensor.shape)}".encode())
        content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    known = fingerprint({"weights": content.hexdigest(), "spec": parent.spec.to_config()})
    return parent.to(pretrained.DTYPES[dtype]), known


class Library:
    """The variants of every layer of one parent."""

    def __init__(self, folder: Path, meta: Mapping[str, Any]) -> None:
        self.folder = folder
        self.parent: str = meta["parent"]
        self.layers: list[dict[str, list[str]]] = meta["layers"]
        self.spec = LlamaSpec.from_config(meta["spec"], where=folder / META)
        """The parent's."""

    @classmethod
    def open(cls, folder: str | Path, parent: str | None = None) -> Library:
        """The library in ``folder``, if it was made for the parent of that hash, where one is given."""
        folder = Path(folder)
        meta = read_json(folder / META)
        if not isinstance(meta, dict) or meta.get("format") != _FORMAT or "layers" not in meta:
            raise PunaError(
                "this is no library of sub-blocks", where=folder / META, expected=f"format {_FORMAT}"
            )
        if parent is not None and meta["parent"] != parent:
            raise PunaError(
                "the library was made for another parent",
                where=folder,
                found=f"weights {parent}",
                expected=f"weights {meta['parent']}",
                fix="give the model that the stage sub_blocks had",
            )
        return cls(folder, meta)

    @staticmethod
    def described(
        parent: str, spec: LlamaSpec, layers: Sequence[Mapping[Half, Sequence[str]]]
    ) -> dict[str, Any]:
        """What ``library.json`` says."""
        variants = [dict(layer) for layer in layers]
        return {"format": _FORMAT, "parent": parent, "spec": spec.to_config(), "layers": variants}

    def variants(self, layer: int, half: Half) -> list[str]:
        """Names of the variants of a half, the parent's first."""
        return self.layers[layer][half]

    def order(self, layer: int) -> list[int]:
        """The layer's channels, those that contribute most first."""
        with safe_open(self.folder / layer_file(layer), framework="pt") as file:
            return list(file.get_tensor(ORDER).tolist())

    def tensors(self, layer: int, half: Half, variant: str) -> dict[str, Tensor]:
        """Trained weights of a variant, by their names in the layer."""
        if variant == NONE:
            return {}
        prefix = f"{half}.{variant}."
        with safe_open(self.folder / layer_file(layer), framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - no mapping
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def assemble(parent: Llama, library: Library, choice: Choice, *, trained: bool = True) -> Llama:
    """The child of these choices; what stays as in the parent is shared with it, to the bit.

    A variant that the library has not learnt, such as another width, has its initial weights, and so have
    all without ``trained``.
    """
    spec = child_spec(parent.spec, choice)
    own = parent.state_dict()
    tensors = {name: tensor for name, tensor in own.items() if not name.startswith("model.layers.")}
    for layer, names in enumerate(choice):
        for half, variant in zip(HALVES, names, strict=True):
            found = half_of(parent, library, layer, half, variant, trained=trained, own=own)
            tensors |= {f"model.layers.{layer}.{name}": tensor for name, tensor in found.items()}
    child = Llama(spec, dtype=parent.dtype, device="meta")
    child.load_state_dict(tensors, strict=True, assign=True)
    child.tokenizer, child.template, child.source = parent.tokenizer, parent.template, parent.source
    return child.requires_grad_(False).eval()


def half_of(
    parent: Llama,
    library: Library,
    layer: int,
    half: Half,
    variant: str,
    *,
    trained: bool = True,
    own: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Weights of a variant in the parent's type, on its device: the parent's, the library's, or initial."""
    mine = of_half(parent.state_dict() if own is None else own, layer, half)
    if variant == PARENT:
        return mine
    if trained and variant in library.variants(layer, half):
        found = library.tensors(layer, half, variant)
    else:
        order = library.order(layer) if half == "feed_forward" else ()
        found = initial(mine, parent.spec, layer, half, variant, order)
    return {name: tensor.to(parent.device, parent.dtype) for name, tensor in found.items()}


def child_spec(spec: LlamaSpec, choice: Choice) -> LlamaSpec:
    """The spec of the child of these choices."""
    if len(choice) != len(spec.blocks):
        raise PunaError(
            "a choice names the variants of every layer",
            found=f"{len(choice)} layers",
            expected=f"{len(spec.blocks)}",
        )
    blocks = []
    for block, (attention, feed_forward) in zip(spec.blocks, choice, strict=True):
        blocks.append(changed(changed(block, "attention", attention), "feed_forward", feed_forward))
    return spec.replace(blocks=tuple(blocks))


def block_with(parent: Llama, layer: int, half: Half, variant: str, tensors: Mapping[str, Tensor]) -> Block:
    """The parent's block with one half exchanged; the other half is the parent's own modules."""
    spec = parent.spec
    blocks = list(spec.blocks)
    blocks[layer] = changed(blocks[layer], half, variant)
    with torch.device("meta"):
        block = Block(spec.replace(blocks=tuple(blocks)), layer)
    other: Half = "feed_forward" if half == "attention" else "attention"
    whole = {**of_half(parent.state_dict(), layer, other), **tensors}
    block.load_state_dict(whole, strict=True, assign=True)
    return block.requires_grad_(False).eval()
