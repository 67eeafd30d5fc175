"""What the commands share: options of several of them, settings given as text, and printing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

from puna.core.errors import PunaError

Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N, mps.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]
Quantized = Annotated[
    str | None, typer.Option("--quantize", metavar="int8|int4", help="Weights as integers.")
]
Kernels = Annotated[
    str, typer.Option(metavar="auto|native|plain", help="What runs the steps: C++ kernels, or torch.")
]
Companions = Annotated[
    list[str] | None,
    typer.Option("--companion", metavar="NAME=MODEL", help="A model for strategies, as draft. Repeatable."),
]


def parse_settings(items: Iterable[str] | None) -> dict[str, Any]:
    """``key=value`` texts as settings, values typed as in YAML."""
    from puna.run.source import parse_value

    found: dict[str, Any] = {}
    for item in items or ():
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise PunaError("not a setting", where=item, expected="key=value")
        found[key.strip()] = parse_value(value, f"setting {item}")
    return found


def show(*parts: Any) -> None:
    """Print texts as they are and tables as tables; without a terminal tables are wide enough to grep.

    Of the processes that torchrun started the first one prints.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(markup=False, emoji=False, highlight=False, width=160)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def named_paths(items: Sequence[str], option: str) -> dict[str, str]:
    """``NAME=path`` of an option by name."""
    found: dict[str, str] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not equals or not name or not path:
            raise PunaError("not a name and a path", where=option, found=item, expected="NAME=path")
        if name in found:
            raise PunaError(f"two are called {name!r}", where=option)
        found[name] = path
    return found
