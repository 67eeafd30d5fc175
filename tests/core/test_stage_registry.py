"""Stages are registered once, and mistakes in their parameters are told by key."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest

from puna.core import stage as module
from puna.core.errors import PunaError
from puna.core.stage import Context, Cost, Input, Outcome, Parameters, all_stages, get_stage, stage, validate


class Inner(Parameters):
    rate: float = pydantic.Field(default=0.1, gt=0)


class Circle(Parameters):
    shape: Literal["circle"] = "circle"
    radius: float


class Square(Parameters):
    shape: Literal["square"] = "square"
    side: float
    corners: int = 4


class Sample(Parameters):
    steps: int = 1
    name: str = "x"
    inner: Inner = Inner()
    shapes: list[Annotated[Circle | Square, pydantic.Field(discriminator="shape")]] = pydantic.Field(
        default_factory=list
    )

    @pydantic.model_validator(mode="after")
    def _rule(self) -> "Sample":
        if self.name == "forbidden":
            raise ValueError("this name is forbidden")
        return self


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STAGES", {})
    monkeypatch.setattr(module, "_loaded", True)


def told(values: dict[str, Any]) -> str:
    with pytest.raises(PunaError) as error:
        validate(Sample, values, where="recipe.yaml")
    return str(error.value)


def test_good_values_make_frozen_parameters() -> None:
    made = validate(Sample, {"steps": 3, "shapes": [{"shape": "square", "side": 2}]}, where="x")
    assert made.steps == 3 and isinstance(made.shapes[0], Square)
    with pytest.raises(pydantic.ValidationError):
        made.steps = 4


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"step": 3}, ["unknown key 'step'", "did you mean 'steps'?", "inner, name, shapes, steps"]),
        ({"inner": {"rte": 1}}, ["unknown key 'inner.rte'", "did you mean 'rate'?"]),
        ({"inner": {"rate": -1}}, ["key 'inner.rate'", "greater than 0", "-1"]),
        ({"steps": "many"}, ["key 'steps'", "integer", "'many'"]),
        ({"name": "forbidden"}, ["this name is forbidden"]),
        ({"shapes": [{"shape": "circle"}]}, ["key 'shapes.0.radius' is missing"]),
        ({"shapes": [{"shape": "circle", "radius": "r"}]}, ["key 'shapes.0.radius'", "'r'"]),
    ],
)
def test_a_mistake_is_told_with_place_key_and_what_was_found(
    values: dict[str, Any], words: list[str]
) -> None:
    message = told(values)
    assert message.startswith("recipe.yaml: ")
    assert all(word in message for word in words), message


def test_an_unknown_key_in_one_of_several_models_is_compared_with_that_models_keys() -> None:
    message = told({"shapes": [{"shape": "square", "side": 1, "corner": 3}]})
    assert "unknown key 'shapes.0.corner'" in message and "one of corners, shape, side" in message
    assert "did you mean 'corners'?" in message


def test_the_place_can_be_found_from_the_keys_path() -> None:
    with pytest.raises(PunaError, match=r"line of \('inner', 'rate'\)"):
        validate(Sample, {"inner": {"rate": 0}}, where=lambda path: f"line of {path}")


@pytest.mark.usefixtures("registry")
def test_a_stage_is_found_by_name_and_runs(tmp_path: Path) -> None:
    @stage(
        "double",
        parameters=Sample,
        inputs={"model": Input("model"), "texts": Input("corpus", many=True, optional=True)},
        outputs={"out": "file"},
        plan=lambda parameters, shapes: Cost(tokens=parameters.steps),
        reads=lambda parameters: [parameters.name],
    )
    def double(context: Context, parameters: Sample) -> Outcome:
        """Double the steps.

        More words.
        """
        return Outcome({"out": context.out}, {"steps": 2.0 * parameters.steps})

    found = get_stage("double")
    assert (found.summary, found.version, list(found.inputs)) == ("Double the steps.", 1, ["model", "texts"])
    assert found.plan is not None and found.plan(Sample(steps=5), None).tokens == 5
    assert found.reads is not None and list(found.reads(Sample(name="a.txt"))) == ["a.txt"]
    outcome = found.function(Context("x", tmp_path, inputs={}), Sample(steps=4))
    assert outcome.metrics == {"steps": 8.0}
    with pytest.raises(PunaError, match="did you mean 'double'"):
        get_stage("duble", where="recipe.yaml:3")
    with pytest.raises(ValueError, match="two stages"):
        stage("double", parameters=Sample)(double)
    assert list(all_stages()) == ["double"]
