"""Writes the documentation that follows from recipes and stages: ``python -m puna.run.docs``.

``docs/systems/index.md`` tells all systems in one table; ``docs/systems/<name>.md`` comes from the system's
recipe and, if there is one, the snapshot of its measured claims beside it; ``docs/stages.md`` from the
registered stages; ``docs/operators.md`` from the operators and presets of curation. ``--measured runs``
renews the snapshots from run folders first; ``--check`` writes nothing and fails if something is stale.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from puna.core.errors import PunaError
from puna.core.files import read_json, write_json, write_text
from puna.core.stage import Input, Stage, all_stages, get_stage, models_of
from puna.run import claims
from puna.run.operator_docs import operators_page
from puna.run.recipe import Recipe, load, system_names
from puna.run.source import dump
from puna.run.systems import SNAPSHOTS, all_systems, describe

DOCS = SNAPSHOTS.parent


def system_page(recipe: Recipe, name: str, measured: Mapping[str, Any] | None) -> str:
    """The page of one system as Markdown."""
    header = recipe.header
    number = f"{header.system} " if header.system else ""
    parts = [f"# {number}{name}: {header.title}"]
    if header.does:
        parts.append(header.does)
    if header.paper:
        parts.append(f"Paper: {header.paper}")
    parts.append("\n".join(f"- {line}" for line in header.idea))
    parts.append(
        _code(
            "sh",
            f"puna run {name}      # demo scale\npuna prove {name}    # and judge its claims\n"
            + _plan(name, recipe),
        )
    )
    parts.append("## Stages\n\n" + _stage_rows(recipe))
    for scale in header.scales:
        settings = header.scales[scale].set
        if settings:
            parts.append(f"Scale `{scale}` sets:\n\n" + _code("yaml", dump(settings).rstrip()))
    parts.append("## Claims\n\n" + _claim_rows(recipe, measured))
    if header.deviations:
        parts.append(
            "## Deviations from the paper\n\n" + "\n".join(f"- {line}" for line in header.deviations)
        )
    if header.licences:
        parts.append("## Licences\n\n" + "\n".join(f"- {line}" for line in header.licences))
    return "\n\n".join(part for part in parts if part) + "\n"


def _plan(name: str, recipe: Recipe) -> str:
    shape = recipe.header.scales["paper"].shape if "paper" in recipe.header.scales else None
    if "paper" not in recipe.header.scales:
        return f"puna plan {name}"
    return f"puna plan {name} --scale paper --device h100" + (f" --model {shape}" if shape else "")


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _stage_rows(recipe: Recipe) -> str:
    rows = ["| stage | verb | takes | leaves |", "| --- | --- | --- | --- |"]
    for entry in recipe.stages.values():
        taken = ", ".join(f"{name}: `{reference.text}`" for name, reference in entry.references())
        left = ", ".join(f"{name} ({kind})" for name, kind in entry.stage.outputs.items())
        rows.append(
            f"| {entry.id} | [{entry.stage.name}](../stages.md#{entry.stage.name}) | {taken} | {left} |"
        )
    return "\n".join(rows)


def _claim_rows(recipe: Recipe, measured: Mapping[str, Any] | None) -> str:
    found = {claim["name"]: claim for claim in (measured or {"claims": []})["claims"]}
    rows = ["| claim | bar | measured | verdict | against |", "| --- | --- | --- | --- | --- |"]
    for claim in recipe.header.claims:
        figure, verdict = "not measured yet", ""
        last = found.get(claim.name)
        if last is not None:
            figure = claims.figure_text(last).replace("\n", " ")
            verdict = claims.verdict(last)
        rows.append(
            f"| {claim.says} | {claims.bar_of(claim)} | {figure} | {verdict} | {claim.baseline or ''} |"
        )
    if not recipe.header.claims:
        return "None."
    return "\n".join(rows) + (_seeds(measured["seeds"]) if measured else "")


def _seeds(seeds: Sequence[int]) -> str:
    said = f"\n\nMeasured with seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}."
    if len(seeds) > 1:
        said += " Verdicts are by the mean; behind +- is half of its 95% interval over seeds (Student's t)."
    return said


def stages_page() -> str:
    """The page of all stages: inputs, outputs, parameters with types, defaults and what they do."""
    parts = [
        "# Stages",
        "Each can stand in a recipe (`use: NAME`) or run alone: "
        "`puna stage NAME --in input=path --out folder key=value ...`.",
    ]
    for stage in all_stages().values():
        parts += _stage_parts(stage)
    return "\n\n".join(parts) + "\n"


def stage_page(name: str) -> str:
    """The part of that page that is about one stage."""
    return "\n\n".join(_stage_parts(get_stage(name)))


def _stage_parts(stage: Stage) -> list[str]:
    text = [line.strip() for line in (stage.function.__doc__ or "").strip().splitlines()]
    parts = [f"## {stage.name}", "\n".join(text)]
    if stage.inputs:
        parts.append(
            "Takes:\n" + "\n".join(f"- {_input_line(name, given)}" for name, given in stage.inputs.items())
        )
    if stage.outputs:
        parts.append("Leaves:\n" + "\n".join(f"- `{name}` ({kind})" for name, kind in stage.outputs.items()))
    parts.append(_parameter_rows(stage.parameters))
    for model in _inner_models(stage.parameters):
        parts += [
            f"### {stage.name}: {model.__name__}",
            (model.__doc__ or "").strip(),
            _parameter_rows(model),
        ]
    return [part for part in parts if part]


def _input_line(name: str, declared: Input) -> str:
    words = f"`{name}` ({declared.kind})"
    return (
        words + (", one or more" if declared.many else "") + (", may be absent" if declared.optional else "")
    )


def _inner_models(model: type[Any]) -> list[type[Any]]:
    """Models of parameters inside parameters, each once, in the order they are met."""
    found: list[type[Any]] = []
    waiting = [model]
    while waiting:
        for field in waiting.pop(0).model_fields.values():
            fresh = [inner for inner in models_of(field.annotation) if inner not in found]
            found += fresh
            waiting += fresh
    return found


def _parameter_rows(model: type[Any]) -> str:
    rows = ["| parameter | type | default | |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        default = (
            "required" if field.is_required() else f"`{_shown(field.get_default(call_default_factory=True))}`"
        )
        kind = _type_name(field.annotation).replace("|", "\\|")
        said = " ".join((field.description or "").split()).replace("|", "\\|")
        rows.append(f"| `{field.alias or name}` | {kind} | {default} | {said} |")
    return "\n".join(rows) if model.model_fields else ""


def _shown(value: Any) -> str:
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    value = list(value) if isinstance(value, tuple) else value
    return (
        dump(value).strip().removesuffix("...").strip() if not isinstance(value, (list, dict)) else str(value)
    )


def _type_name(annotation: Any) -> str:
    """A type as people say it: ``int or null``, ``list of text``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin in (list, tuple, set, frozenset):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        several = origin is tuple and Ellipsis not in arguments
        return ("(" if several else "list of ") + ", ".join(map(_type_name, inner)) + (")" if several else "")
    if origin is dict:
        return f"mapping to {_type_name(arguments[1])}"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", NoneType: "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def renew_snapshots(runs: Path) -> list[Path]:
    """Copy the newest measured claims of each system from ``runs`` to the documentation."""
    written = []
    for name in system_names():
        system = describe(name, runs)
        if system.measured is not None and Path(system.measured_where or "").is_relative_to(runs):
            write_json(SNAPSHOTS / f"{name}.claims.json", system.measured)
            written.append(SNAPSHOTS / f"{name}.claims.json")
    return written


def pages() -> dict[Path, str]:
    """Every generated page by its file."""
    operators = operators_page(_parameter_rows)
    found = {DOCS / "stages.md": stages_page(), DOCS / "operators.md": operators}
    for name in system_names():
        snapshot = SNAPSHOTS / f"{name}.claims.json"
        measured = read_json(snapshot) if snapshot.is_file() else None
        found[SNAPSHOTS / f"{name}.md"] = system_page(load(name), name, measured)
    found[SNAPSHOTS / "index.md"] = systems_page()
    return found


def systems_page() -> str:
    """The page of all systems: one row for each, with the verdicts of its last measured claims."""
    rows = [
        "| | system | what it does | pass | fail | reported | seeds | what fails |",
        "|" + " --- |" * 8,
    ]
    sums: Counter[str] = Counter()
    systems = all_systems(SNAPSHOTS)  # no runs lie there: what is told is what was put into the documentation
    for system in systems:
        measured = system.measured or {"claims": [], "seeds": []}
        verdicts = {claim["name"]: claims.verdict(claim) for claim in measured["claims"]}
        counts = Counter(verdicts.values())
        sums += counts
        told = [str(counts[verdict]) if verdicts else "" for verdict in _VERDICTS]
        failed = ", ".join(name for name, verdict in verdicts.items() if verdict == "FAIL")
        name = f"[{system.name}]({system.name}.md)"
        seeds = ", ".join(map(str, measured["seeds"])) or "not measured yet"
        cells = [system.header.system or "", name, system.header.does or "", *told, seeds, failed]
        rows.append("| " + " | ".join(cells) + " |")
    rows.append("| | all | | " + " | ".join(str(sums[verdict]) for verdict in _VERDICTS) + " | | |")
    intro = (
        f"The {len(systems)} published systems that come with puna, each a recipe, with what was last "
        "measured of its claims.\nA claim that fails stays. `puna prove --all` measures all of them and "
        "keeps a table of its own, with minutes."
    )
    return f"# Systems\n\n{intro}\n\n" + "\n".join(rows) + "\n"


_VERDICTS = ("pass", "FAIL", "reported")


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or with ``--check`` say which are stale."""
    parser = argparse.ArgumentParser(
        prog="python -m puna.run.docs", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--measured", type=Path, metavar="RUNS", help="renew the measured claims from run folders"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is stale")
    options = parser.parse_args(arguments)
    try:
        for file in renew_snapshots(options.measured) if options.measured else []:
            print(file)
        stale = {
            file: text
            for file, text in pages().items()
            if not file.is_file() or file.read_text(encoding="utf-8") != text
        }
        for file, text in stale.items():
            print(f"stale: {file}" if options.check else file)
            if not options.check:
                write_text(file, text)
    except PunaError as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
