"""What was forgotten as tables and curves over time: JSON-like, beside what an evaluation tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puna.evaluate import tables
from puna.evaluate.forgetting import Versions
from puna.evaluate.statistics import Interval

Table = dict[str, Any]


def report(versions: Versions, tokens: Mapping[str, float]) -> dict[str, Any]:
    """What ``Context.report`` holds: an evaluation's report, with further tables and the curves.

    ``tokens`` places the models on the curves' x; without it they are numbered.
    """
    found = tables.report(versions.result)
    further = [_answers(versions), _flips(versions), _moves(versions), _equal_gains(versions)]
    further.append(_distances(versions))
    found["tables"] += [table for table in further if table["rows"]]
    if versions.losses:
        # The page's tiles are those of the last item: bits per byte, where there are any.
        found["intervals"].insert(0, _drawn(versions))
    found["curves"] = _curves(versions, tokens)
    return found


def _ends(interval: Interval, form: str = ".3f") -> str:
    return f"{interval.low:{form}} to {interval.high:{form}}" if interval.known else ""


def _answers(versions: Versions) -> Table:
    rows = []
    for corpus, conversations in versions.conversations.items():
        for model in versions.result.models:
            loss = versions.response_losses[corpus, model]
            change = versions.response_changes.get((corpus, model, versions.result.baseline))
            right = versions.accuracies.get((corpus, model))
            rows.append(
                [
                    corpus,
                    model,
                    str(len(conversations)),
                    f"{loss.value:.3f}",
                    tables.percent(change.value) if change else "baseline",
                    tables.percent_ends(change) if change else "",
                    f"{100 * right.value:.1f}%" if right else "",
                    f"{100 * right.low:.1f} to {100 * right.high:.1f}" if right and right.known else "",
                ]
            )
    columns = [
        "corpus",
        "model",
        "conversations",
        "nats/token",
        "change",
        "95% interval",
        "right choices",
        "95% interval",
    ]
    note = (
        "Loss of what the assistant says; below zero is better. "
        f"Change of its nats against {versions.result.baseline}."
    )
    return {"title": "Conversations", "columns": columns, "rows": rows, "note": note}


def _flips(versions: Versions) -> Table:
    rows = [
        [
            corpus,
            other,
            model,
            tables.percent(found.change.value),
            f"{100 * found.negative.value:.1f}%",
            _ends(found.negative),
            f"{100 * found.positive.value:.1f}%",
            _ends(found.positive),
            f"{100 * found.negative_mc.value:.1f}%",
            f"{found.sign_p:.3f}",
        ]
        for (corpus, model, other), found in versions.flips.items()
    ]
    columns = ["task", "from", "to", "accuracy", "NFR", "95% interval", "PFR", "95% interval", "NFR_mc", "p"]
    note = (
        "NFR: right before and wrong after; PFR: wrong before and right after; NFR_mc: wrong after, "
        "and not as before. The accuracy changes by PFR - NFR. p: exact sign test over the flips."
    )
    return {"title": "Flips", "columns": columns, "rows": rows, "note": note}


def _moves(versions: Versions) -> Table:
    rows = [
        [
            corpus,
            other,
            model,
            f"{100 * found.positive.value:.0f}%",
            f"{found.gain:.3f}",
            f"{100 * found.negative.value:.0f}%",
            f"{found.regression:.3f}",
        ]
        for (corpus, model, other), found in versions.moves.items()
    ]
    columns = ["corpus", "from", "to", "better", "by", "worse", "by"]
    note = (
        "Shares of documents (bits/byte) and conversations (nats/token) that got better and worse, and "
        "by how much on their mean."
    )
    return {"title": "Better and worse, one by one", "columns": columns, "rows": rows, "note": note}


def _equal_gains(versions: Versions) -> Table:
    rows = [
        [model, f"{found.rise:+.4f}", f"{found.curve_rise:+.4f}", tables.percent(found.share)]
        for model, found in versions.equal_gains.items()
    ]
    equal = versions.equal
    note = "" if equal is None else f"Bits per byte of {equal.kept} that were lost, over the baseline's."
    columns = ["model", "its rise", "rise of the ordinary training", "share"]
    title = "Forgotten at equal gain" + ("" if equal is None else f" on {equal.learnt}")
    return {"title": title, "columns": columns, "rows": rows, "note": note}


def _distances(versions: Versions) -> Table:
    measured = list(versions.distances.values())
    groups = list(dict.fromkeys(group for found in measured for group in found.groups))
    rows = [["all", *(f"{found.whole:.5f}" for found in measured)]]
    rows += [
        [group, *(f"{found.groups[group]:.5f}" if group in found.groups else "" for found in measured)]
        for group in groups
    ]
    unlike = sorted({group for found in measured for group in found.unlike})
    left_out = f" Of another shape, or zero before, and not counted: {', '.join(unlike)}." if unlike else ""
    return {
        "title": f"Distance of the weights from {versions.result.baseline}",
        "columns": ["part", *versions.distances],
        "rows": rows if measured else [],
        "note": f"Frobenius norm of the difference over that of the weights before.{left_out}",
    }


def _drawn(versions: Versions) -> dict[str, Any]:
    rows = []
    for (corpus, model), loss in versions.response_losses.items():
        change = versions.response_changes.get((corpus, model, versions.result.baseline))
        row: dict[str, Any] = {"group": corpus, "label": model, **tables.ends(loss)}
        rows.append(row | ({"change": tables.ends(change)} if change else {}))
    order = {corpus: place for place, corpus in enumerate(versions.conversations)}
    rows.sort(key=lambda row: order[row["group"]])
    unit, baseline = "nats per token of answers", versions.result.baseline
    return {"title": "Loss of answers", "unit": unit, "baseline": baseline, "rows": rows}


def _curves(versions: Versions, tokens: Mapping[str, float]) -> list[dict[str, Any]]:
    models = versions.result.models
    places = [tokens[model] for model in models] if tokens else [float(n) for n in range(len(models))]
    x = "tokens trained on" if tokens else ", ".join(f"{n} {model}" for n, model in enumerate(models))
    over_time = [
        ("Bits per byte over time", "bits/byte", versions.result.intervals),
        ("Loss of answers over time", "nats/token", versions.response_losses),
        ("Right choices over time", "share", versions.accuracies),
    ]
    curves = []
    for title, unit, values in over_time:
        corpora = dict.fromkeys(corpus for corpus, _ in values)
        series = [
            {"name": corpus, "x": places, "y": [values[corpus, model].value for model in models]}
            for corpus in corpora
        ]
        if series:
            curves.append({"title": title, "x": x, "y": unit, "series": series})
    layers = [
        {"name": model, "x": [float(layer) for layer, _ in points], "y": [value for _, value in points]}
        for model, found in versions.distances.items()
        if (
            points := sorted(
                (int(group.removeprefix("layers.")), value)
                for group, value in found.groups.items()
                if group.startswith("layers.")
            )
        )
    ]
    if layers:
        title = f"Distance from {versions.result.baseline} by layer"
        curves.append({"title": title, "x": "layer", "y": "relative distance", "series": layers})
    return curves
