"""JSON Schema of recipes, made from the registered stages, for editors and checkers."""

from __future__ import annotations

from typing import Any

from puna.core.stage import Input, Stage, all_stages
from puna.run.recipe import Header

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_REFERENCE = {"type": "string", "description": "A stage, stage.output, a path, an asset, or a hub id."}


def recipe_schema() -> dict[str, Any]:
    """The schema of a recipe, every stage's parameters with types, defaults and descriptions."""
    schema = Header.model_json_schema()
    definitions: dict[str, Any] = schema.pop("$defs", {})
    entries = []
    for stage in all_stages().values():
        parameters = stage.parameters.model_json_schema(ref_template=f"#/$defs/{stage.name}.{{model}}")
        for name, inner in parameters.pop("$defs", {}).items():
            definitions[f"{stage.name}.{name}"] = inner
        definitions[f"stage.{stage.name}"] = _stage_schema(stage, parameters)
        entries.append({"$ref": f"#/$defs/stage.{stage.name}"})
    schema["properties"]["stages"]["additionalProperties"] = {"oneOf": entries}
    return {"$schema": _DIALECT, **schema, "title": "A puna recipe", "$defs": definitions}


def _stage_schema(stage: Stage, parameters: dict[str, Any]) -> dict[str, Any]:
    inputs = {name: _input_schema(declared) for name, declared in stage.inputs.items()}
    needed = [name for name, declared in stage.inputs.items() if not declared.optional]
    own: dict[str, Any] = {"use": {"const": stage.name, "description": stage.summary}}
    if inputs:
        own["in"] = {
            "type": "object",
            "properties": inputs,
            "required": needed,
            "additionalProperties": False,
        }
    required = ["use", *(["in"] if needed else []), *parameters.get("required", [])]
    return {
        "type": "object",
        "title": stage.name,
        "description": stage.summary,
        "properties": {**own, **parameters.get("properties", {})},
        "required": required,
        "additionalProperties": False,
    }


def _input_schema(declared: Input) -> dict[str, Any]:
    described = f"{'One or more' if declared.many else 'One'} of kind {declared.kind}."
    if not declared.many:
        return {**_REFERENCE, "description": f"{described} {_REFERENCE['description']}"}
    forms = [_REFERENCE, {"type": "array", "items": _REFERENCE}]
    return {
        "description": described,
        "anyOf": [*forms, {"type": "object", "additionalProperties": _REFERENCE}],
    }
