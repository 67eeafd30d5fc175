"""Loads a model and saves it in another format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from puna.core.errors import unknown_name

if TYPE_CHECKING:
    from puna.model.llama import Llama

FORMATS = ("hf", "gguf", "adapter")
KINDS = ("f16", "q8_0", "packed")


def convert(
    source: str | Path,
    out: str | Path,
    format: str | None = None,
    *,
    kind: str = "f16",
    dtype: str = "float32",
    device: str = "cpu",
) -> tuple[Path, Llama]:
    """Write the model ``source`` at ``out``, tokenizer and chat template included; returns path and model.

    ``format`` is "hf", "gguf" or "adapter"; None takes gguf for a name that ends so, else hf. A model
    with an adapter is merged first, in ``dtype``, unless the adapter alone is wanted.
    """
    from puna.model.adapters import merge_lora
    from puna.text.pretrained import load, save

    chosen = format or ("gguf" if Path(out).suffix == ".gguf" else "hf")
    if chosen not in FORMATS:
        raise unknown_name("format", chosen, FORMATS)
    if kind not in KINDS:
        raise unknown_name("kind of GGUF weights", kind, KINDS)
    model = load(source, dtype=dtype, device=device)
    if chosen != "adapter" and model.adapter is not None:
        merge_lora(model)
    return save(model, out, chosen, kind=kind), model  # type: ignore[arg-type]
