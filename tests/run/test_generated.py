"""What follows from recipes and stages: the schema, the documentation, the list of systems, the doctor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import puna
from puna.core.errors import PunaError
from puna.core.stage import all_stages
from puna.run import docs, doctor, systems
from puna.run.look import system_details, systems_table
from puna.run.schema import recipe_schema

pytestmark = pytest.mark.usefixtures("little")
Recipe = Callable[..., Path]


@pytest.fixture
def catalogue(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of systems with the little recipe in it, and a place for documentation."""
    folder = tmp_path / "systems"
    folder.mkdir()
    text = recipe(
        (
            "title: A little recipe",
            "title: A little recipe\nsystem: S99\ndoes: Learns letters.\npaper: arXiv:0",
        )
    )
    (folder / "little.yaml").write_text(text.read_text())
    monkeypatch.setattr("puna.run.recipe.SYSTEMS", folder)
    monkeypatch.setattr(systems, "SNAPSHOTS", tmp_path / "docs" / "systems")
    monkeypatch.setattr(docs, "SNAPSHOTS", tmp_path / "docs" / "systems")
    monkeypatch.setattr(docs, "DOCS", tmp_path / "docs")
    return folder


def shown(*parts: Any) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in parts:
        console.print(part)
    return console.export_text()


def resolve(schema: dict[str, Any], reference: str) -> dict[str, Any]:
    found: Any = schema
    for step in reference.removeprefix("#/").split("/"):
        found = found[step]
    return dict(found)


def test_the_schema_has_every_stage_with_inputs_parameters_and_descriptions() -> None:
    schema = recipe_schema()
    entries = schema["properties"]["stages"]["additionalProperties"]["oneOf"]
    stages = [resolve(schema, entry["$ref"]) for entry in entries]
    assert [stage["properties"]["use"]["const"] for stage in stages] == ["learn", "letters", "measure"]
    learn = stages[0]
    assert learn["additionalProperties"] is False
    assert learn["required"] == ["use", "in"]
    assert learn["properties"]["in"]["required"] == ["corpus"]
    assert learn["properties"]["learning_rate"]["description"] == "Step size."
    assert learn["properties"]["objective"]["enum"] == ["clm", "sft"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["title"]["description"]


def test_every_reference_in_the_schema_leads_somewhere() -> None:
    schema = recipe_schema()
    references = [part.split('"')[0] for part in json.dumps(schema).split('"$ref": "')[1:]]
    assert len(references) > 3
    assert all(resolve(schema, reference)["type"] == "object" for reference in references)


def test_the_pages_say_what_recipe_and_stages_say(catalogue: Path) -> None:
    assert docs.main([]) == 0
    page = (docs.SNAPSHOTS / "little.md").read_text()
    for text in (
        "# S99 little: A little recipe",
        "Learns letters.",
        "arXiv:0",
        "puna prove little",
        "lora.steps: 9",
    ):
        assert text in page
    assert "| Sizes are below a thousand | <= 1 | not measured yet |" in page
    stages = (docs.DOCS / "stages.md").read_text()
    for name, stage in all_stages().items():
        assert f"## {name}" in stages
        for parameter, field in stage.parameters.model_fields.items():
            assert f"| `{parameter}` |" in stages and str(field.description) in stages
    assert "| `lora` | Lora or null | `null` | Low-rank settings. |" in stages
    assert "### learn: Lora" in stages
    assert "`held_out` (corpus), one or more, may be absent" in stages


def test_measured_claims_are_taken_over_from_runs(
    catalogue: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert docs.main(["--check"]) == 1
    puna.run("little")
    assert docs.main(["--measured", "runs"]) == 0
    assert "| pass | a thousand |" in (docs.SNAPSHOTS / "little.md").read_text()
    assert docs.main(["--check"]) == 0
    (docs.SNAPSHOTS / "little.md").write_text("old")
    capsys.readouterr()
    assert docs.main(["--check"]) == 1
    assert "stale" in capsys.readouterr().out


def test_systems_show_what_was_measured_last(catalogue: Path) -> None:
    before = systems.describe("little")
    assert before.measured is None and before.verdict == "not measured here"
    assert "not measured here" in shown(systems_table(systems.all_systems()))
    puna.run("little")
    after = systems.describe("little")
    assert after.verdict == "1 of 1 claims hold"
    text = shown(*system_details(after))
    for part in (
        "S99 little",
        "Learns letters.",
        "steps: 9",
        "Sizes are below a thousand",
        "puna run little",
    ):
        assert part in text
    with pytest.raises(PunaError, match="did you mean 'little'"):
        systems.describe("litle")


def test_the_doctor_looks_at_python_torch_memory_packages_and_cache() -> None:
    findings = {finding.what: finding for finding in doctor.examine()}
    for what in ("puna", "python", "torch", "bfloat16", "memory", "cache", "assets here", "numpy"):
        assert findings[what].found
    assert "hub" not in findings
    assert findings["torch"].state == "works"
    assert findings["memory"].found.endswith("GB") or "demo wants" in findings["memory"].found


def test_the_doctor_asks_for_the_hub_only_when_told_and_survives_its_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def silent(*_: Any, **__: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr("urllib.request.urlopen", silent)
    found = next(finding for finding in doctor.examine(hub=True) if finding.what == "hub")
    assert found.state == "note" and "no route" in found.found
