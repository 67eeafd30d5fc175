from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from little_stages import Learn

from puna.core.errors import PunaError
from puna.run import recipe as recipes
from puna.run.recipe import Claim, load, spell_keys
from puna.run.references import Reference, default_names
from puna.run.source import dump

pytestmark = pytest.mark.usefixtures("little")
Recipe = Callable[..., Path]


def test_a_scale_changes_what_it_sets_and_nothing_else(recipe: Recipe) -> None:
    demo, paper = load(recipe()), load(recipe(), "paper")
    assert demo.stages["lora"].settings()["steps"] == 2
    assert paper.stages["lora"].settings()["steps"] == 9
    assert paper.stages["lora"].settings()["lora"] == {"r": 64, "alpha": 16.0}
    assert demo.stages["dutch"].settings() == paper.stages["dutch"].settings()


def test_settings_go_over_the_scale_and_options_over_settings(recipe: Recipe) -> None:
    loaded = load(
        recipe(), "paper", {"lora.steps": 4, "lora.lora.alpha": 1, "seed": 5, "dtype": "float32"}, seed=6
    )
    assert loaded.stages["lora"].settings()["steps"] == 4
    assert loaded.stages["lora"].settings()["lora"] == {"r": 64, "alpha": 1.0}
    assert (loaded.header.seed, loaded.header.dtype) == (6, "float32")


def test_inputs_can_be_set_too(recipe: Recipe) -> None:
    loaded = load(recipe(), settings={"lora.in.corpus": "english", "scores.in.models.base-line": "lora"})
    assert loaded.stages["lora"].resolved()["in"]["corpus"] == {"english": "english.train"}
    assert set(loaded.stages["scores"].resolved()["in"]["models"]) == {"tuned", "base-line"}


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("learning-rate", ("learning_rate",)),
        ("lora.r", ("lora", "r")),
        ("weights.plone-nl", ("weights", "plone-nl")),
        ("no-such.key-here", ("no_such", "key-here")),
    ],
)
def test_hyphens_stand_for_underscores_in_keys_but_not_in_users_names(
    key: str, path: tuple[str, ...]
) -> None:
    assert spell_keys(Learn, key.split(".")) == path


def test_the_resolved_recipe_says_everything_and_reads_back_equal(recipe: Recipe, tmp_path: Path) -> None:
    text = tmp_path / "data.txt"
    text.write_text("x")
    first = load(recipe(), "paper", {"dutch.file": str(text), "lora.weights.no": 0.5})
    written = first.resolved()
    assert written["stages"]["lora"]["objective"] == "clm"
    (tmp_path / "run.yaml").write_text(dump(written))
    again = load(tmp_path / "run.yaml")
    assert again.scale == "paper"
    assert again.resolved() == written
    with pytest.raises(PunaError, match="was resolved for the scale 'paper'"):
        load(tmp_path / "run.yaml", "demo")


@given(
    steps=st.integers(0, 10**6),
    rate=st.floats(1e-9, 1e3),
    weights=st.dictionaries(st.text(min_size=1), st.floats(0, 1), max_size=3),
)
def test_any_settings_survive_being_resolved(steps: int, rate: float, weights: dict[str, float]) -> None:
    body = {"use": "learn", "in": {"corpus": "a"}, "steps": steps, "learning_rate": rate, "weights": weights}
    given_ = {"name": "n", "title": "t", "stages": {"a": {"use": "letters"}, "b": body}}
    resolved = load(given_).resolved()
    assert load(resolved).resolved() == resolved
    assert resolved["stages"]["b"]["learning_rate"] == rate
    assert resolved["stages"]["b"]["weights"] == weights


def test_inputs_are_stages_paths_assets_or_hub_ids_in_this_order(recipe: Recipe, tmp_path: Path) -> None:
    def origins() -> list[str]:
        models = load(recipe(change)).stages["scores"].inputs["models"]
        assert isinstance(models, dict)
        assert models["b"].resolved() == str(tmp_path / "folder")
        return [models[name].origin for name in "abcd"]

    for name in ("folder", "lora"):  # A stage of that name comes first.
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    change = ("{tuned: lora}", "{a: lora, b: folder, c: smollm2-135m-instruct, d: meta-llama/Llama-2-7b-hf}")
    assert origins() == ["stage", "path", "asset", "hub"]
    (tmp_path / "smollm2-135m-instruct").write_bytes(b"GGUF")  # As puna.load has it, too.
    assert origins() == ["stage", "path", "path", "hub"]


def test_several_unnamed_inputs_get_the_names_of_what_they_are(recipe: Recipe) -> None:
    change = ("{nl: dutch.held_out, en: english}", "[dutch.held_out, english]")
    corpora = load(recipe(change)).stages["scores"].inputs["corpora"]
    assert isinstance(corpora, dict) and list(corpora) == ["dutch", "english"]
    corpora = (
        load(recipe((change[0], "[dutch.held_out, english, dutch.train]"))).stages["scores"].inputs["corpora"]
    )
    assert isinstance(corpora, dict) and list(corpora) == ["dutch_held_out", "english", "dutch_train"]
    with pytest.raises(PunaError, match=r"two inputs are called 'dutch_train'[\s\S]*name them"):
        load(recipe((change[0], "[dutch.train, dutch.train]")))


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["a/model", "b/model"], ["a", "b"]),
        (["runs/one/lora/model", "runs/two/lora/model", "base"], ["one", "two", "base"]),
        (["a/x/model", "b/x/model", "b/y/model"], ["a_x", "b_x", "b_y"]),
        (["a/v1.5/train", "a/v2/train/"], ["v1_5", "v2"]),
        (["../a/model", "./model"], ["a", "here"]),
        (["Llama-3.2-1B"], ["Llama-3_2-1B"]),
        (["model", "model"], ["model", "model"]),
    ],
)
def test_paths_that_end_alike_are_called_by_what_tells_them_apart(
    texts: list[str], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert default_names([Reference(text, "path") for text in texts]) == names


def test_an_asset_and_a_hub_id_are_called_by_their_last_part_and_a_file_without_its_suffix(
    tmp_path: Path,
) -> None:
    (tmp_path / "tuned-f16.gguf").write_bytes(b"GGUF")
    references = [
        Reference("smollm2-135m-instruct", "asset"),
        Reference("meta-llama/Llama-3.2-1B", "hub"),
        Reference("tuned-f16.gguf", "path"),
    ]
    assert default_names(references) == ["smollm2-135m-instruct", "Llama-3_2-1B", "tuned-f16"]


READ = r"read it in a stage before this one: use: corpus, sources: \[\{"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("corpus: dutch.train", "corpus: django"), rf"'django' is no corpus[\s\S]*{READ}asset: django\}}\]"),
        (
            ("corpus: dutch.train", "corpus: notes.txt"),
            rf"'notes.txt' is no corpus[\s\S]*{READ}path: notes.txt\}}",
        ),
        (
            ("corpus: dutch.train", "corpus: owner/name"),
            r"'owner/name' is nothing that is known here\n  expected: a corpus: an earlier stage "
            rf"\(dutch, english\), or a path\n[\s\S]*{READ}format: huggingface, id: owner/name\}}",
        ),
        (("corpus: dutch.train", "corpus: smollm2-135m-instruct"), "'smollm2-135m-instruct' is a model"),
        (
            ("corpus: dutch.train", "corpus: folder"),
            r"'folder' is no corpus[\s\S]*did you mean 'folder/train'",
        ),
        (
            ("{tuned: lora}", "{tuned: django}"),
            r"'django' is no model[\s\S]*assets that fit: smollm2-135m-instruct",
        ),
        (
            ("{tuned: lora}", "{tuned: folder}"),
            r"input models.tuned: 'folder' is no model\n  expected: a model:",
        ),
        (("{tuned: lora}", "{tuned: folder/train}"), "'folder/train' is a corpus\n  expected: a model:"),
        (("{tuned: lora}", "[notes.txt]"), "input models: 'notes.txt' is no model"),
    ],
)
def test_what_is_there_but_of_another_kind_is_refused_with_line_and_way_out(
    recipe: Recipe, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    (tmp_path / "notes.txt").write_text("Notes.")
    (tmp_path / "folder" / "train").mkdir(parents=True)
    (tmp_path / "folder" / "train" / "corpus.json").write_text("{}")
    with pytest.raises(PunaError, match=message) as caught:
        load(recipe(change))
    assert "recipe.yaml, line " in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("title:", "titel:")], r"line 2: unknown key 'titel'[\s\S]*did you mean 'title'"),
        ([("title: A little recipe\n", "")], "key 'title' is missing"),
        (
            [("learning_rate: 1e-3", "lerning_rate: 1")],
            r"line 14, stage lora: unknown key 'lerning_rate'[\s\S]*learning_rate",
        ),
        (
            [("lora: {r: 4}", "lora: {rr: 4}")],
            r"line 15, stage lora: unknown key 'lora.rr'[\s\S]*one of alpha, r\n[\s\S]*'r'",
        ),
        (
            [("learning_rate: 1e-3", "learning_rate: fast")],
            "line 14, stage lora: key 'learning_rate': .*number",
        ),
        (
            [("use: learn", "use: lern")],
            r"line 12, stage lora: unknown stage 'lern'[\s\S]*did you mean 'learn'",
        ),
        ([("    use: learn\n", "")], "stage lora: key 'use' is missing"),
        (
            [("in: {corpus: dutch.train, held_out: {nl: dutch.held_out}}", "in: {}")],
            "input 'corpus' is missing",
        ),
        (
            [("{corpus: dutch.train,", "{corpora: dutch.train,")],
            r"unknown input of 'learn' 'corpora'[\s\S]*'corpus'",
        ),
        (
            [("corpus: dutch.train", "corpus: dutch.trian")],
            r"unknown output of stage 'dutch' 'trian'[\s\S]*'train'",
        ),
        (
            [("corpus: dutch.train", "corpus: dusch")],
            r"'dusch' is nothing that is known here[\s\S]*did you mean 'dutch'",
        ),
        ([("corpus: dutch.train", "corpus: scores")], "stage 'scores' does not come before this one"),
        ([("corpus: dutch.train", "corpus: lora")], "stage 'lora' does not come before this one"),
        (
            [("{tuned: lora}", "{tuned: dutch}")],
            "input models.tuned: 'dutch' is a corpus\n  expected: a model",
        ),
        ([("{tuned: lora}", "{tuned: [lora]}")], "not a reference"),
        ([("{tuned: lora}", "{a.b: lora}")], "'a.b' cannot name an input"),
        ([("corpus: dutch.train", "corpus: 3")], "not an input"),
        ([("  dutch:\n", "  Dutch:\n")], "'Dutch' cannot name a stage"),
        ([("  scores:\n", "  mean:\n")], "'mean' cannot name a stage"),
        ([("lora.steps: 2", "lara.steps: 2")], r"line 20: unknown stage 'lara'[\s\S]*did you mean 'lora'"),
        ([("lora.steps: 2", "steps: 2")], "setting 'steps' names no stage"),
        ([("lora.steps: 2", "lora.stebs: 2")], r"line 20, stage lora: unknown key 'stebs'[\s\S]*'steps'"),
        ([("demo: {set", "demi: {set")], "scales.demi"),
        (
            [('value: scores["size.nl.tuned"] / 1000', "value: score['x']")],
            r"claim sizes-fall: unknown stage 'score'",
        ),
        ([("at_most: 1.0", "at_most: 1.0\n    report: true")], "exactly one of at_most, at_least, equals"),
        ([("at_most: 1.0", "tolerance: 1.0\n    report: true")], "tolerance belongs to equals"),
        ([("name: little", "name: ../little")], "key 'name'"),
    ],
)
def test_mistakes_name_file_line_and_key(
    recipe: Recipe, changes: list[tuple[str, str]], message: str
) -> None:
    path = recipe(*changes)
    with pytest.raises(PunaError, match=message) as caught:
        load(path)
    assert "recipe.yaml, line " in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lora.lerning_rate": 1},
            r"setting lora.lerning_rate=1, stage lora: unknown key[\s\S]*'learning_rate'",
        ),
        ({"lora.learning_rate": "x"}, "setting lora.learning_rate=x, stage lora: key 'learning_rate'"),
        ({"lora.learning_rate": float("inf")}, "setting lora.learning_rate=inf, .*finite number"),
        ({"lara.steps": 1}, "setting lara.steps=1: unknown stage 'lara'"),
        ({"sede": 1}, "setting sede=1: setting 'sede' names no stage"),
        ({"dtype": "int8"}, "setting dtype=int8: key 'dtype'"),
        ({"lora.in.corpus": "gone"}, r"setting lora.in.corpus=gone, stage lora, input corpus: 'gone'"),
    ],
)
def test_a_mistaken_setting_is_named_as_it_was_given(
    recipe: Recipe, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(PunaError, match=message):
        load(recipe(), settings=settings)


def test_an_unknown_recipe_or_scale_tells_the_nearest(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    systems = tmp_path / "systems"
    systems.mkdir()
    (systems / "chocollama.yaml").write_text(recipe().read_text())
    monkeypatch.setattr(recipes, "SYSTEMS", systems)
    assert load("chocollama").name == "little"
    with pytest.raises(PunaError, match="did you mean 'chocollama'"):
        load("chocolama")
    with pytest.raises(PunaError, match="did you mean 'demo'"):
        load(recipe(), "demos")


def test_needed_stages_are_found_through_their_inputs(recipe: Recipe) -> None:
    loaded = load(recipe())
    assert loaded.needed_for(["lora"]) == {"lora", "dutch"}
    assert loaded.needed_for(["scores"]) == {"scores", "lora", "dutch", "english"}


@pytest.mark.parametrize("bars", [{}, {"at_most": 1, "at_least": 0}, {"equals": 1, "report": True}])
def test_a_claim_has_exactly_one_bar(bars: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        Claim(name="c", says="s", value="1", **bars)
