"""What a training run tells: the table before it starts, and its part of metrics and report after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from puna.model.nf4 import parameter_count
from puna.text.packing import PackReport
from puna.train.checkpoint import TrainState
from puna.train.distributed import World
from puna.train.gap import gap_curves, gaps
from puna.train.loop import LoopSettings
from puna.train.settings import WITH_REFERENCE
from puna.train.sharding import is_sharded

if TYPE_CHECKING:
    from puna.model.llama import Llama

_WARMING = 10  # one of so many logged steps is left out of the steady speed


def start_table(
    model: Llama,
    trained: int,
    packed: PackReport,
    settings: LoopSettings,
    expected_memory: float,
    dtype: str,
    here: World,
) -> Table:
    """What is about to happen, for the terminal."""
    total = parameter_count(model)
    lost = [f"{count:,} rows dropped: {reason}" for reason, count in packed.dropped.items()]
    if packed.truncated:
        lost.append(f"{packed.truncated:,} tokens cut off {packed.truncated_rows:,} rows")
    early = f"; stops early, of {settings.total_steps:,} planned" if settings.stop_after else ""
    rows = {
        "model": f"{model.source}, {len(model.spec.blocks)} layers, vocabulary {model.spec.vocab_size:,}",
        "trained": f"{trained:,} of {total:,} parameters ({trained / total:.2%})",
        "computes in": f"{dtype} on {here.device}"
        + (f", {here.size} processes" if here.size > 1 else "")
        + (", weights shared out" if is_sharded(model) else ""),
        "corpus": f"{packed.used:,} rows, {packed.tokens:,} tokens, {packed.targets:,} of them learnt",
        "packed": f"{packed.rows:,} rows of {packed.length:,}, {packed.filled:.0%} full",
        "left out": "; ".join(lost) or "nothing",
        "run": f"{settings.last_step:,} steps, {settings.total_tokens:,} tokens{early}",
        "expected memory": f"{expected_memory / 1e9:.2f} GB and the process itself",
    }
    table = Table(title="training", show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def add_pairs(table: Table, packed: PackReport, objective: str) -> None:
    """What else is about to happen where ``objective`` learns from pairs of answers."""
    against = ", against the model as it is before training" if objective in WITH_REFERENCE else ""
    table.add_row("preferences", f"{packed.used // 2:,} pairs, {objective}{against}")


def metrics_of(
    lines: Sequence[dict[str, Any]], state: TrainState, trained: int, figures: Sequence[str] = ()
) -> dict[str, float]:
    """The stage's metrics: counts, first and last losses and ``figures``, speed, held-out figures
    before and after."""
    steps = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    found: dict[str, float] = {
        "steps": state.step,
        "tokens": state.tokens,
        "targets": state.targets,
        "trainable": trained,
        "seconds": state.seconds,
        "tokens_per_second": state.tokens / state.seconds,
        "tokens_per_second.steady": _steady(steps),
        "loss.first": steps[0]["loss"],
        "loss.last": steps[-1]["loss"],
        "loss.mean": sum(line["loss"] for line in steps) / len(steps),
        "peak_memory": max(line["peak_memory"] for line in steps),
    }
    for name in figures:
        found |= {f"{name}.first": steps[0][name], f"{name}.last": steps[-1][name]}
    if evaluations:
        for name in _measured(evaluations):
            found[f"before.{name}"] = evaluations[0][name]
            found[f"after.{name}"] = evaluations[-1][name]
    return found | gaps(evaluations)


def _steady(steps: Sequence[dict[str, Any]]) -> float:
    """Tokens a second without the first tenth of the logged steps, at least the first one: there kernels are
    chosen and memory is found."""
    first = steps[(len(steps) - 1) // _WARMING] if len(steps) > 1 else {"tokens": 0, "seconds": 0.0}
    return float((steps[-1]["tokens"] - first["tokens"]) / (steps[-1]["seconds"] - first["seconds"]))


def fill_report(
    report: dict[str, Any], lines: Sequence[dict[str, Any]], packed: PackReport, trained: int
) -> None:
    """Add loss and learning-rate curves and a table of the run to a stage's report."""
    steps = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    unit = "pair" if "margin" in steps[0] else "token"
    losses = [_series("training", steps, "loss")]
    names = _measured(evaluations)
    losses += [
        _series(name.removesuffix(".loss"), evaluations, name) for name in names if name.endswith(".loss")
    ]
    bits = [
        _series(name.removesuffix(".bits_per_byte"), evaluations, name)
        for name in names
        if name.endswith(".bits_per_byte")
    ]
    curves = [
        {"title": "Loss", "x": "tokens", "y": f"nats per {unit}", "series": losses},
        *(_of_pairs(title, figure, steps, evaluations) for title, figure in _PAIR_CURVES.items()),
        {"title": "Held-out text", "x": "tokens", "y": "bits per byte", "series": bits},
        {
            "title": "Learning rate",
            "x": "tokens",
            "y": "",
            "series": [_series("learning rate", steps, "learning_rate")],
        },
        {
            "title": "Gradient norm",
            "x": "tokens",
            "y": "",
            "series": [_series("gradient norm", steps, "grad_norm")],
        },
    ]
    curves += [*gap_curves(evaluations), *mixture_curves(lines)]
    report.setdefault("curves", []).extend(curve for curve in curves if curve["series"])
    last = steps[-1]
    rows: list[list[Any]] = [
        ["parameters trained", f"{trained:,}"],
        ["rows of the corpus", f"{packed.used:,} of {packed.rows_in:,}"],
        *(["rows dropped", f"{count:,}: {reason}"] for reason, count in packed.dropped.items()),
        ["tokens cut off", f"{packed.truncated:,} of {packed.truncated_rows:,} rows"],
        ["tokens trained on", f"{last['tokens']:,}, {last['targets']:,} of them learnt"],
        ["steps", f"{last['step']:,}"],
        ["tokens per second", f"{last['tokens'] / last['seconds']:,.0f}"],
        ["peak memory", f"{max(line['peak_memory'] for line in steps) / 1e9:.2f} GB"],
    ]
    report.setdefault("tables", []).append({"title": "Training", "columns": ["", ""], "rows": rows})


def mixture_curves(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens by source over the run, and the weights where feedback moved them."""
    curves = []
    for kind, prefix, title in (
        ("train", "tokens.", "Tokens by source"),
        ("mixture", "weight.", "Weights of the mixture"),
    ):
        own = [line for line in lines if line["kind"] == kind]
        names = [name for name in (own[-1] if own else {}) if name.startswith(prefix)]
        series = [_series(name.removeprefix(prefix), own, name) for name in names]
        curves.append({"title": title, "x": "tokens", "y": "", "series": series})
    return curves


_PAIR_CURVES = {
    "Reward margin": "margin",
    "Pairs with a margin above 0": "accuracy",
    "Pairs whose chosen answer is more probable": "ranking_accuracy",
}


def _of_pairs(
    title: str, figure: str, steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """A curve of a figure of pairs, in training and of each held-out corpus; of tokens it has no series."""
    series = [_series("training", steps, figure)] if figure in steps[0] else []
    names = [name for name in _measured(evaluations) if name.endswith(f".{figure}")]
    series += [_series(name.removesuffix(f".{figure}"), evaluations, name) for name in names]
    return {"title": title, "x": "tokens", "y": "", "series": series}


def _measured(evaluations: Sequence[dict[str, Any]]) -> list[str]:
    """Names of what the evaluations measured."""
    return [
        name for name in (evaluations[0] if evaluations else {}) if name not in ("step", "kind", "tokens")
    ]


def _series(name: str, lines: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    return {"name": name, "x": [line["tokens"] for line in lines], "y": [line[key] for line in lines]}
