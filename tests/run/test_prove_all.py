"""Proving all systems: one table, whatever becomes of each, and several calls that share the work."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from puna.core.errors import PunaError
from puna.run import prove_all
from puna.run.lock import locked
from puna.run.prove import LOCK, prove
from puna.run.prove_all import Proofs, Row
from puna.run.recipe import system_names

pytestmark = pytest.mark.usefixtures("little")
Recipe = Callable[..., Path]
Systems = Callable[..., None]
Executed = Callable[..., list[str]]
CLAIMS = (
    "    baseline: a thousand\n",
    "    baseline: a thousand\n"
    "  - {name: none, says: None, value: 'lora[\"loss\"]', at_most: 0.0, seeds: 3}\n"
    "  - {name: told, says: Told, value: 'lora[\"loss\"]', report: true}\n",
)
BREAKS = ("learning_rate: 1e-3", "learning_rate: 1e-3\n    fail_at: 1")


@pytest.fixture
def systems(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systems:
    """``systems(one=[(old, new), ...], ...)`` makes the little recipe, so changed, all systems there are."""
    folder = tmp_path / "systems"
    folder.mkdir()
    monkeypatch.setattr("puna.run.recipe.SYSTEMS", folder)

    def write(**changes: list[tuple[str, str]]) -> None:
        for number, (name, replaced) in enumerate(changes.items()):
            text = recipe(*replaced).read_text()
            text = text.replace("name: little\n", f"name: {name}\nsystem: S{90 + number}\n")
            (folder / f"{name}.yaml").write_text(text)

    return write


def rows() -> dict[str, Row]:
    return {row.name: row for row in Proofs(Path("runs"), names=system_names()).overview().rows}


def test_one_table_counts_claims_by_verdict_and_minutes_over_all_seeds(systems: Systems) -> None:
    systems(one=[CLAIMS], two=[])
    found = Proofs(Path("runs")).run()
    one, two = found.rows
    assert (one.passed, one.failed, one.reported, one.failures) == (1, 1, 1, ("none",))
    assert (two.passed, two.failed, two.reported, two.failures) == (1, 0, 0, ())
    assert one.seeds == "0, 1, 2" and two.seeds == "0"
    seconds = [
        sum(json.loads(file.read_text())["stage_seconds"] for file in Path("runs").glob(f"{name}*/run.json"))
        for name in ("one", "two")
    ]
    assert [one.minutes * 60, two.minutes * 60] == pytest.approx(seconds)
    assert (found.total.passed, found.total.failed, found.total.state) == (2, 1, "2 of 2 proved")
    assert found.failed


def test_the_table_is_a_file_and_a_page_that_names_every_system(systems: Systems) -> None:
    systems(one=[CLAIMS], two=[BREAKS])
    found = Proofs(Path("runs")).run()
    text, page = (Path("runs/proofs", name).read_text() for name in ("table.md", "table.html"))
    assert text == found.markdown()
    assert "| S90 | one | proved | 1 | 1 | 1 |" in text
    assert "| S91 | two | could not run |" in text and "it fails here" in text
    assert '<a href="../one/report.html">one</a>' in page and "it fails here" in page
    assert "http:" not in page and "https:" not in page and "{{" not in page


def test_the_table_is_written_after_each_system(systems: Systems, monkeypatch: pytest.MonkeyPatch) -> None:
    systems(one=[], two=[], three=[])
    seen = []

    def watched(name: str, *arguments: object, **settings: object) -> object:
        file = Path("runs/proofs/table.md")
        seen.append(file.read_text().count("proved |") if file.is_file() else 0)
        return prove(name, *arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(prove_all, "prove", watched)
    Proofs(Path("runs")).run()
    assert seen == [0, 2, 3]  # the last row sums them up, and says so too


@pytest.mark.parametrize("bug", [False, True])
def test_a_system_that_does_not_run_is_a_row_and_not_the_end(
    systems: Systems, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bug: bool
) -> None:
    systems(one=[] if bug else [BREAKS], two=[])
    if bug:

        def wrong(name: str, *arguments: object, **settings: object) -> object:
            if name == "one":
                raise ZeroDivisionError("by nothing")
            return prove(name, *arguments, **settings)  # type: ignore[arg-type]

        monkeypatch.setattr(prove_all, "prove", wrong)
    found = Proofs(Path("runs")).run()
    one, two = found.rows
    assert one.state == "could not run" and two.state == "proved"
    assert one.failures == ("ZeroDivisionError: by nothing" if bug else "step 1: it fails here",)
    assert ("Traceback" in capsys.readouterr().err) == bug
    assert found.failed


def test_a_recipe_that_cannot_be_read_is_a_row(systems: Systems, tmp_path: Path) -> None:
    systems(one=[], two=[])
    (tmp_path / "systems/one.yaml").write_text("name: one\nstages: {")
    found = Proofs(Path("runs")).run()
    assert {row.name: row.state for row in found.rows} == {"one": "could not run", "two": "proved"}


def test_what_was_proved_is_not_run_again_and_what_was_stopped_goes_on(
    systems: Systems, executed: Executed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    systems(one=[], three=[], two=[])

    def stopped(name: str, *arguments: object, **settings: object) -> object:
        if name == "three":
            raise KeyboardInterrupt
        return prove(name, *arguments, **settings)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(prove_all, "prove", stopped)
        with pytest.raises(KeyboardInterrupt):
            Proofs(Path("runs")).run()
    assert {name: row.state for name, row in rows().items()} == {
        "one": "proved",
        "two": "not yet",
        "three": "stopped",
    }
    assert executed(tmp_path / "runs/one") == ["dutch", "english", "lora", "scores"]
    found = Proofs(Path("runs")).run()
    assert [row.state for row in found.rows] == ["proved"] * 3
    assert executed(tmp_path / "runs/one") == []
    assert executed(tmp_path / "runs/three") == ["dutch", "english", "lora", "scores"]


def test_a_system_that_failed_is_tried_again_by_the_next_call(systems: Systems, tmp_path: Path) -> None:
    systems(one=[BREAKS])
    assert Proofs(Path("runs")).run().failed
    systems(one=[])
    assert not Proofs(Path("runs")).run().failed


def test_claims_that_have_changed_since_are_not_counted(systems: Systems) -> None:
    systems(one=[], two=[])
    Proofs(Path("runs")).run()
    systems(one=[CLAIMS], two=[])
    found = rows()
    assert found["one"].state == "claims have changed since" and found["one"].passed == 0
    assert found["two"].state == "proved"


def test_a_proof_whose_process_has_died_is_stopped_and_not_in_work(systems: Systems) -> None:
    systems(one=[])
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    note = {"system": "one", "state": "in work", "error": None, "process": process.pid}
    Path("runs/proofs").mkdir(parents=True)
    Path("runs/proofs/one.json").write_text(json.dumps({**note, "asked": {}, "time": ""}))
    assert rows()["one"].state == "stopped"


def test_what_was_stopped_comes_last(systems: Systems, monkeypatch: pytest.MonkeyPatch) -> None:
    systems(one=[], three=[], two=[])
    asked: list[str] = []

    def killed(name: str, *arguments: object, **settings: object) -> object:
        asked.append(name)
        if name == "three":
            raise SystemExit
        return prove(name, *arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(prove_all, "prove", killed)
    for _ in range(2):
        with pytest.raises(SystemExit):
            Proofs(Path("runs")).run()
    assert asked == ["one", "three", "one", "two", "three"]
    assert {name: row.state for name, row in rows().items()} == {
        "one": "proved",
        "two": "proved",
        "three": "stopped",
    }


def test_what_another_process_works_on_is_left_to_it(
    systems: Systems, executed: Executed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    systems(one=[], two=[])
    with locked(Path("runs/one"), Path("runs/one") / LOCK):
        with pytest.raises(PunaError, match="another run works in this folder"):
            prove("one", "runs/one")
        found = Proofs(Path("runs")).run()
    assert {row.name: row.state for row in found.rows} == {"one": "in work elsewhere", "two": "proved"}
    assert executed(tmp_path / "runs/one") == []
    assert "in work elsewhere: one" in capsys.readouterr().err
    assert not found.failed


def test_two_calls_side_by_side_share_the_work(systems: Systems, executed: Executed, tmp_path: Path) -> None:
    names = ["a", "b", "c", "d", "e"]
    systems(**{name: [("lora: {r: 4}", "lora: {r: 4}\n    pause: 0.3"), CLAIMS] for name in names})
    (tmp_path / "script.py").write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import pathlib, little_stages\n"
        "little_stages.install(); little_stages.install_endings()\n"
        "import puna.run.recipe\n"
        f"puna.run.recipe.SYSTEMS = pathlib.Path({str(tmp_path / 'systems')!r})\n"
        "from puna.run.prove_all import Proofs\n"
        "import os, time\n"
        "pathlib.Path(f'{os.getpid()}.ready').touch()\n"
        "while len(list(pathlib.Path().glob('*.ready'))) < 2: time.sleep(0.01)\n"
        "found = Proofs(pathlib.Path('runs')).run()\n"
        "print([row.state for row in found.rows])\n"
    )
    calls = [
        subprocess.Popen(
            [sys.executable, "script.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [call.communicate(timeout=120) for call in calls]
    assert [call.returncode for call in calls] == [0, 0], said
    assert "['proved', 'proved', 'proved', 'proved', 'proved']" in "".join(out for out, _ in said)
    for name in names:  # each stage ran once, in whichever call
        assert executed(tmp_path / f"runs/{name}") == ["dutch", "english", "lora", "scores"]
        assert executed(tmp_path / f"runs/{name}-seed1") == ["dutch", "lora"]
    assert all("lora: learn, never ran" in err for _, err in said)  # and each did some of the work
    assert [row.state for row in rows().values()] == ["proved"] * 5


def test_torchrun_is_refused(systems: Systems, monkeypatch: pytest.MonkeyPatch) -> None:
    systems(one=[])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PunaError, match="cannot be proved under torchrun"):
        Proofs(Path("runs")).run()
