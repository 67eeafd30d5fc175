"""Decoding methods by name, each with its validated settings."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, cast

from puna.core.errors import PunaError, unknown_name
from puna.core.stage import Parameters, validate

if TYPE_CHECKING:
    from puna.decode.lane import Steps
    from puna.decode.request import Running

MODULES = (
    "puna.decode.plain",
    "puna.decode.entropy_switching",
    "puna.decode.nudging",
    "puna.decode.feed_forward_skipping",
    "puna.decode.early_exit",
    "puna.decode.best_of",
    "puna.decode.speculative",
    "puna.decode.acceptance",
    "puna.decode.judge",
    "puna.decode.rapid",
)
"""Modules that register strategies; imported when the first name is asked for."""


class Strategy(Protocol):
    """A decoding method: from the prompt to the last token.

    ``lossless``: what it produces follows the target's own law under the request's sampling.
    """

    @property
    def name(self) -> str:
        """What the method is called."""
        ...

    @property
    def lossless(self) -> bool:
        """Whether the target's own law is kept."""
        ...

    def run(self, request: Running) -> Steps[None]:
        """Produce the text: read through lanes, emit tokens, return once ``request.emit`` says True.

        ``request.lane`` may hold a beginning of the prompt already: begin with
        ``yield from request.lane.catch_up(request.prompt)``.
        """
        ...


class StrategySettings(Parameters):
    """Base of every strategy's settings."""

    companions: ClassVar[tuple[str, ...]] = ()
    """The settings that name a model among the engine's models."""
    files: ClassVar[Mapping[str, Callable[[str], object]]] = {}
    """The settings that name a file, each with what opens it and refuses one of another kind."""

    def build(self) -> Strategy:
        """The strategy with these settings."""
        raise NotImplementedError


Settings = TypeVar("Settings", bound=type[StrategySettings])
_STRATEGIES: dict[str, type[StrategySettings]] = {}


def strategy(name: str) -> Callable[[Settings], Settings]:
    """Register a settings class as the strategy ``name``."""

    def register(settings: Settings) -> Settings:
        if name in _STRATEGIES:
            raise ValueError(f"two strategies are named {name!r}")
        _STRATEGIES[name] = settings
        return settings

    return register


def all_strategies() -> dict[str, type[StrategySettings]]:
    """Settings of every strategy by its name."""
    for module in MODULES:
        importlib.import_module(module)
    return dict(sorted(_STRATEGIES.items()))


def resolve(chosen: str | Mapping[str, Any] | StrategySettings | Strategy | None) -> Strategy:
    """The strategy that was chosen.

    By name, by a mapping with ``name`` and settings, by settings or as it is; None is plain decoding.
    """
    if chosen is None:
        chosen = "plain"
    if isinstance(chosen, str):
        chosen = {"name": chosen}
    if isinstance(chosen, Mapping):
        values = dict(chosen)
        name = values.pop("name", None)
        if not isinstance(name, str):
            raise PunaError("a strategy needs a name", found=dict(chosen), expected="a key 'name'")
        known = all_strategies()
        if name not in known:
            raise unknown_name("strategy", name, known)
        chosen = cast(StrategySettings, validate(known[name], values, where=f"strategy {name!r}"))
    return chosen.build() if isinstance(chosen, StrategySettings) else chosen
