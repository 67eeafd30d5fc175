"""The command line: what it prints, how it fails, and how little it imports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "run"))

from little_fixtures import executed, little, quick_garbage, recipe

from puna import cli
from puna.run import alone

__all__ = ["executed", "little", "quick_garbage", "recipe"]
pytestmark = pytest.mark.usefixtures("little")
Recipe = Callable[..., Path]
Executed = Callable[..., list[str]]
Puna = Callable[..., tuple[int, str, str]]
FAILING = ("at_most: 1.0", "at_least: 1.0")


@pytest.fixture
def puna(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Puna:
    """``puna("run", ...)`` gives exit code, standard output and error output."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["puna", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def in_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


HEAVY = ("torch", "transformers", "numpy", "pyarrow", "yaml", "rich", "peft", "matplotlib")


def test_importing_puna_imports_nothing_heavy() -> None:
    code = f"import sys, puna; print([name for name in {HEAVY} if name in sys.modules])"
    assert in_process(code) == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['puna', *{arguments}]\n"
        "from puna import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert in_process(code).splitlines()[-1] == "[]"


def test_reading_recipes_and_listing_systems_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['puna', 'systems']\n"
        "from puna import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    assert in_process(code).splitlines()[-1] == "False"


def test_run_prints_progress_claims_and_the_report(puna: Puna, recipe: Recipe) -> None:
    code, out, err = puna("run", recipe(), "--set", "lora.steps=4", "--seed", 3)
    assert code == 0
    assert "[3/4] lora: learn, never ran" in err
    assert "[4/4] scores:" in err and "peak" in err
    assert "1 of 1 claims hold (seed 3)" in out
    assert "report: runs/little/report.html" in out
    stage = json.loads(Path("runs/little/lora/stage.json").read_text())
    assert stage["parameters"]["steps"] == 4 and stage["seed"] == 3


def test_settings_are_typed_as_in_yaml_and_hyphens_are_fine(puna: Puna, recipe: Recipe) -> None:
    settings = ["lora.learning-rate=1e-4", "lora.lora={r: 2}", "lora.weights.no=0.5", "english.upper=true"]
    code, _, _ = puna("run", recipe(), *[part for setting in settings for part in ("--set", setting)])
    assert code == 0
    parameters = json.loads(Path("runs/little/lora/stage.json").read_text())["parameters"]
    assert parameters["learning_rate"] == 1e-4
    assert parameters["lora"] == {"r": 2, "alpha": 16.0}
    assert parameters["weights"] == {"no": 0.5}
    assert Path("runs/little/english/train/text").read_text().isupper()


def test_dry_run_shows_what_would_run_and_runs_nothing(
    puna: Puna, recipe: Recipe, executed: Executed
) -> None:
    puna("run", recipe())
    executed()
    code, out, _ = puna("run", recipe(), "--dry-run", "--set", "lora.steps=5")
    assert code == 0
    lines = {line.split()[1]: line for line in out.splitlines() if " learn " in line or " letters " in line}
    assert "reuse" in lines["dutch"]
    assert "run" in lines["lora"] and "steps 2 -> 5" in lines["lora"]
    assert executed() == []


def test_from_and_out_choose_stage_and_folder(
    puna: Puna, recipe: Recipe, executed: Executed, tmp_path: Path
) -> None:
    puna("run", recipe(), "--out", "here")
    executed(tmp_path / "here")
    puna("run", recipe(), "--out", "here", "--from", "scores")
    assert executed(tmp_path / "here") == ["scores"]


def test_prove_exits_with_1_exactly_if_a_claim_fails(puna: Puna, recipe: Recipe) -> None:
    code, out, _ = puna("prove", recipe())
    assert code == 0 and "pass" in out
    code, out, _ = puna("prove", recipe(FAILING))
    assert code == 1
    assert "FAIL" in out and "failed:" in out and "sizes-fall" in out
    assert json.loads(Path("runs/little/claims.json").read_text())["passed"] is False


def test_prove_all_goes_through_every_system(
    puna: Puna, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    systems = tmp_path / "systems"
    systems.mkdir()
    for name, changes in (("one", ()), ("two", (FAILING,))):
        text = recipe(*changes).read_text().replace("name: little", f"name: {name}")
        (systems / f"{name}.yaml").write_text(text)
    monkeypatch.setattr("puna.run.recipe.SYSTEMS", systems)
    code, out, _ = puna("prove", "--all")
    assert code == 1
    assert "failed: two: sizes-fall" in out
    assert Path("runs/one/claims.json").is_file()
    code, out, _ = puna("systems")
    assert code == 0 and "1 of 1 claims hold" in out and "0 of 1 claims hold" in out
    code, out, _ = puna("systems", "one")
    assert code == 0 and "Sizes are below a thousand" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing"], "no recipe is called 'nothing'"),
        (["run", "RECIPE", "--set", "lora.stebs=1"], "did you mean 'steps'"),
        (["run", "RECIPE", "--set", "lora.steps"], "lora.steps: not a setting"),
        (["run", "RECIPE", "--set", "lora.steps=[1"], "not valid YAML"),
        (["run", "RECIPE", "--scale", "huge"], "unknown scale 'huge'"),
        (["run", "RECIPE", "--from", "lra"], "--from: unknown stage 'lra'"),
        (["prove"], "say what to prove"),
        (["plan", "RECIPE", "--device", "h10"], "unknown device 'h10'"),
        (["stage", "lern", "--out", "x"], "did you mean 'learn'"),
        (["report", "."], "not a run folder"),
        (["assets", "fetch"], "say what to fetch"),
        (["assets", "fetch", "smolm2-135m-instruct"], "did you mean 'smollm2-135m-instruct'"),
        (["convert", "nowhere/at/all", "x"], "no model 'nowhere/at/all'"),
        (["inspect", "nowhere/at/all"], "no model 'nowhere/at/all'"),
    ],
)
def test_a_mistake_is_told_once_without_a_traceback_and_exits_with_2(
    puna: Puna, recipe: Recipe, arguments: list[str], message: str
) -> None:
    path = str(recipe())
    code, out, err = puna(*[path if argument == "RECIPE" else argument for argument in arguments])
    assert code == 2
    assert err.count(message) == 1
    assert "Traceback" not in out + err
    assert "\x1b[" not in err  # Not a terminal.


def test_puna_debug_shows_where_a_mistake_was_noticed(puna: Puna, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUNA_DEBUG", "1")
    code, _, err = puna("run", "nothing")
    assert code == 2 and "Traceback" in err


def test_a_bug_keeps_its_traceback_and_says_so(
    puna: Puna, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken inside")

    monkeypatch.setattr("puna.run.recipe.load", broken)
    code, _, err = puna("run", recipe())
    assert code == 70
    assert "Traceback" in err and "broken inside" in err
    assert err.rstrip().endswith("this is a bug in puna: please report it with the lines above")


def test_a_file_that_the_system_refuses_is_a_mistake_and_no_bug(puna: Puna, recipe: Recipe) -> None:
    Path("folder").mkdir()
    Path("file").write_text("")
    for arguments in (["schema", "--out", "folder"], ["run", str(recipe()), "--out", "file"]):
        code, out, err = puna(*arguments)
        assert code == 2 and "Traceback" not in out + err
        assert err.startswith(f"{arguments[-1]}: ")


def test_an_interrupt_exits_with_130_and_the_run_is_marked(
    puna: Puna, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("puna.run.runner.execute", interrupted)
    code, _, err = puna("run", recipe())
    assert code == 130
    assert "Traceback" not in err
    assert json.loads(Path("runs/little/run.json").read_text())["status"] == "stopped"


def test_plan_prints_the_table_its_assumptions_and_the_price(puna: Puna, recipe: Recipe) -> None:
    path = recipe(("in: {corpus: dutch.train,", "in: {model: smollm2-135m-instruct, corpus: dutch.train,"))
    code, out, _ = puna("plan", path, "--device", "h100", "--model", "llama-2-70b", "--price", "36000")
    assert code == 0
    assert "lora" in out and "not predicted" in out
    assert "- cuda:h100: NVIDIA H100" in out and "the shape of llama-2-70b" in out
    assert "cost at 36000 an hour" in out
    assert "does not fit: 1104.6" in out  # 16 bytes for each of 69 billion, and the process.


def test_a_stage_alone_takes_inputs_and_settings(puna: Puna) -> None:
    code, out, _ = puna("stage", "letters", "count=3", "--out", "corpus")
    assert code == 0 and "letters" in out and "folder: corpus" in out
    code, out, _ = puna(
        "stage", "learn", "--in", "corpus/train", "--out", "model", "lora.r=2", "learning-rate=0.5"
    )
    assert code == 0 and "loss" in out
    assert json.loads(Path("model/stage.json").read_text())["parameters"]["lora"]["r"] == 2
    code, out, _ = puna("stage", "learn")
    assert code == 0 and "Step size." in out and "held_out" in out


def test_inspect_tells_recipes_and_runs_apart(puna: Puna, recipe: Recipe) -> None:
    code, out, _ = puna("inspect", recipe(), "--scale", "paper")
    assert code == 0 and "A little recipe (paper scale)" in out and "steps: 9" in out
    puna("run", recipe())
    code, out, _ = puna("inspect", "runs/little")
    assert code == 0 and "done" in out and "size.nl.tuned" in out and "Sizes are below a thousand" in out


def test_inspect_shows_the_layers_of_a_model(puna: Puna, tiny_config: dict[str, Any]) -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(tiny_config))
    code, out, _ = puna("inspect", "model")
    assert code == 0 and "vocabulary 320, hidden 48" in out


def test_schema_prints_and_writes_the_same(puna: Puna) -> None:
    code, out, _ = puna("schema")
    assert code == 0
    puna("schema", "--out", "schema.json")
    assert json.loads(out) == json.loads(Path("schema.json").read_text())


def test_report_is_written_anew(puna: Puna, recipe: Recipe) -> None:
    puna("run", recipe())
    Path("runs/little/report.html").unlink()
    code, out, _ = puna("report", "runs/little")
    assert code == 0 and out.strip() == "runs/little/report.html"
    assert Path("runs/little/report.html").is_file()


def test_assets_are_listed_without_the_network(puna: Puna) -> None:
    code, out, _ = puna("assets", "ls")
    assert code == 0 and "smollm2-135m-instruct" in out and "Apache-2.0" in out


def test_doctor_lists_what_works(puna: Puna) -> None:
    code, out, _ = puna("doctor")
    assert code == 0 and "torch" in out and "memory" in out


def test_eval_is_the_stage_evaluate(puna: Puna, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    real = alone.run_stage

    def run_stage(verb: str, given: dict[str, Any], *_: Any, **__: Any) -> Any:
        calls.append((verb, given))
        return real("letters", {}, "out")

    monkeypatch.setattr(alone, "run_stage", run_stage)
    code, out, _ = puna("eval", "base", "tuned", "--on", "nl", "--on", "en")
    assert code == 0 and "folder: out" in out
    assert calls == [("evaluate", {"models": ["base", "tuned"], "corpora": ["nl", "en"]})]
    puna("eval", "base=a/model", "tuned=b/model", "--on", "nl=c/train", "--on", "en=d/train")
    models, corpora = {"base": "a/model", "tuned": "b/model"}, {"nl": "c/train", "en": "d/train"}
    assert calls[1] == ("evaluate", {"models": models, "corpora": corpora})
