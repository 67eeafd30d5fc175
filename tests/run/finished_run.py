"""A run folder as the runner leaves it, with invented figures, to test what is made of one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

MODELS = ["base", "lora", "swap", "swap_trained"]
CHANGES = {"nl": [0.0, -0.123, 0.41, -0.171], "en": [0.0, 0.021, 0.55, 0.064]}
BASES = {"nl": 1.991, "en": 1.179}

RECIPE = """\
name: chocollama
system: S01
title: 'ChocoLlama: Lessons Learned From Teaching Llamas Dutch'
paper: arXiv:2412.07633
does: Teaches a Llama Dutch & measures it <honestly>.
idea: [Continue pre-training on Dutch with LoRA., Or replace the tokenizer.]
licences: ['SmolLM2-135M-Instruct: Apache-2.0.']
deviations: ['Demo: a small model.']
seed: 0
device: cpu
dtype: bfloat16
scale: demo
stages:
  dutch: {use: corpus, language: nl}
  lora: {use: train, in: {model: smollm2-135m-instruct, corpus: dutch.train}, learning_rate: 0.001}
  evaluate: {use: evaluate, in: {models: {base: smollm2-135m-instruct, lora: lora.model}}}
"""


def make(
    folder: Path, *, status: str = "done", stages: tuple[str, ...] = ("dutch", "lora", "evaluate")
) -> Path:
    """Write a run of three stages, of which ``stages`` have finished."""
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(RECIPE)
    _json(folder / "run.json", _about(status))
    lines = []
    for name in stages:
        record = {"dutch": _dutch, "lora": _lora, "evaluate": _evaluate}[name](folder / name)
        lines.append(json.dumps({"stage": name, "use": record["use"], "reused": name == "dutch"}))
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    if len(stages) == 3:
        _json(folder / "claims.json", _claims())
    return folder


def _about(status: str) -> dict[str, Any]:
    return {
        "name": "chocollama",
        "title": "ChocoLlama: Lessons Learned From Teaching Llamas Dutch",
        "system": "S01",
        "paper": "arXiv:2412.07633",
        "scale": "demo",
        "recipe": "chocollama.yaml",
        "seed": 0,
        "device": "cpu",
        "dtype": "bfloat16",
        "stages": ["dutch", "lora", "evaluate"],
        "command": ["/usr/bin/puna", "run", "chocollama", "--set", "lora.learning_rate=1e-3"],
        "versions": {"puna": "0.1.0", "python": "3.11.2", "torch": "2.13.0"},
        "machine": {"system": "Linux-6", "cpu": "EPYC", "cores": 2, "memory": 25_000_000_000},
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
        "status": status,
        "started": "2026-11-25T10:00:00+00:00",
        "finished": "2026-11-25T10:09:30+00:00",
        "seconds": 570.0,
    }


def _stage(folder: Path, use: str, seconds: float, **about: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "stage": folder.name,
        "use": use,
        "version": 1,
        "fingerprint": f"{len(folder.name):016x}",
        "parts": {"code": "c0de" * 4, "inputs": {"model": "abcd" * 4}},
        "parameters": {},
        "inputs": {},
        "outputs": {},
        "metrics": {},
        "report": {},
        "started": "2026-11-25T10:00:00+00:00",
        "seconds": seconds,
        "sessions": 1,
        "peak_memory": 2_400_000_000,
        **about,
    }
    _json(folder / "stage.json", record)
    return record


def _output(path: str, kind: str) -> dict[str, Any]:
    return {
        "path": path,
        "kind": kind,
        "fingerprint": "feed" * 4,
        "files": {"a": {"bytes": 1000, "sha256": "0"}},
    }


def _dutch(folder: Path) -> dict[str, Any]:
    counts = {"rows": 412, "words": 68_100, "bytes": 523_000}
    meta = {
        "kind": "documents",
        "counts": counts,
        "sources": {"wagtail": counts},
        "languages": {"nl": counts},
        "licences": ["BSD-3-Clause", "GPL-3.0-or-later"],
        "provenance": [{"source": "wagtail", "licence": "BSD-3-Clause", "version": "8.0.1", "files": 41}],
    }
    _json(folder / "train" / "corpus.json", meta)
    _json(
        folder / "held_out" / "corpus.json", meta | {"counts": {"rows": 48, "words": 9_000, "bytes": 60_000}}
    )
    tables = [
        {"title": "Read, kept, dropped", "columns": ["step", "read", "kept"], "rows": [["train", 430, 412]]}
    ]
    return _stage(
        folder,
        "corpus",
        4.2,
        parameters={"language": "nl", "sources": [{"asset": "wagtail"}]},
        outputs={"train": _output("train", "corpus"), "held_out": _output("held_out", "corpus")},
        metrics={"rows.train": 412.0, "leak.rows": 0.0},
        report={"tables": tables},
    )


def training_curves() -> list[dict[str, Any]]:
    """Curves as a training stage leaves them."""
    tokens = [2048 * step for step in range(1, 31)]
    losses = [2.1 + 1.4 * math.exp(-step / 9) + 0.05 * math.sin(7 * step) for step in range(30)]
    rates = [
        1e-3 * min(1, (step + 1) / 3) * (0.5 + 0.5 * math.cos(math.pi * step / 30)) for step in range(30)
    ]
    held = {"name": "nl", "x": tokens[::10], "y": [3.4, 2.6, 2.4]}
    return [
        {
            "title": "Loss",
            "x": "tokens",
            "y": "nats per token",
            "series": [{"name": "training", "x": tokens, "y": losses}, held],
        },
        {"title": "Learning rate", "x": "tokens", "y": "", "series": [{"name": "", "x": tokens, "y": rates}]},
    ]


def _lora(folder: Path) -> dict[str, Any]:
    _json(folder / "model" / "config.json", {"model_type": "llama"})
    asset = {"reference": "smollm2-135m-instruct", "origin": "asset", "fingerprint": "abcd" * 4}
    corpus = {"reference": "dutch.train", "origin": "stage", "fingerprint": "feed" * 4}
    return _stage(
        folder,
        "train",
        221.7,
        parameters={"learning_rate": 0.001, "lora": {"r": 8}},
        inputs={"model": asset, "corpus": {"dutch": corpus}},
        outputs={"model": _output("model", "model")},
        metrics={"loss": 2.104, "tokens": 61_440.0, "loss.held_out": None},
        report={
            "curves": training_curves(),
            "tables": [{"title": "Training", "columns": ["", ""], "rows": [["steps", "30"]]}],
        },
    )


def evaluation_report() -> dict[str, Any]:
    """What an evaluation leaves for the report."""
    rows, table = [], []
    for corpus, changes in CHANGES.items():
        for model, change in zip(MODELS, changes, strict=True):
            value = BASES[corpus] * (1 + change)
            row: dict[str, Any] = {
                "group": corpus,
                "label": model,
                "value": value,
                "low": value - 0.05,
                "high": value + 0.05,
            }
            if model != "base":
                half = 0.03 if (corpus, model) == ("en", "lora") else 0.012
                row["change"] = {"value": change, "low": change - half, "high": change + half}
            rows.append(row)
            ends = f"{100 * change - 1.2:+.1f}% to {100 * change + 1.2:+.1f}%" if change else ""
            table.append(
                [
                    corpus,
                    model,
                    f"{value:.3f}",
                    f"{100 * change:+.1f}%" if change else "baseline",
                    ends,
                    "47/48 (p < 0.001)",
                    "0.371",
                ]
            )
    columns = ["corpus", "model", "bits/byte", "change", "95% interval", "fewer bits on", "tokens/byte"]
    outputs = {
        "base": "De hoofdstad van Nederland is the capital of the Netherlands and one of its cities.",
        "lora": "De hoofdstad van Nederland is Amsterdam. De pagina is <b>niet</b> gevonden.",
        "swap": "",
        "swap_trained": "De hoofdstad is een nieuwe pagina.\nKlik hier om de pagina te bekijken.",
    }
    return {
        "tables": [
            {
                "title": "Before and after",
                "columns": columns,
                "rows": table,
                "note": "Lower is better. 2000 draws.",
            }
        ],
        "intervals": [{"title": "Bits per byte", "unit": "bits per byte", "baseline": "base", "rows": rows}],
        "samples": [{"label": "Dutch", "prompt": "De hoofdstad van Nederland is", "outputs": outputs}],
    }


def _evaluate(folder: Path) -> dict[str, Any]:
    metrics = {
        f"bpb.{corpus}.{model}": BASES[corpus] * (1 + change)
        for corpus, changes in CHANGES.items()
        for model, change in zip(MODELS, changes, strict=True)
    }
    base = {"reference": "smollm2-135m-instruct", "origin": "asset", "fingerprint": "abcd" * 4}
    lora = {"reference": "lora.model", "origin": "stage", "fingerprint": "feed" * 4}
    return _stage(
        folder,
        "evaluate",
        61.0,
        parameters={"max_bytes": 60_000},
        inputs={"models": {"base": base, "lora": lora}},
        outputs={"scores": _output("scores.json", "file")},
        metrics=metrics,
        report=evaluation_report(),
    )


def _claims() -> dict[str, Any]:
    def claim(
        name: str, says: str, bar: str, figure: float | None, passed: bool, note: str | None = None
    ) -> dict[str, Any]:
        return {
            "name": name,
            "says": says,
            "value": 'evaluate["bpb.nl.lora"] / evaluate["bpb.nl.base"] - 1',
            "bar": bar,
            "baseline": "the untouched model",
            "figures": {"0": figure},
            "figure": figure,
            "passed": passed,
            "note": note,
        }

    judged = [
        claim("dutch-improves", "Dutch bits per byte fall by at least 10%", "<= -0.1", -0.123, True),
        claim("english-kept", "English bits per byte rise by at most 5%", "<= 0.05", 0.064, False),
        claim("swap-against-lora", "The swap against LoRA at equal bytes", "reported", -0.0547, True),
        claim("absent", "A figure that is not there", ">= 1", None, False, "unknown metric 'x'"),
    ]
    return {"recipe": "chocollama", "scale": "demo", "seeds": [0], "passed": False, "claims": judged}


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
