"""What the server tells of the decoding methods that requests may name, and what each still lacks here."""

from __future__ import annotations

from typing import Any

import pydantic

from puna.core.errors import PunaError
from puna.decode.strategy import StrategySettings, all_strategies
from puna.serve.heads import Heads
from puna.serve.house import House


def strategy_cards(house: House) -> list[dict[str, Any]]:
    """Every decoding method: its settings, and whether this server has the models and files it needs."""
    engines = [served.engine for served in house.catalog.values()]
    models = [name for name in engines[0].models if all(name in engine.models for engine in engines)]
    return [_card(name, settings, models, house.heads) for name, settings in all_strategies().items()]


def _card(name: str, settings: type[StrategySettings], models: list[str], heads: Heads) -> dict[str, Any]:
    schema = settings.model_json_schema()
    described = schema.get("properties", {})
    missing = []
    for key in settings.companions:
        described[key]["enum"] = models
        usual = settings.model_fields[key].default
        if usual not in models:
            missing.append(f"the model {usual!r} (--companion {usual}=MODEL)")
    example: dict[str, str] = {}
    for key in settings.files:
        needed = settings.model_fields[key].is_required()
        fitting = heads.fitting(name, key)
        described[key]["enum"] = [*fitting, *([] if needed else [None])]
        if fitting:
            example[key] = fitting[0]
        elif needed:
            missing.append(f"a trained head (--head NAME=PATH), named by the setting {key!r}")
    return {
        "name": name,
        "lossless": _lossless(settings),
        "says": (settings.__doc__ or "").strip().partition("\n")[0],
        "missing": missing,
        "example": example,
        "settings": schema,
    }


def _lossless(settings: type[StrategySettings]) -> bool | None:
    """Whether the method keeps the model's own law at its default settings; None where it has none."""
    try:
        return settings().build().lossless
    except (pydantic.ValidationError, PunaError):
        return None
