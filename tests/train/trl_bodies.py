"""What trl's own methods need around them to run: a trainer without its constructor, a model that answers.

trl keeps its losses inside trainers' methods. A trainer made here was never constructed, so it loads
no model and no dataset; its methods are trl's. The model hands out the numbers a test fixes.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Accelerator:
    """One process on a CPU: gathering and reducing give back what they get."""

    device = torch.device("cpu")
    num_processes = 1
    is_main_process = True

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    gather_for_metrics = gather

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        return tensor

    def autocast(self) -> Any:
        import contextlib

        return contextlib.nullcontext()


def trainer(kind: type, **attributes: Any) -> Any:
    """A trainer of class ``kind`` that has only what its loss reads."""
    body = object.__new__(kind)
    defaults = {
        "model": SimpleNamespace(training=True),
        "accelerator": Accelerator(),
        "aux_loss_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in {**defaults, **attributes}.items():
        object.__setattr__(body, name, value)
    return body


def scored_model(log_probs: Tensor) -> Any:
    """A model whose fused head gives ``log_probs`` [rows, positions] for every input."""
    zeros = torch.zeros_like(log_probs).detach()
    answer = SimpleNamespace(
        log_probs=log_probs,
        entropy=zeros,
        mean_logits=zeros,
        is_top1=torch.zeros_like(zeros, dtype=torch.bool),
    )
    return lambda *inputs, **options: answer


def logits_model(logits: Tensor) -> Any:
    """A model that gives ``logits`` for every input."""
    return lambda *inputs, **options: SimpleNamespace(logits=logits)
