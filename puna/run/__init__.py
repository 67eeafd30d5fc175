"""Recipes, the runner, plans, claims and reports.

The package can be called: ``puna.run("recipe.yaml", scale="demo")`` is :func:`puna.run.runner.run`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """``puna.run`` is the verb and the room: calling it runs a recipe."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from puna.run.runner import run

        return run(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
