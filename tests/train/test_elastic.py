"""The stage ``train`` under torchrun: what it leaves alone, and what a killed worker changes: nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from puna.core.seeds import numpy_generator
from puna.data.corpus import write_corpus
from puna.run.alone import run_stage
from puna.text import pretrained
from puna.train.metrics import read_metrics

SETTINGS: dict[str, Any] = {
    "max_steps": 8,
    "save_steps": 2,
    "batch_tokens": 96,
    "micro_batch_tokens": 32,
    "max_length": 32,
    "packing": "off",
    "learning_rate": 1e-3,
    "dtype": "float32",
    "save_dtype": "float32",
    "sharding": "full",
}
# The second process dies by SIGKILL in the sixth step of its first life; the first one notes its steps.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from puna.run.alone import run_stage
from puna.train.optimizer import Optimizer

plain, steps, out = Optimizer.step, [], Path(sys.argv[1])
first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

def step(self, *given):
    steps.append(1)
    if sys.argv[2] == "kill" and first_life and os.environ["RANK"] == "1" and len(steps) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, *given)

Optimizer.step = step
run_stage("train", json.loads(sys.argv[3]), out, json.loads(sys.argv[4]), device="cpu")
if os.environ["RANK"] == "0":
    out.with_name(out.name + ".steps").write_text(str(len(steps)))
"""


@pytest.fixture
def given(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> dict[str, str]:
    """A model folder and corpora of documents of uneven lengths."""
    model = tiny_llama(hidden_size=32, head_dim=8)
    model.tokenizer = tiny_tokenizer
    pretrained.save(model, tmp_path / "model")
    generator = numpy_generator(0, "elastic")
    words = ["the", "cat", "sat", "on", "that", "mat", "went", "again"]
    about = {"provenance": [{"source": "test", "licence": "CC0"}], "ledger": {}}
    for name, count in (("documents", 30), ("held_out", 5)):
        texts = (" ".join(generator.choice(words, 3 + n % 11)) for n in range(count))
        rows = (
            {"id": f"{name}{n}", "text": text, "source": "test", "language": "en"}
            for n, text in enumerate(texts)
        )
        write_corpus(tmp_path / name, "documents", rows, **about)
    return {
        "model": str(tmp_path / "model"),
        "corpus": str(tmp_path / "documents"),
        "held_out": str(tmp_path / "held_out"),
    }


def torchrun(out: Path, given: dict[str, str], settings: dict[str, Any], life: str) -> str:
    script = out.with_suffix(".py")
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "--monitor-interval", "0.2", str(script), str(out), life]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, json.dumps(given), json.dumps(settings)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def lines(out: Path) -> list[dict[str, Any]]:
    kept = ("step", "kind", "tokens", "loss", "grad_norm", "held_out.loss")
    return [
        {name: line[name] for name in kept if name in line} for line in read_metrics(out / "metrics.jsonl")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"r": 2, "full": ["embed_tokens"]}])
def test_under_torchrun_as_alone_and_a_killed_worker_restarts_the_job_from_the_last_checkpoint(
    given: dict[str, str], tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    """Killed in the sixth step: all processes start again, from the checkpoint after the fourth."""
    settings = {**SETTINGS, "lora": lora}
    alone, whole, killed = (tmp_path / name for name in ("alone", "whole", "killed"))
    run_stage("train", given, alone, settings, device="cpu")
    torchrun(whole, given, settings, "live")
    torchrun(killed, given, settings, "kill")
    assert (tmp_path / "whole.steps").read_text() == "8"
    assert (tmp_path / "killed.steps").read_text() == "4"
    assert json.loads((whole / "stage.json").read_text())["sessions"] == 1
    assert json.loads((killed / "stage.json").read_text())["sessions"] == 2
    assert not (killed / "checkpoints").exists()
    left = "model", *(["adapter"] if lora else [])
    for output in left:
        name = "adapter_model" if output == "adapter" else "model"
        tensors = [load_file(place / output / f"{name}.safetensors") for place in (alone, whole, killed)]
        assert tensors[0].keys() == tensors[1].keys() == tensors[2].keys()
        for key, tensor in tensors[1].items():
            assert torch.equal(tensors[2][key], tensor), key
            assert (tensors[0][key] - tensor).abs().max() < 1e-5, key
    assert lines(killed) == lines(whole)
    for line, expected in zip(lines(whole), lines(alone), strict=True):
        assert line == pytest.approx(expected, abs=1e-4)
