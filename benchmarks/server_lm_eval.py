"""The drill's case of lm_eval: the harness as a client of the server, judged against forward passes here.

``lm_eval --model local-completions`` answers a task of a few lines of our own through the server, once by
log-likelihoods and once by generation. Its log-likelihoods must be those that the model's forward pass gives
in this process, and what it generated must be what the server says when asked directly.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

QUESTIONS = (
    ("The capital of France is", (" Paris", " Lima", " Cusco"), 0),
    ("Two plus two is", (" seven", " four", " none"), 1),
    ("The opposite of hot is", (" green", " table", " cold"), 2),
    ("The sun rises in the", (" east", " west", " soup"), 0),
)
TOKENS = 6
NATS = 0.01  # by which two orders of summing in float32 may differ, of some ten nats
_CHOICE, _WRITE = "puna_choice", "puna_write"


def program() -> str | None:
    """The harness's command, if it is installed; it needs no place in puna's own environment."""
    return shutil.which(os.environ.get("LM_EVAL", "lm_eval"))


def write_tasks(folder: Path) -> None:
    """The task in both forms, as files that the harness includes."""
    folder.mkdir()
    rows = [{"question": asked, "choices": list(choices), "gold": gold} for asked, choices, gold in QUESTIONS]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
    }
    choice = {
        **common,
        "task": _CHOICE,
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    write = {
        **common,
        "task": _WRITE,
        "output_type": "generate_until",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": TOKENS, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choice, write):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(task))  # JSON is YAML


async def run(command: str, folder: Path, port: int, name: str, tokenizer: Path) -> None:
    """Run the harness on both tasks; raises RuntimeError with its last words where it fails."""
    write_tasks(folder / "tasks")
    server = f"base_url=http://127.0.0.1:{port}/v1/completions,num_concurrent=2,max_retries=1"
    model = f"model={name},{server},tokenizer={tokenizer},tokenizer_backend=huggingface"
    words = [command, "--model", "local-completions", "--model_args", model, "--batch_size", "1"]
    words += ["--include_path", str(folder / "tasks"), "--tasks", f"{_CHOICE},{_WRITE}"]
    words += ["--output_path", str(folder / "results"), "--log_samples"]
    settings = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONPATH": ""}
    process = await asyncio.create_subprocess_exec(
        *words,
        cwd=folder,
        env={**os.environ, **settings},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:  # the drill is ended before its end
            process.kill()
    if process.returncode:
        raise RuntimeError(said.decode(errors="replace").strip().splitlines()[-1])


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    """What the harness logged of a task, in the order of the questions."""
    (file,) = (folder / "results").rglob(f"samples_{task}_*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: int(row["doc_id"]))


def log_likelihoods(folder: Path) -> list[list[float]]:
    """Of each question: the log-likelihood of each choice, as the harness has it from the server."""
    return [[float(one[0][0]) for one in row["resps"]] for row in samples(folder, _CHOICE)]


def written(folder: Path) -> list[str]:
    """What the harness had the model write to each question."""
    return [str(row["resps"][0][0]) for row in samples(folder, _WRITE)]


def expected(model: Any) -> list[list[float]]:
    """The log-likelihoods by forward passes of ``model``."""
    return [list(_of_choices(model, asked, choices)) for asked, choices, _ in QUESTIONS]


def _of_choices(model: Any, asked: str, choices: Sequence[str]) -> Iterator[float]:
    import torch

    start = model.tokenizer.encode(asked)
    for choice in choices:
        ids = model.tokenizer.encode(asked + choice)
        with torch.no_grad():
            logs = model(torch.tensor([ids]))[0].log_softmax(-1)
        yield float(sum(logs[place - 1, ids[place]] for place in range(len(start), len(ids))))


def chosen_rightly(found: Sequence[Sequence[float]]) -> int:
    """How many questions have the right choice as the likeliest."""
    return sum(
        max(range(len(values)), key=values.__getitem__) == gold
        for values, (_, _, gold) in zip(found, QUESTIONS, strict=True)
    )
