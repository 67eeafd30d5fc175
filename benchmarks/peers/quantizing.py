"""One side of the quantisation benchmark in a process of its own.

    python -m benchmarks.peers.quantizing JOB.json

It opens the same float32 checkpoint, quantises its layers on the same token ids, and reads the same others
afterwards. What it prints last is JSON: seconds of quantising alone, nats a token, peak memory. Both sides
compute in float32.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Side = Callable[[dict[str, Any], Tensor], tuple[float, Callable[[Tensor], Tensor]]]


def puna(job: dict[str, Any], rows: Tensor) -> tuple[float, Callable[[Tensor], Tensor]]:
    """This toolkit."""
    from puna.edit.quantize.quantize import quantize
    from puna.edit.quantize.settings import Awq, Gptq, Nearest, Quantization, Uniform
    from puna.text import pretrained

    model = pretrained.load(job["model"], dtype="float32").eval()
    method = job["method"]
    settings = Quantization(
        grid=Uniform(bits=job["bits"], group=job["group"]),
        rounding=Gptq() if method == "gptq" else Nearest(),
        transform=Awq() if method == "awq" else None,
    )
    began = time.perf_counter()
    if method != "exact":
        quantize(model, settings, rows)
    return time.perf_counter() - began, model


def llmcompressor(job: dict[str, Any], rows: Tensor) -> tuple[float, Callable[[Tensor], Tensor]]:
    """llm-compressor's one-shot, block after block, as its examples have it."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Its AWQ pins memory for a GPU, which raises where there is none ("Cannot access accelerator device").
    torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign,assignment,misc]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    weights = QuantizationArgs(
        num_bits=job["bits"], type="int", symmetric=False, strategy="group", group_size=job["group"]
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    chosen: dict[str, Any] = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    modifiers = {
        "gptq": lambda: [GPTQModifier(**chosen, actorder=None)],
        "awq": lambda: [AWQModifier(**chosen)],
        "nearest": lambda: [QuantizationModifier(**chosen)],
    }
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    began = time.perf_counter()
    if job["method"] != "exact":
        oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(job["model"]),
            dataset=data,
            recipe=modifiers[job["method"]](),
            max_seq_length=rows.shape[1],
            num_calibration_samples=len(rows),
            pipeline="sequential",
        )
    return time.perf_counter() - began, lambda ids: model(ids).logits


SIDES: dict[str, Side] = {"puna": puna, "llm-compressor": llmcompressor}


@torch.no_grad()
def nats(forward: Callable[[Tensor], Tensor], ids: Tensor) -> float:
    """Mean negative log-likelihood of each token but the first of a row, row by row."""
    total = 0.0
    for row in ids:
        logs = forward(row[None])[0, :-1].float().log_softmax(-1)
        total -= float(logs.gather(1, row[1:, None]).sum())
    return total / (ids.numel() - len(ids))


def main() -> None:
    """Run the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    ids = torch.tensor(job["rows"])
    seconds, forward = SIDES[job["side"]](job, ids)
    found = nats(forward, torch.tensor(job["others"]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "nats": found, "peak": peak}))


if __name__ == "__main__":
    main()
