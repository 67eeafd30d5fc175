"""Arithmetic over the metrics of a run, as claims are written: ``evaluate["bpb.nl"] / base["bpb.nl"] - 1``.

Names are stages, subscripts their metrics; ``+ - * / **``, ``min``, ``max``, ``abs`` and ``mean`` are all
there is. Text is parsed by Python's ``ast`` and walked here; nothing is ever handed to ``eval``.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from puna.core.errors import PunaError, unknown_name

_LONGEST = 2_000  # characters
_DEEPEST = 60


def _mean(*values: float) -> float:
    return math.fsum(values) / len(values)


_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
}
_SIGNS: dict[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": lambda *values: min(values),
    "max": lambda *values: max(values),
    "abs": abs,
    "mean": _mean,
}
FUNCTIONS = frozenset(_FUNCTIONS)


@dataclass(frozen=True)
class Expression:
    """A parsed expression. ``metrics`` lists the (stage, metric) pairs it reads."""

    text: str
    where: str
    metrics: tuple[tuple[str, str], ...]
    tree: ast.expr

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages it reads, each once."""
        return tuple(dict.fromkeys(stage for stage, _ in self.metrics))

    def value(self, metrics: Mapping[str, Mapping[str, float]]) -> float:
        """The figure for these metrics by stage; an unknown metric or a division by zero is an error."""
        try:
            return float(_value(self.tree, metrics, self.where))
        except ZeroDivisionError:
            raise PunaError("division by zero", where=self.where, found=self.text) from None
        except (OverflowError, ValueError) as error:
            raise PunaError(f"not a finite number: {error}", where=self.where, found=self.text) from None


def parse(text: str, *, where: object) -> Expression:
    """Parse ``text``; anything but the arithmetic described above is a :class:`PunaError`."""
    place = str(where)
    if len(text) > _LONGEST:
        raise PunaError("the expression is too long", where=place, expected=f"at most {_LONGEST} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise PunaError(
            "not an expression", where=place, found=f"{text[:80]!r} ({error.msg})", expected=_EXPECTED
        ) from None
    except (RecursionError, MemoryError, ValueError):
        raise PunaError("the expression is nested too deeply", where=place) from None
    metrics: list[tuple[str, str]] = []
    _check(tree, metrics, place, 0)
    return Expression(text, place, tuple(dict.fromkeys(metrics)), tree)


_EXPECTED = 'numbers, stage["metric"], + - * / ** and min, max, abs, mean'


def _check(node: ast.expr, metrics: list[tuple[str, str]], where: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise PunaError(
            "the expression is nested too deeply", where=where, expected=f"at most {_DEEPEST} levels"
        )
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            _check(left, metrics, where, depth + 1)
            _check(right, metrics, where, depth + 1)
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _SIGNS:
            _check(operand, metrics, where, depth + 1)
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as arguments, keywords=[]) if name in _FUNCTIONS:
            if name == "abs" and len(arguments) != 1:
                raise PunaError("abs takes one number", where=where, found=ast.unparse(node))
            for argument in arguments:
                _check(argument, metrics, where, depth + 1)
        case ast.Subscript(value=ast.Name(id=stage), slice=ast.Constant(value=str() as metric)):
            metrics.append((stage, metric))
        case ast.Call(func=ast.Name(id=name)) if name not in _FUNCTIONS:
            raise unknown_name("function", name, _FUNCTIONS, where=where)
        case _:
            raise PunaError(
                "not allowed in an expression", where=where, found=_show(node), expected=_EXPECTED
            )


def _show(node: ast.expr) -> str:
    text = ast.unparse(node)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _value(node: ast.expr, metrics: Mapping[str, Mapping[str, float]], where: str) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_value(left, metrics, where), _value(right, metrics, where))
        case ast.UnaryOp(op=sign, operand=operand):
            return _SIGNS[type(sign)](_value(operand, metrics, where))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _FUNCTIONS[name](*(_value(argument, metrics, where) for argument in arguments))
        case ast.Subscript(value=ast.Name(id=stage), slice=ast.Constant(value=str() as metric)):
            return _metric(stage, metric, metrics, where)
    raise AssertionError(f"parse() let {ast.dump(node)} through")


def _metric(stage: str, metric: str, metrics: Mapping[str, Mapping[str, float]], where: str) -> float:
    if stage not in metrics:
        raise unknown_name("stage", stage, metrics, where=where)
    if metric not in metrics[stage]:
        raise unknown_name(f"metric of stage {stage!r}", metric, metrics[stage], where=where)
    return float(metrics[stage][metric])
