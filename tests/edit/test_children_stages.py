"""Children of a tuned model, searched and measured by the stages: on other text, and in the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator, torch_generator
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import write_corpus
from puna.edit.calibration import calibration_batches
from puna.edit.pruning.scores import score_units
from puna.edit.searching.children import (
    Measured,
    differing_numbers,
    engine_loss,
    masked_difference,
    mean_loss,
)
from puna.edit.searching.sort_units import held_by_first_half, sort_channels
from puna.edit.searching.stages import CommonText
from puna.edit.searching.step_seconds import StepSeconds, table_of, timed_children
from puna.model.adapters import LoraSettings, add_lora
from puna.model.llama import Llama
from puna.model.search_space import SearchSpace
from puna.model.slicing import sliced
from puna.model.spec import BlockSpec, LlamaSpec
from puna.text import pretrained

pytest.importorskip("pymoo")
BLOCK = BlockSpec(heads=4, kv_heads=2, head_dim=8, width=48)
SPEC = LlamaSpec(320, 32, (BLOCK,) * 3, tied=True, max_positions=128)
CHILDREN = {"layers": [3, 2], "widths": [1.0, 0.5], "leaving": "last"}
TEXT = {"rows": 4, "length": 24, "batch_rows": 2}
SEARCH = {
    **TEXT,
    "children": CHILDREN,
    "evaluations": 10,
    "population": 4,
    "generations": 4,
    "baselines": ["random", "nsga2"],
    "save_dtype": "float32",
}


def model_of(seed: int = 0) -> Llama:
    """Random weights, large enough that layers and channels matter."""
    model = Llama(SPEC, generator=torch_generator(seed, "children"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.mul_(8)
    return model.eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """Two model folders, ``super`` and ``plain``, and a corpus."""
    folder = tmp_path_factory.mktemp("children")
    for seed, name in enumerate(("super", "plain")):
        model = model_of(seed)
        model.tokenizer = tiny_tokenizer
        pretrained.save(model, folder / name)
    generator = numpy_generator(0, "texts")
    rows = (
        {
            "id": f"document-{n}",
            "text": " ".join(generator.choice(["the", "cat", "sat", "mat", "end"], 30)),
            "source": "test",
            "language": "en",
        }
        for n in range(30)
    )
    write_corpus(
        folder / "texts", "documents", rows, provenance=[{"source": "test", "licence": "CC0"}], ledger={}
    )
    return folder


def run(name: str, root: Path, out: Path, inputs: dict[str, Any], **given: Any) -> tuple[Outcome, Context]:
    stage = get_stage(name)
    paths = {key: root / value if isinstance(value, str) else value for key, value in inputs.items()}
    context = Context(name, out, paths, seed=1, dtype="float32")
    return stage.function(context, validate(stage.parameters, given, where="test")), context


@pytest.fixture(scope="module")
def searched(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    out = tmp_path_factory.mktemp("searched")
    inputs = {"model": "super", "corpus": "texts"}
    return run("search_children", root, out, inputs, **SEARCH, half="first")[0]


def measure(root: Path, searched: Outcome, out: Path, **given: Any) -> tuple[Outcome, Context]:
    inputs = {"model": "super", "plain": "plain", "corpus": "texts", "children": searched.outputs["children"]}
    settings = {**TEXT, "half": "second", "timed_tokens": 4, "timed_rounds": 1, **given}
    return run("measure_children", root, out, inputs, **settings)


def batches(root: Path, half: str | None = None) -> list[Any]:
    text = CommonText(half=half)  # type: ignore[arg-type]
    model = pretrained.load(root / "super", dtype="float32")
    return calibration_batches(
        model, root / "texts", rows=4, length=24, batch_rows=2, seed=0, wanted=text.wanted
    )


def test_a_search_writes_what_it_measured_and_three_children(root: Path, searched: Outcome) -> None:
    record = json.loads(searched.outputs["children"].read_text())
    whole = pretrained.load(root / "super", dtype="float32")
    space = SearchSpace.of(whole.spec, (3, 2), (1.0, 0.5), "last")
    assert {name: len(points) for name, points in record["archives"].items()} == dict.fromkeys(
        ("linas", "random", "nsga2"), 10
    )
    figures = searched.metrics
    assert figures["children"] == space.size == 12
    assert figures["hypervolume.linas"] > 0
    costs = {tuple(point["genes"]): point["cost"] for point in record["archives"]["linas"]}
    for name, share in (("small", 0.4), ("middle", 0.6), ("large", 0.8)):
        genes = record["chosen"][name]
        child = pretrained.load(searched.outputs[name], dtype="float32")
        ids = torch.arange(20).view(1, 20)
        assert torch.equal(child(ids), sliced(whole, space.kept(genes))(ids))
        limit = max(share * figures["reference.cost"], min(costs.values()))
        better = [point for point in record["archives"]["linas"] if point["cost"] <= limit]
        losses = {tuple(point["genes"]): point["loss"] for point in better}
        assert losses[tuple(genes)] == min(losses.values())


def test_children_are_measured_on_other_text_and_in_the_engine(
    root: Path, searched: Outcome, tmp_path: Path
) -> None:
    outcome, context = measure(root, searched, tmp_path)
    figures = outcome.metrics
    assert figures["whole.differing_numbers"] == 0
    assert figures["masked_difference"] <= 1e-5
    assert 0.9 < figures["engine.loss_ratio"] < 1.1
    assert figures["engine.smallest_bytes"] < 0.5
    assert figures["plain.ratio"] <= figures["plain.worst"]
    assert set(figures) >= {
        f"{what}.{name}" for what in ("speed", "cost_cut", "loss") for name in ("small", "middle", "large")
    }
    assert figures["cost_cut.small"] >= figures["cost_cut.large"] >= 1
    (table,), (curve,) = context.report["tables"], context.report["curves"]
    assert len(table["rows"]) == figures["front.linas"]
    assert [series["name"] for series in curve["series"]] == ["linas", "random", "nsga2"]


def test_the_text_of_the_search_is_refused_for_the_report(
    root: Path, searched: Outcome, tmp_path: Path
) -> None:
    for half in ("first", None):
        with pytest.raises(PunaError, match="text that they were searched on"):
            measure(root, searched, tmp_path, half=half)


def test_halves_of_a_corpus_share_no_document(root: Path) -> None:
    names = [f"document-{n}" for n in range(200)]
    first, second = (CommonText(half=half) for half in ("first", "second"))
    assert all(first.wanted(name) != second.wanted(name) for name in names)
    assert 70 < sum(map(first.wanted, names)) < 130
    assert all(map(CommonText().wanted, names))
    assert batches(root, "first")[0].input_ids.tolist() != batches(root, "second")[0].input_ids.tolist()


def test_children_of_another_model_are_refused(root: Path, searched: Outcome, tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="model of another shape"):
        inputs = {
            "model": searched.outputs["small"],
            "corpus": "texts",
            "children": searched.outputs["children"],
        }
        run("measure_children", root, tmp_path, inputs, **TEXT, half="second")
    with pytest.raises(PunaError, match="plainly tuned model has another shape"):
        inputs = {
            "model": "super",
            "plain": searched.outputs["small"],
            "corpus": "texts",
            "children": searched.outputs["children"],
        }
        run("measure_children", root, tmp_path, inputs, **TEXT, half="second")


def test_a_child_is_read_on_the_same_text_as_all_others_and_once(root: Path) -> None:
    model = pretrained.load(root / "super", dtype="float32").eval()
    space = SearchSpace.of(model.spec, (3, 2), (1.0, 0.5), "last")
    texts = batches(root)
    measured = Measured(model, space, texts)
    for genes in (space.whole, space.smallest, (1, 1, 0, 1)):
        child = sliced(model, space.kept(genes))
        assert measured.loss(genes) == pytest.approx(mean_loss(child, texts), rel=1e-6)
        assert masked_difference(model, space, genes, texts[0]) <= 1e-5
    before = dict(measured.losses)
    assert measured.loss((1, 1, 0, 0)) == before[1, 1, 0, 0]  # another spelling of the same child
    assert len(measured.losses) == 3


def test_weights_and_operations_are_different_costs(root: Path) -> None:
    """A layer less saves attention to what is stored, which narrow feed-forwards do not."""
    model = model_of()
    space = SearchSpace.of(SPEC, (3, 2), (1.0, 0.25), "last")
    shallow, narrow = (1, 0, 0, 0), (0, 1, 1, 1)
    weights, operations = (
        Measured(model, space, batches(root), cost, context=4096) for cost in ("parameters", "operations")
    )
    assert weights.cost_of(narrow) < weights.cost_of(shallow)
    assert operations.cost_of(narrow) > operations.cost_of(shallow)
    with pytest.raises(PunaError, match="cost"):
        Measured(model, space, batches(root), "joules")


def test_seconds_of_a_step_add_up_over_layers_and_the_rest() -> None:
    space = SearchSpace.of(SPEC, (3, 2), (1.0, 0.5), "last")
    seconds = {
        genes: 5.0 + sum((3.0, 1.0)[genes[1 + layer]] for layer in space.layers(genes))
        for genes in timed_children(space)
    }
    assert {genes[0] for genes in seconds} == {0, 1}
    table = table_of(space, seconds)
    assert table == StepSeconds(5.0, (3.0, 1.0))
    assert table.of(space, (1, 1, 0, 1)) == table.of(space, (1, 1, 0, 0)) == 9.0
    one_depth = SearchSpace.of(SPEC, (3,), (1.0, 0.5))
    alone = table_of(one_depth, dict.fromkeys(timed_children(one_depth), 6.0))
    assert alone == StepSeconds(0.0, (2.0, 2.0))


def test_a_search_by_seconds_goes_by_a_table_that_was_timed_and_keeps_it(root: Path, tmp_path: Path) -> None:
    given = {**SEARCH, "cost": "seconds", "context_tokens": 8, "timed_rounds": 3, "timed_weights": "float"}
    inputs = {"model": "super", "corpus": "texts"}
    outcome, _ = run("search_children", root, tmp_path / "search", inputs, **given, half="first")
    record = json.loads(outcome.outputs["children"].read_text())
    table = StepSeconds(record["seconds"]["rest"], tuple(record["seconds"]["layers"]))
    space = SearchSpace.of(SPEC, (3, 2), (1.0, 0.5), "last")
    assert len(table.layers) == 2 and table.rest + sum(table.layers) > 0
    for point in record["archives"]["linas"]:
        assert point["cost"] == table.of(space, tuple(point["genes"]))
    figures = measure(root, outcome, tmp_path / "measure", engine="none")[0].metrics
    assert figures["front.linas"] >= 1 and "speed.small" not in figures


def test_what_differs_is_counted(root: Path) -> None:
    model, other = model_of(), model_of()
    texts = batches(root)
    assert differing_numbers(model, other, texts[0]) == 0
    with torch.no_grad():
        other.get_parameter("model.norm.weight")[3] += 1e-6
    assert differing_numbers(model, other, texts[0]) > 1


def test_the_engine_reads_documents_of_a_row_apart(root: Path) -> None:
    model = pretrained.load(root / "super", dtype="float32").eval()
    texts = batches(root)
    assert any(len(segments.unique()) > 1 for batch in texts for segments in batch.segments)
    loss, size = engine_loss(model, texts, None)
    assert loss == pytest.approx(mean_loss(model, texts), rel=1e-3)
    rounded, small = engine_loss(model, texts, "int8")
    assert loss != rounded == pytest.approx(loss, rel=0.05)
    assert small < 0.6 * size


def test_sorted_channels_compute_the_same_and_the_first_half_matters_more(root: Path, tmp_path: Path) -> None:
    texts = batches(root)
    outcome, _ = run(
        "sort_channels", root, tmp_path, {"model": "super", "corpus": "texts"}, **TEXT, save_dtype="float32"
    )
    model = pretrained.load(root / "super", dtype="float32").eval()
    ordered = pretrained.load(outcome.outputs["model"], dtype="float32").eval()
    assert mean_loss(ordered, texts) == pytest.approx(mean_loss(model, texts), rel=1e-5)
    assert outcome.metrics["first_half"] > 0.55 > outcome.metrics["first_half_before"] > 0.4
    gates = [
        {tuple(row) for row in each.get_parameter("model.layers.1.mlp.gate_proj.weight").tolist()}
        for each in (model, ordered)
    ]
    assert gates[0] == gates[1]
    scores = score_units(ordered, "magnitude", ["channel"])
    sort_channels(ordered, scores)
    again = score_units(ordered, "magnitude", ["channel"])
    assert all((each[1:] <= each[:-1]).all() for each in again.values())
    assert held_by_first_half(again) > held_by_first_half(scores)


def test_channels_under_an_adapter_are_not_sorted() -> None:
    model = model_of()
    add_lora(model, LoraSettings(r=2), seed=0)
    with pytest.raises(PunaError, match="under an adapter"):
        sort_channels(model, {})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"baselines": ["linas"]}, "other than method"),
        ({"evaluations": 3}, "one population"),
        ({"cost_shares": [0.8, 0.6, 0.4]}, "cost_shares rise"),
        ({"cost_shares": [0, 0.6, 0.8]}, "cost_shares rise"),
        ({"method": "annealing"}, "method"),
        ({"timed_rounds": 3}, "mean nothing without cost 'seconds'"),
        ({"timed_weights": "float"}, "mean nothing without cost 'seconds'"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(PunaError) as error:
        validate(get_stage("search_children").parameters, {**SEARCH, **given}, where="test")
    assert words in str(error.value)
