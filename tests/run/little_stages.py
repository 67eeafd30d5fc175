"""Three small stages to test the runner with, in place of the real ones. No torch.

``install()`` puts them into the registry; it is called by the fixture, and by tests' subprocesses.
Each execution is noted in ``executed.log`` beside the stage's folder.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import pydantic

from puna.core import stage as registry
from puna.core.errors import PunaError
from puna.core.seeds import derive
from puna.core.stage import Context, Cost, Input, Outcome, Parameters, PlanOnly, stage


class Letters(Parameters):
    """Parameters of ``letters``."""

    count: int = pydantic.Field(10, ge=1)
    """How many letters."""
    file: str | None = None
    """A file whose text comes first."""
    upper: bool = False
    """Large letters."""
    expected: Annotated[int | None, PlanOnly()] = None
    """How many letters a plan is to count."""


class Lora(Parameters):
    """Nested settings."""

    r: int = 8
    """Rank."""
    alpha: float = 16.0
    """Scale."""


class Learn(Parameters):
    """Parameters of ``learn``."""

    steps: int = 3
    """Steps to take."""
    pause: float = 0.0
    """Seconds of each step."""
    learning_rate: float = 1e-3
    """Step size."""
    lora: Lora | None = None
    """Low-rank settings."""
    weights: dict[str, float] = pydantic.Field(default_factory=dict)
    """Weights by a name of the user's."""
    objective: Literal["clm", "sft"] = "clm"
    """What to learn."""
    fail_at: int | None = None
    """Step at which to fail."""


class Measure(Parameters):
    """Parameters of ``measure``."""

    factor: float = 1.0
    """All metrics are multiplied by it."""


def _note(context: Context) -> None:
    with (context.out.parent / "executed.log").open("a") as log:
        log.write(f"{context.name}\n")


def letters(context: Context, parameters: Letters) -> Outcome:
    """Make two corpora of letters."""
    _note(context)
    text = Path(parameters.file).read_text() if parameters.file else ""
    text += "ab" * parameters.count
    for name in ("train", "held_out"):
        folder = context.out / name
        folder.mkdir()
        (folder / "corpus.json").write_text(json.dumps({"kind": "documents"}))
        (folder / "text").write_text(text.upper() if parameters.upper else text)
    outputs = {"train": context.out / "train", "held_out": context.out / "held_out"}
    return Outcome(outputs, {"letters": float(len(text))})


def learn(context: Context, parameters: Learn) -> Outcome:
    """Learn in steps that are kept in the folder, and continue where they stand."""
    _note(context)
    steps = context.out / "steps.txt"
    done = len(steps.read_text().split()) if steps.exists() else 0
    begun_at = done
    for step in range(done, parameters.steps):
        if step == parameters.fail_at:
            raise PunaError("it fails here", where=f"step {step}")
        time.sleep(parameters.pause)
        with steps.open("a") as file:
            file.write(f"{step}\n")
    model = context.out / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    noise = derive(context.seed, context.name) % 1000 / 1e6
    (model / "weights").write_text(
        f"{parameters.learning_rate} {parameters.lora} {parameters.weights} {noise}"
    )
    context.report["tables"] = [{"title": "steps", "columns": ["steps"], "rows": [[parameters.steps]]}]
    loss = 1.0 / (1 + parameters.steps) + noise
    return Outcome({"model": model}, {"loss": loss, "begun_at": float(begun_at)})


def measure(context: Context, parameters: Measure) -> Outcome:
    """Measure every model on every corpus."""
    _note(context)
    scores: dict[str, float] = {}
    for name, model in context.inputs["models"].items():
        for corpus, folder in context.inputs["corpora"].items():
            size = len((Path(folder) / "text").read_text()) + len((Path(model) / "weights").read_text())
            scores[f"size.{corpus}.{name}"] = parameters.factor * size
    file = context.out / "scores.json"
    file.write_text(json.dumps(scores))
    return Outcome({"scores": file}, scores)


def together(context: Context, parameters: Measure) -> Outcome:
    """Add up the ranks of all processes that run it."""
    import torch
    import torch.distributed as dist

    total = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        _note(context)
        (context.out / "total").write_text(str(total.item()))
    dist.barrier()
    return Outcome({"scores": context.out / "total"}, {"total": total.item()})


def plan_letters(parameters: Letters, shapes: Any) -> Cost:
    """Letters are tokens here."""
    count = parameters.expected or parameters.count
    return Cost(tokens=count, corpora={"train": count, "held_out": count / 10})


def plan_learn(parameters: Learn, shapes: Any) -> Cost:
    """Six operations a parameter and token."""
    parameters_of_model = shapes.spec.parameter_count()
    tokens = shapes.tokens * parameters.steps
    return Cost(
        tokens=tokens,
        trainable=parameters_of_model,
        flops=6 * tokens * parameters_of_model,
        memory=16 * parameters_of_model,
        spec=shapes.spec.replace(vocab_size=shapes.spec.vocab_size + 64),
    )


def install() -> None:
    """Replace the registry by these stages, and the report by a bare file."""
    registry._STAGES.clear()
    registry._loaded = True
    stage(
        "letters",
        parameters=Letters,
        outputs={"train": "corpus", "held_out": "corpus"},
        plan=plan_letters,
        reads=lambda parameters: [parameters.file] if parameters.file else [],
    )(letters)
    stage(
        "learn",
        parameters=Learn,
        inputs={
            "model": Input("model", optional=True),
            "corpus": Input("corpus", many=True),
            "held_out": Input("corpus", many=True, optional=True),
        },
        outputs={"model": "model", "adapter": "model"},
        plan=plan_learn,
    )(learn)
    stage(
        "measure",
        parameters=Measure,
        inputs={"models": Input("model", many=True), "corpora": Input("corpus", many=True)},
        outputs={"scores": "file"},
    )(measure)


def install_together() -> None:
    """Add the distributed stage, which needs torch."""
    stage(
        "together",
        parameters=Measure,
        inputs={"corpora": Input("corpus", many=True)},
        outputs={"scores": "file"},
        distributed=True,
    )(together)


def install_endings(put: Any = None) -> None:
    """Put a bare report and card in place of the real ones, which the runner's tests are not about."""

    def write_report(folder: Path) -> Path:
        (folder / "report.html").write_text("report")
        return folder / "report.html"

    def write_card(folder: Path, model: Path) -> Path:
        (model / "README.md").write_text("card")
        return model / "README.md"

    for name, function in (("puna.run.report", write_report), ("puna.run.card", write_card)):
        module = ModuleType(name)
        if name == "puna.run.report":  # other pages are the real ones
            module.__path__ = [str(Path(registry.__file__).parent.parent / "run" / "report")]
        setattr(module, function.__name__, function)
        (put or sys.modules.__setitem__)(name, module)
