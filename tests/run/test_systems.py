"""The recipes that come with puna, and the options of the stages they are made of."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from puna.core.stage import Stage, all_stages, models_of
from puna.run import recipe, schema

PACKAGE = Path(recipe.__file__).parent.parent


def scales() -> list[tuple[str, str]]:
    names = recipe.recipe_names()
    return [(name, scale) for name in names for scale in recipe.load_header(name).scales or ("demo",)]


@pytest.mark.parametrize(("name", "scale"), scales())
def test_every_recipe_that_comes_with_puna_is_valid_at_every_scale(name: str, scale: str) -> None:
    loaded = recipe.load(name, scale)
    assert loaded.name == name
    assert recipe.load(loaded.resolved()).resolved() == loaded.resolved()


def every_parameter(stage: Stage) -> dict[Path, set[str]]:
    """Names of all options by the room that declares them."""
    found: dict[Path, set[str]] = {}
    waiting, seen = [stage.parameters], set()
    while waiting:
        model: Any = waiting.pop()
        seen.add(model)
        for name, field in model.model_fields.items():
            found.setdefault(PACKAGE / model.__module__.split(".")[1], set()).add(name)
            waiting += [inner for inner in models_of(field.annotation) if inner not in seen]
    return found


def attributes_read(folder: Path) -> set[str]:
    read: set[str] = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    return read


@pytest.mark.parametrize("name", sorted(all_stages()))
def test_every_option_of_a_stage_is_read_somewhere_in_its_room(name: str) -> None:
    stage = all_stages()[name]
    own = attributes_read(PACKAGE / stage.function.__module__.split(".")[1])
    for room, options in every_parameter(stage).items():
        assert not options - own - attributes_read(room)


@pytest.mark.parametrize("name", sorted(all_stages()))
def test_every_option_of_a_stage_is_described_and_none_hides_a_key_of_recipes(name: str) -> None:
    stage = all_stages()[name]
    properties = schema.recipe_schema()["$defs"][f"stage.{name}"]["properties"]
    undescribed = [key for key in stage.parameters.model_fields if not properties[key].get("description")]
    assert not undescribed
    assert not {"use", "in"} & set(stage.parameters.model_fields)
