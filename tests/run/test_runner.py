from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import puna
from puna.core.errors import PunaError
from puna.run.lock import locked
from puna.run.recipe import load
from puna.run.record import Run
from puna.run.runner import Runner

pytestmark = pytest.mark.usefixtures("little")
ALL = ["dutch", "english", "lora", "scores"]
Recipe = Callable[..., Path]
Executed = Callable[..., list[str]]


def test_a_run_leaves_everything_the_folder_promises(recipe: Recipe) -> None:
    run = puna.run(recipe())
    assert run.folder == Path("runs/little")
    assert run["scores"]["size.nl.tuned"] > 0
    assert run.report.is_file()
    about = run.about
    assert about["status"] == "done"
    assert about["versions"]["puna"] == puna.__version__
    assert about["machine"]["cores"] >= 1
    assert about["seconds"] >= 0
    assert about["scale"] == "demo"
    record = run.stages["lora"]
    assert record.parameters["steps"] == 2
    assert record.parameters["objective"] == "clm"  # Defaults are written down too.
    assert record.inputs["held_out"]["nl"]["reference"] == "dutch.held_out"
    assert record.peak_memory > 1_000_000
    assert record.report["tables"][0]["rows"] == [[2]]
    assert set(record.outputs["model"]["files"]) == {"config.json", "weights"}
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ALL
    assert lines[2]["metrics"] == dict(record.metrics)
    assert set(run.fingerprints) == set(ALL)
    assert run.fingerprints["scores"]["inputs"]["models.tuned"] == record.outputs["model"]["fingerprint"]
    assert (run.folder / "lora/model/README.md").read_text() == "card"
    assert not list(run.folder.glob("*.work"))


def test_an_unknown_metric_or_stage_of_a_run_tells_the_nearest(recipe: Recipe) -> None:
    run = puna.run(recipe())
    with pytest.raises(PunaError, match="did you mean 'scores'"):
        run["score"]
    with pytest.raises(PunaError, match=r"did you mean 'size.nl.tuned'"):
        run["scores"]["size.nl.tunet"]


def test_a_second_run_reuses_everything(recipe: Recipe, executed: Executed) -> None:
    puna.run(recipe())
    assert executed() == ALL
    run = puna.run(recipe())
    assert executed() == []
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["reused"] for line in lines)


def test_the_time_of_all_stages_stays_when_a_later_run_reuses_them(recipe: Recipe) -> None:
    first = puna.run(recipe(), set={"lora.pause": 0.05})
    again = puna.run(recipe(), set={"lora.pause": 0.05})
    assert first.about["stage_seconds"] == again.about["stage_seconds"] == again.stage_seconds >= 0.1


def test_a_changed_parameter_runs_its_stage_and_what_follows_from_it(
    recipe: Recipe, executed: Executed
) -> None:
    puna.run(recipe())
    executed()
    puna.run(recipe(), set={"lora.learning_rate": 0.5})
    assert executed() == ["lora", "scores"]
    puna.run(recipe(), set={"lora.learning_rate": 0.5, "english.count": 8})
    assert executed() == ["english", "scores"]


def test_a_stage_whose_inputs_came_out_the_same_does_not_run_again(
    recipe: Recipe, executed: Executed
) -> None:
    puna.run(recipe())
    executed()
    puna.run(recipe(), set={"lora.objective": "sft"})  # The little stage writes the same weights for it.
    assert executed() == ["lora"]


@pytest.mark.parametrize("option", [{"seed": 1}, {"dtype": "float16"}])
def test_seed_and_number_format_belong_to_every_fingerprint(
    recipe: Recipe, executed: Executed, option: dict[str, object]
) -> None:
    puna.run(recipe())
    executed()
    puna.run(recipe(), **option)
    assert executed() == ALL


@pytest.mark.parametrize(("unit", "chosen"), [("avx512_bf16", "bfloat16"), (None, "float32")])
def test_auto_computes_in_what_the_processor_has_a_unit_for(
    recipe: Recipe, executed: Executed, monkeypatch: pytest.MonkeyPatch, unit: str | None, chosen: str
) -> None:
    monkeypatch.setattr("puna.run.machine.bfloat16_unit", lambda: unit)
    run = puna.run(recipe(), device="cpu")
    assert run.about["dtype"] == chosen
    executed()
    puna.run(recipe(), device="cpu", dtype=chosen)
    assert executed() == []  # "auto" says nothing of its own


def test_a_file_a_parameter_points_at_is_part_of_the_fingerprint(
    recipe: Recipe, executed: Executed, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("eerste")
    puna.run(recipe(), set={"dutch.file": str(text)})
    executed()
    puna.run(recipe(), set={"dutch.file": str(text)})
    assert executed() == []
    text.write_text("tweede versie")
    puna.run(recipe(), set={"dutch.file": str(text)})
    assert executed() == ["dutch", "lora", "scores"]
    with pytest.raises(PunaError, match="file not found"):
        puna.run(recipe(), set={"dutch.file": "nowhere.txt"})


def test_what_only_plans_go_by_is_written_down_and_runs_nothing_again(
    recipe: Recipe, executed: Executed
) -> None:
    puna.run(recipe())
    executed()
    run = puna.run(recipe(), set={"dutch.expected": 99})
    assert executed() == []
    assert "expected: 99" in run.recipe_text
    assert "expected" not in run.stages["dutch"].parts["parameters"]


def test_from_forces_that_stage_and_all_after_it(recipe: Recipe, executed: Executed) -> None:
    puna.run(recipe())
    executed()
    puna.run(recipe(), from_stage="english")
    assert executed() == ["english", "lora", "scores"]
    with pytest.raises(PunaError, match="did you mean 'lora'"):
        puna.run(recipe(), from_stage="lra")


def test_a_removed_or_cut_output_is_made_again(recipe: Recipe, executed: Executed) -> None:
    run = puna.run(recipe())
    executed()
    (run.folder / "lora/model/weights").write_text("cut")
    puna.run(recipe())
    assert executed() == ["lora"]  # It came out as before, so the scores stand.
    (run.folder / "dutch/train/text").unlink()
    puna.run(recipe())
    assert executed() == ["dutch"]


def test_a_new_version_of_a_stage_runs_it_again(
    recipe: Recipe, executed: Executed, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    from puna.core import stage as registry

    puna.run(recipe())
    executed()
    newer = dataclasses.replace(registry._STAGES["measure"], version=2)
    monkeypatch.setitem(registry._STAGES, "measure", newer)
    assert [d.reason for d in Runner(load(recipe()), Path("runs/little")).preview()][-1] == "version 1 -> 2"
    puna.run(recipe())
    assert executed() == ["scores"]


def test_a_preview_says_what_would_run_and_why_and_writes_nothing(recipe: Recipe) -> None:
    runner = Runner(load(recipe()), Path("runs/little"))
    assert [decision.action for decision in runner.preview()] == ["run"] * 4
    assert not Path("runs").exists()
    puna.run(recipe())
    before = sorted(Path("runs").rglob("*"))
    decisions = Runner(load(recipe(), settings={"lora.lora.r": 2}), Path("runs/little")).preview()
    assert [decision.action for decision in decisions] == ["reuse", "reuse", "run", "run"]
    assert decisions[2].reason == "lora.r 4 -> 2"
    assert "waits for lora" in decisions[3].reason
    assert sorted(Path("runs").rglob("*")) == before


def test_a_failed_stage_keeps_its_work_and_the_next_run_continues_it(recipe: Recipe) -> None:
    with pytest.raises(PunaError, match="it fails here"):
        puna.run(recipe(), set={"lora.fail_at": 1})
    assert json.loads(Path("runs/little/run.json").read_text())["status"] == "failed"
    assert Path("runs/little/lora.work/steps.txt").read_text() == "0\n"
    with pytest.raises(PunaError, match="it fails here"):
        puna.run(recipe(), set={"lora.fail_at": 1})
    assert json.loads(Path("runs/little/lora.work/work.json").read_text())["sessions"] == 2
    run = puna.run(recipe())  # Other settings: the work is wiped, not continued.
    assert run["lora"]["begun_at"] == 0
    assert not Path("runs/little/lora.work").exists()


def test_a_killed_run_continues_where_it_stood(recipe: Recipe, tmp_path: Path) -> None:
    path = recipe()
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import little_stages; little_stages.install(); little_stages.install_endings()\n"
        "import puna\n"
        f"run = puna.run({str(path)!r}, set={{'lora.steps': 12, 'lora.pause': 0.15}})\n"
        "print(run['lora']['begun_at'])\n"
    )
    steps = tmp_path / "runs/little/lora.work/steps.txt"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (steps.exists() and len(steps.read_text().split()) >= 3):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    reached = len(steps.read_text().split())
    assert reached < 12
    again = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(again.stdout) == reached
    assert "continues where it was interrupted" in again.stderr
    assert Run.open(tmp_path / "runs/little").stages["lora"].sessions == 2


def test_work_that_was_whole_when_the_process_died_is_taken(recipe: Recipe, executed: Executed) -> None:
    run = puna.run(recipe())
    executed()
    os.rename(run.folder / "lora", run.folder / "lora.work")
    puna.run(recipe())
    assert executed() == []
    assert (run.folder / "lora/stage.json").is_file()


def test_a_second_runner_is_kept_out_of_the_folder(recipe: Recipe) -> None:
    folder = Path("runs/little")
    with locked(folder, folder / ".lock"), pytest.raises(PunaError, match="another run works in this folder"):
        puna.run(recipe())
    puna.run(recipe())


def test_the_resolved_recipe_runs_as_it_is(recipe: Recipe, executed: Executed) -> None:
    first = puna.run(recipe(), scale="paper", set={"english.count": 3})
    assert first.folder == Path("runs/little-paper")
    executed(first.folder)
    again = puna.run(first.folder / "run.yaml", out="runs/again")
    assert dict(again["scores"]) == dict(first["scores"])
    assert again.stages["lora"].parameters["lora"]["r"] == 64
    assert again.stages["lora"].fingerprint == first.stages["lora"].fingerprint
    same = puna.run(first.folder / "run.yaml")  # In its own folder there is nothing to do.
    assert same.folder == first.folder
    assert executed(first.folder) == []


def test_an_output_given_by_its_path_is_the_same_input_and_its_card_does_not_count(recipe: Recipe) -> None:
    first = puna.run(recipe())
    model = first.folder / "lora" / "model"
    given = recipe(("{tuned: lora}", f"{{tuned: {model.absolute()}}}"))
    second = puna.run(given, out="runs/second")
    prints = [run.fingerprints["scores"]["inputs"]["models.tuned"] for run in (first, second)]
    assert prints[0] == prints[1]
    (model / "README.md").write_text("another card")
    assert Runner(load(given), second.folder).preview()[-1].action == "reuse"


def test_two_runs_of_one_seed_have_equal_outputs(recipe: Recipe) -> None:
    one, two, other = (puna.run(recipe(), out=f"runs/{n}", seed=s) for n, s in (("a", 1), ("b", 1), ("c", 2)))

    def weights(run: Run) -> str:
        return str(run.fingerprints["lora"]["outputs"]["model"])

    assert weights(one) == weights(two) != weights(other)


def test_an_output_a_stage_did_not_write_is_missed_by_name(recipe: Recipe) -> None:
    with pytest.raises(PunaError, match="output that stage 'lora' wrote 'adapter'"):
        puna.run(recipe(("{tuned: lora}", "{tuned: lora.adapter}")))


def test_a_metric_that_is_no_number_is_kept_as_null(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    run = puna.run(recipe(), set={"scores.factor": 1e308})
    assert run["scores"]["size.nl.tuned"] != run["scores"]["size.nl.tuned"]
    assert json.loads((run.folder / "scores/stage.json").read_text())["metrics"]["size.nl.tuned"] is None
    assert "is inf" in capsys.readouterr().err
    assert run.claims is not None and not run.claims["passed"]


def test_a_mapping_is_a_recipe_too_and_stays_as_it_was() -> None:
    given = {"name": "inline", "title": "t", "stages": {"a": {"use": "letters"}}}
    run = puna.run(given, set={"a.count": 4})
    assert run["a"]["letters"] == 8
    assert given == {"name": "inline", "title": "t", "stages": {"a": {"use": "letters"}}}


def test_a_device_that_is_not_there_is_refused(recipe: Recipe) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(PunaError, match="device 'cuda' is not there"):
        puna.run(recipe(), device="cuda")


@pytest.mark.parametrize(
    "order",
    [
        "import puna; assert callable(puna.run); import puna.run.recipe; assert callable(puna.run)",
        "import puna.run.recipe; import puna; assert callable(puna.run); assert puna.run.recipe.load",
        "from puna import run; assert callable(run); import puna.run.source; assert puna.run is run",
    ],
)
def test_the_run_room_is_also_the_verb_in_any_order_of_imports(order: str) -> None:
    subprocess.run([sys.executable, "-c", order], check=True)


@pytest.mark.slow
def test_processes_of_torchrun_join_in_distributed_stages_and_the_first_keeps_the_books(
    tmp_path: Path,
) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "name: many\ntitle: t\ndevice: cpu\nstages:\n"
        "  a: {use: letters}\n"
        "  b: {use: together, in: {corpora: a}}\n"
        "  c: {use: letters, count: 2}\n"
        "  d: {use: together, in: {corpora: c}}\n"
    )
    (tmp_path / "script.py").write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import little_stages\n"
        "little_stages.install(); little_stages.install_together(); little_stages.install_endings()\n"
        "import puna\n"
        "first = puna.run('recipe.yaml')\n"
        "again = puna.run('recipe.yaml', from_stage='d')\n"  # Reuses three stages, joins in one.
        "from puna.run.alone import run_stage\n"
        "given = {'corpora': 'runs/many/a/train'}\n"
        "alone = [run_stage('together', given, 'alone/out') for _ in range(2)]\n"  # And reuses it.
        "totals = [first['b']['total'], again['d']['total']]\n"
        "totals += [record.metrics['total'] for record in alone]\n"
        "sys.stdout.write(''.join(f'{total} ' for total in totals))\n"  # In one piece: two processes write.
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "script.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.split() == ["3.0"] * 8
    assert (tmp_path / "alone/executed.log").read_text().split() == ["together"]
    assert (tmp_path / "runs/many/executed.log").read_text().split() == ["a", "b", "c", "d", "d"]
    assert done.stderr.count("[1/4] a: letters, never ran") == 1


@pytest.mark.parametrize("name", ["dutch", "scores", "lora.work"])
def test_folders_that_no_stage_made_are_not_replaced(recipe: Recipe, executed: Executed, name: str) -> None:
    thesis = Path("mine") / name / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    with pytest.raises(PunaError, match=f"{name}: holds something that no stage made"):
        puna.run(recipe(), out="mine")
    assert thesis.read_text() == "years of work"
    assert executed() == []


def test_a_stage_that_was_killed_as_it_began_is_run(recipe: Recipe) -> None:
    Path("runs/little/lora.work").mkdir(parents=True)
    Path("runs/little/lora.work/.work.json.12345678.part").write_text("{")
    assert puna.run(recipe()).about["status"] == "done"
