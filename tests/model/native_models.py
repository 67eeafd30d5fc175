"""Little decoders and readings that the tests of the native kernels share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from puna.core.seeds import torch_generator
from puna.model.llama import Llama
from puna.model.spec import BlockSpec, LlamaSpec
from puna.model.stepper import Read

BLOCK = BlockSpec(heads=4, kv_heads=2, head_dim=12, width=96)
UNEVEN = (
    BlockSpec(heads=9, kv_heads=3, head_dim=64, width=90, window=20),
    BlockSpec(heads=7, kv_heads=1, head_dim=34, width=33, logit_scale=0.3),
    BlockSpec(attention="none", width=30),
    BlockSpec(heads=3, kv_heads=3, head_dim=2, feed_forward="none"),
    BlockSpec(attention="linear", feed_forward="linear"),
)
SPECS = {
    "grouped, tied": LlamaSpec(320, 48, (BLOCK, BLOCK), tied=True),
    "odd sizes, all biases": LlamaSpec(
        321, 50, (BLOCK, BLOCK), tied=False, attention_bias="all", mlp_bias=True, norm_eps=1e-5
    ),
    "every layer different": LlamaSpec(77, 51, UNEVEN, tied=False, attention_bias="qkv"),
    "series and shortcuts": LlamaSpec(
        77,
        50,
        (
            dataclasses.replace(BLOCK, width=45, series=2, shortcut=5),
            dataclasses.replace(BLOCK, series=3),
            dataclasses.replace(BLOCK, kv_heads=1, shortcut=40),
            BlockSpec(heads=4, kv_heads=4, head_dim=8, feed_forward="none", shortcut=1),
        ),
        tied=True,
        attention_bias="qkv",
    ),
    "wide heads": LlamaSpec(
        64, 40, (dataclasses.replace(BLOCK, heads=2, kv_heads=1, head_dim=144),), tied=True
    ),
}


def little(spec: LlamaSpec, dtype: torch.dtype = torch.float32, seed: int = 0) -> Llama:
    """A decoder whose every weight matters: norms and biases are not what they start as."""
    model = Llama(spec, dtype=dtype, generator=torch_generator(seed, "native"))
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        numbers = torch.empty(parameter.shape)
        if "norm" in name:
            numbers.uniform_(0.5, 1.5, generator=draw)
        else:
            numbers.normal_(0, 0.12, generator=draw)
        parameter.data.copy_(numbers)
    return model.eval()


def ids_of(spec: LlamaSpec, length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = torch.randint(0, spec.vocab_size, (length,), generator=generator).tolist()
    return drawn


def cut(length: int, size: int) -> list[int]:
    return [min(size, length - start) for start in range(0, length, size)]


def hidden_of(stepper: Any, ids: Sequence[int], parts: Sequence[int]) -> Tensor:
    """Final hidden states [time, hidden] of a text read alone, in parts."""
    sequence = stepper.sequence()
    hidden, start = [], 0
    for part in parts:
        hidden += stepper.step([Read(sequence, ids[start : start + part], part)])
        start += part
    assert sequence.length == start == len(ids)
    sequence.free()
    return torch.cat(hidden)


def logits_of(model: Llama, ids: Sequence[int]) -> Tensor:
    """The decoder's own logits [time, vocab]."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([list(ids)]))[0]
    return logits
