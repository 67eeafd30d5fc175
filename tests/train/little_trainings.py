"""Trainings of a few steps through the stage ``train``, on a model and corpora made on the spot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from little_preferences import sentence, write_preferences
from safetensors.torch import load_file

from puna.core.seeds import numpy_generator
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import write_corpus
from puna.text import pretrained
from puna.text.template import Template
from puna.train.metrics import read_metrics
from puna.train.objectives import OBJECTIVES

CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# A run of a few steps in a few hundred tokens.
SMALL: dict[str, Any] = {
    "max_steps": 4,
    "batch_tokens": 64,
    "micro_batch_tokens": 64,
    "max_length": 32,
    "learning_rate": 1e-2,
    "dtype": "float32",
    "save_dtype": "float32",
}
LORA = {"r": 2, "alpha": 8.0}
TIMED = {"seconds", "tokens_per_second", "targets_per_second", "peak_memory"}
"""What of the metrics a clock gave."""


def write_model(folder: Path, tokenizer: Any, *, template: str | None = None) -> None:
    """A folder with a random Llama of two layers."""
    from puna.model.llama import Llama
    from puna.model.spec import BlockSpec, LlamaSpec

    block = BlockSpec(heads=4, kv_heads=2, head_dim=8, width=48)
    model = Llama(
        LlamaSpec(vocab_size=320, hidden_size=32, blocks=(block, block), tied=True, max_positions=64)
    )
    model.tokenizer = tokenizer
    model.template = Template(template, tokenizer.template_strings) if template else None
    pretrained.save(model, folder)


def write_places(root: Path, tokenizer: Any) -> dict[str, Path]:
    """A model folder and corpora of documents, conversations and preferences."""
    write_model(root / "model", tokenizer, template=CHAT)
    generator = numpy_generator(0, "stage")
    about = {"provenance": [{"source": "test", "licence": "CC0"}], "ledger": {}}
    for name, count in (("documents", 40), ("held_out", 6)):
        rows = (
            {"id": f"{name}{n}", "text": sentence(generator, 4 + n % 9), "source": "test", "language": "en"}
            for n in range(count)
        )
        write_corpus(root / name, "documents", rows, **about)
    talks = (
        {
            "id": f"talk{n}",
            "messages": [
                {"role": "user", "content": sentence(generator, 3)},
                {"role": "assistant", "content": sentence(generator, 2)},
            ],
            "source": "test",
            "language": "en",
        }
        for n in range(30)
    )
    write_corpus(root / "messages", "messages", talks, **about)
    write_preferences(root / "preferences", 20)
    return {name: root / name for name in ("model", "documents", "held_out", "messages", "preferences")}


def train(
    places: Mapping[str, Path],
    out: Path,
    *,
    held_out: bool = False,
    state: Path | None = None,
    seed: int = 0,
    name: str = "lora",
    **parameters: Any,
) -> tuple[Outcome, Context]:
    kind = OBJECTIVES[parameters.get("objective", "clm")].kind
    inputs: dict[str, Any] = {"model": str(places["model"]), "corpus": {"main": places[kind]}}
    if held_out:
        inputs["held_out"] = {"en": places["held_out"]}
    if state is not None:
        inputs["state"] = state
    stage = get_stage("train")
    context = Context(name, out, inputs, seed=seed, dtype="bfloat16")
    settings = {key: value for key, value in {**SMALL, **parameters}.items() if value is not ...}
    return stage.function(context, validate(stage.parameters, settings, where="test")), context


def weights(outcome: Outcome) -> dict[str, torch.Tensor]:
    return load_file(outcome.outputs["model"] / "model.safetensors")


def steps(out: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(out / "metrics.jsonl") if line["kind"] == "train"]
