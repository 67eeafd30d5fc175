"""What the native number formats cost: bits per byte of the same text, against the decoder in float32."""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.table import Table
from torch.nn import functional

WINDOW = 1024
CHARACTERS = 60_000


def bits_per_byte(read: Any, ids: list[int], size: int, start: int) -> float:
    """``read(ids)`` gives logits [time, vocab] of a window; windows do not overlap."""
    nats = 0.0
    for place in range(0, len(ids), WINDOW):
        targets = ids[place : place + WINDOW]
        inputs = [start if place == 0 else ids[place - 1], *targets[:-1]]
        nats += float(functional.cross_entropy(read(inputs), torch.tensor(targets), reduction="sum"))
    return nats / math.log(2) / size


def quality() -> Table:
    """A table of formats: bits a weight, bits per byte, and the difference to float32."""
    from pydoc_data.topics import topics

    from puna.evaluate.bits_per_byte import start_token
    from puna.model.stepper import Read
    from puna.model.steppers import make_stepper
    from puna.text.pretrained import load

    text = "\n\n".join(topics[name] for name in sorted(topics))[:CHARACTERS]
    table = Table(title=f"SmolLM2-135M-Instruct on {len(text):,} characters of Python's own documentation")
    for column in ("weights", "keys and values", "MB a step", "bits per byte", "to float32"):
        table.add_column(column)
    exact = 0.0
    formats = (
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.bfloat16, "int8"),
        (torch.bfloat16, "int4"),
    )
    for dtype, quantize in formats:
        model = load("smollm2-135m-instruct", dtype=dtype)
        assert model.tokenizer is not None
        stepper = make_stepper(model, cache_tokens=WINDOW, kernels="native", quantize=quantize)  # type: ignore[arg-type]

        def read(ids: list[int], stepper: Any = stepper) -> torch.Tensor:
            sequence = stepper.sequence()
            (hidden,) = stepper.step([Read(sequence, ids, len(ids))])
            sequence.free()
            logits: torch.Tensor = stepper.logits(hidden)
            return logits

        found = bits_per_byte(
            read, model.tokenizer.encode(text), len(text.encode()), start_token(model.tokenizer)
        )
        exact = exact or found
        kept = "float32" if dtype == torch.float32 else "bfloat16"
        name = quantize or kept
        size = f"{stepper.weight_bytes / 1e6:.0f}"
        table.add_row(name, kept, size, f"{found:.4f}", f"{100 * (found / exact - 1):+.2f}%")
    return table
