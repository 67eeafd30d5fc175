"""The page of operators and presets of the data room, from what is registered: ``docs/operators.md``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import groupby
from typing import Any

from puna.data.curate.operator import NoSettings, Operator, all_operators
from puna.data.curate.pipeline import load_pipeline, preset_about, preset_names

_KINDS = {"extract": "extractor", "map": "mapper", "score": "score", "global": "global"}


@cache
def operators_page(parameter_rows: Callable[[type[Any]], str]) -> str:
    """The page as Markdown; ``parameter_rows`` makes the table of a class of settings."""
    # Operators of one's own may be registered, too; this page is about puna's.
    own = [each for each in all_operators() if each.function.__module__.startswith("puna.")]
    operators = sorted(own, key=lambda operator: (operator.name.split(".")[0], operator.name))
    families = [(family, list(each)) for family, each in groupby(operators, lambda o: o.name.split(".")[0])]
    parts = [
        "# Operators and presets of curation",
        f"{len(operators)} operators in {len(families)} families; [curate.md](curate.md) says how they are "
        "put together. The same in a terminal: `puna data operators [NAME]`, `puna data presets [NAME]`.",
        "| family | operators |\n| --- | --- |\n"
        + "\n".join(
            f"| {family} | {', '.join(_link(operator) for operator in each)} |" for family, each in families
        ),
        "## Presets",
        "| preset | what it does | gates | source |\n| --- | --- | --- | --- |\n"
        + "\n".join(_preset_row(name) for name in preset_names()),
    ]
    for family, each in families:
        parts.append(f"## {family}")
        for operator in each:
            parts += _parts(operator, parameter_rows)
    return "\n\n".join(part for part in parts if part) + "\n"


def _anchor(operator: Operator) -> str:
    return f"{operator.name.replace('.', '')}-{_KINDS[operator.kind]}"


def _link(operator: Operator) -> str:
    return f"[{operator.name.split('.')[1]}](#{_anchor(operator)})"


def _preset_row(name: str) -> str:
    about = preset_about(name)
    gates = len(load_pipeline(name).gates())
    does, source = (str(about.get(key, "")).replace("|", "\\|") for key in ("does", "source"))
    return f"| `{name}` | {does} | {gates or 'none'} | {source} |"


def _parts(operator: Operator, parameter_rows: Callable[[type[Any]], str]) -> list[str]:
    lines = [line.strip() for line in (operator.function.__doc__ or "").strip().splitlines()]
    parts = [
        f"### {operator.name} ({_KINDS[operator.kind]})",
        "\n".join(lines),
        f"Source: {operator.source}.",
    ]
    told = [(name, meaning) for name, meaning in operator.signals.items()]
    told += [(name, f"of parts of the document: {meaning}") for name, meaning in operator.spans.items()]
    if told:
        rows = "\n".join(f"- `{operator.name}.{name}`: {meaning}" for name, meaning in told)
        parts.append(f"Stores\n{rows}")
    if operator.settings is not NoSettings:
        parts.append(parameter_rows(operator.settings))
    return parts
