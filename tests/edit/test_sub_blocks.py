"""Children out of sub-blocks: variants, local distillation, scores, costs, the choice, and the stages."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import write_corpus
from puna.edit.quantize.quantize import quantize
from puna.edit.quantize.settings import Gptq, Quantization, Uniform
from puna.edit.sub_blocks import costs, local_distillation
from puna.edit.sub_blocks.costs import Times, Workload
from puna.edit.sub_blocks.divergence import final_states, mean_kl, predicted, replace_one
from puna.edit.sub_blocks.library import Choice, Library, assemble, block_with, half_of, open_parent
from puna.edit.sub_blocks.text_stream import text_stream
from puna.edit.sub_blocks.variants import HALVES, PARENT, alone, changed, initial
from puna.model.attention import lay_out
from puna.model.llama import Llama
from puna.model.native.stepper import NativeStepper
from puna.model.plain_stepper import PlainStepper
from puna.model.spec import BlockSpec
from puna.model.stepper import Read
from puna.text import pretrained
from puna.text.packing import Batch
from tests.edit.test_sub_block_variants import BLOCK, SPEC, behind, own
from tests.invariants import kit

WORDS = ["the", "cat", "and", "other", "sat", "on", "that", "mat", "in", "end", "then", "it", "went", "again"]
Run = Callable[..., Outcome]
SMALL: dict[str, dict[str, Any]] = {
    "sub_blocks": {"kv_heads": [1], "widths": [0.5], "length": 16, "batch_rows": 2, "calibration_rows": 4}
    | {"tokens": 160, "learning_rate": 1e-2},
    "replace_one": {"rows": 4, "length": 16, "batch_rows": 2},
    "block_costs": {"measure": "operations", "prompt": 8, "answer": 8},
    "choose_child": {"runtime": 0.7},
    "assemble_child": {},
    "parent_divergence": {"rows": 4, "length": 16, "batch_rows": 2},
    "model_speed": {"prompt": 4, "answer": 4, "repeats": 2},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Run:
    """``run(stage, name, inputs, **parameters)`` over a parent of four layers; runs once a name."""
    root = tmp_path_factory.mktemp("sub-blocks")
    parent = kit.decoder(SPEC)
    parent.tokenizer = tiny_tokenizer
    pretrained.save(parent, root / "parent")
    other = kit.decoder(SPEC, seed=1)
    other.tokenizer = tiny_tokenizer
    pretrained.save(other, root / "other")
    generator = numpy_generator(0, "sub-blocks")
    rows = (
        {"id": f"d{n}", "text": " ".join(generator.choice(WORDS, 12)), "source": "test", "language": "en"}
        for n in range(40)
    )
    about: dict[str, Any] = {"provenance": [{"source": "test", "licence": "CC0"}], "ledger": {}}
    write_corpus(root / "corpus", "documents", rows, **about)
    given = {"parent": root / "parent", "other": root / "other", "corpus": root / "corpus"}
    done: dict[str, Outcome] = {}

    def call(
        stage: str, name: str, inputs: dict[str, Any], dtype: str = "float32", **parameters: Any
    ) -> Outcome:
        if name not in done:
            found = get_stage(stage)
            settings = validate(found.parameters, {**SMALL[stage], **parameters}, where="test")
            context = Context(name, root / name, {**_resolved(inputs, given)}, dtype=dtype)
            context.out.mkdir(exist_ok=True)
            done[name] = found.function(context, settings)
        return done[name]

    call.root = root  # type: ignore[attr-defined]
    return call


def _resolved(inputs: dict[str, Any], given: dict[str, Path]) -> dict[str, Any]:
    return {
        name: _resolved(value, given) if isinstance(value, dict) else given.get(str(value), value)
        for name, value in inputs.items()
    }


TEXT = {"model": "parent", "corpus": "corpus"}


@pytest.fixture(scope="module")
def library(run: Run) -> Path:
    return run("sub_blocks", "library", TEXT).outputs["library"]


@pytest.fixture(scope="module")
def given(run: Run, library: Path) -> dict[str, Any]:
    scores = run("replace_one", "scores", {**TEXT, "library": library}, random_children=5)
    prices = run("block_costs", "costs", {"model": "parent", "library": library})
    return {
        "library": library,
        "scores": scores.outputs["scores"],
        "costs": prices.outputs["costs"],
    }


@pytest.fixture(scope="module")
def parent(run: Run) -> tuple[Llama, str]:
    return open_parent(run.root / "parent", "float32", "cpu")  # type: ignore[attr-defined]


def batches(count: int = 2) -> list[Batch]:
    ids = [kit.random_ids(2, 12, seed) + 4 for seed in range(count)]
    positions, segments = torch.arange(12).expand(2, 12), torch.zeros(2, 12, dtype=torch.int64)
    return [Batch(each, each, positions, segments) for each in ids]


def places(opened: Library) -> list[tuple[int, Any, str]]:
    """Every variant that a library has besides the parent's own halves."""
    layers = range(len(opened.layers))
    every = [
        (layer, half, name) for layer in layers for half in HALVES for name in opened.variants(layer, half)
    ]
    return [place for place in every if place[2] != PARENT]


def everywhere(attention: str, feed_forward: str) -> Choice:
    return ((attention, feed_forward),) * len(SPEC.blocks)


def test_local_distillation_brings_every_variant_nearer_to_the_parents_half(
    run: Run, library: Path, parent: tuple[Llama, str]
) -> None:
    metrics = run("sub_blocks", "library", TEXT).metrics
    assert metrics["variants"] == 4 * 4  # one head, one matrix; half the channels, one matrix
    assert metrics["loss_ratio"] < 0.8
    model, known = parent
    opened = Library.open(library, known)
    for layer, half in ((0, "attention"), (3, "feed_forward")):
        errors = []
        for trained in (False, True):
            tensors = half_of(model, opened, layer, half, "linear", trained=trained)  # type: ignore[arg-type]
            target = behind(model, model.model.layers[layer])[1]
            swapped = block_with(model, layer, half, "linear", tensors)  # type: ignore[arg-type]
            errors.append(float((behind(model, swapped)[1] - target).square().mean()))
        assert errors[1] < errors[0]


def test_bfloat16_learns_with_float32_masters_and_scores(run: Run) -> None:
    made = run("sub_blocks", "narrow-library", TEXT, dtype="bfloat16")
    assert made.metrics["loss_ratio"] < 0.9
    inputs = {**TEXT, "library": made.outputs["library"]}
    found = run("replace_one", "narrow-scores", inputs, dtype="bfloat16", random_children=3)
    assert found.metrics["parent_difference"] == found.metrics["parent_kl"] == 0.0


def test_a_pupil_trains_its_own_half_alone_and_its_loss_is_the_share_of_zero() -> None:
    model = kit.decoder(SPEC).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = initial(own(model, "attention"), model.spec, 1, "attention", "kv_heads-1", ())
    settings = local_distillation.LocalSettings(steps=2, learning_rate=1e-2)
    found = local_distillation.distil_layers(
        model, {1: {("attention", "kv_heads-1"): start}}, batches(), settings
    )
    learnt = found[1]["attention", "kv_heads-1"]
    assert set(learnt.weights) == set(start)
    assert any(not torch.equal(learnt.weights[name], start[name]) for name in start)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    batch = batches()[0]
    with torch.no_grad():
        hidden = model.model.embed_tokens(batch.input_ids)
        layout = lay_out(2, 12, hidden.device, batch.positions, batch.segments, None)
        turns = model._rotations(layout.positions, hidden.dtype)
        hidden = model.model.layers[0](hidden, turns, layout, None)
        target = model.model.layers[1](hidden, turns, layout, None)
        output = block_with(model, 1, "attention", "kv_heads-1", start)(hidden, turns, layout, None)
    share = (output - target).square().mean() / target.square().mean()
    assert learnt.first_loss == pytest.approx(float(share), rel=1e-5)


def test_layers_come_out_the_same_one_by_one_and_after_a_kill(
    run: Run, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puna.edit.sub_blocks import jobs

    trained: list[list[int]] = []
    distil = jobs.distil_layers

    def watched(parent: Any, starts: Any, *rest: Any) -> Any:
        trained.append(sorted(starts))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return distil(parent, starts, *rest)

    monkeypatch.setattr(jobs, "distil_layers", watched)
    monkeypatch.setattr(jobs, "derive", lambda seed, name: 123)
    whole = run("sub_blocks", "whole", TEXT)
    with pytest.raises(KeyboardInterrupt):
        run("sub_blocks", "parts", TEXT, layers_at_once=1)
    again = run("sub_blocks", "parts", TEXT, layers_at_once=1)
    assert trained == [[0, 1, 2, 3], [0], [1], [1], [2], [3]]
    for layer in range(4):
        one, other = ((each.outputs["library"] / f"layer-{layer}.safetensors") for each in (whole, again))
        assert one.read_bytes() == other.read_bytes()


def test_no_tokens_leave_the_initial_weights(run: Run, parent: tuple[Llama, str]) -> None:
    model, known = parent
    opened = Library.open(run("sub_blocks", "initial", TEXT, tokens=0).outputs["library"], known)
    for layer, half, variant in places(opened):
        start = half_of(model, opened, layer, half, variant, trained=False)
        found = half_of(model, opened, layer, half, variant)
        assert found.keys() == start.keys() and all(torch.equal(found[name], start[name]) for name in start)


def test_the_text_begins_again_in_another_order_and_a_corpus_without_a_batch_is_refused(
    run: Run, parent: tuple[Llama, str]
) -> None:
    corpus = run.root / "corpus"  # type: ignore[attr-defined]
    stream = text_stream(parent[0], corpus, rows=2, length=16, seed=0)
    first = [next(stream) for _ in range(30)]
    assert all(batch.input_ids.shape == (2, 16) for batch in first)
    again = text_stream(parent[0], corpus, rows=2, length=16, seed=0)
    assert torch.equal(first[0].input_ids, next(again).input_ids)
    assert sum(torch.equal(first[0].input_ids, batch.input_ids) for batch in first) == 1
    with pytest.raises(PunaError, match="too small for one batch"):
        next(text_stream(parent[0], corpus, rows=500, length=16, seed=0))


def test_the_parent_everywhere_is_the_parent_to_the_bit(
    run: Run, given: dict[str, Any], parent: tuple[Llama, str]
) -> None:
    model, known = parent
    same = assemble(model, Library.open(given["library"], known), everywhere(PARENT, PARENT))
    ids = kit.random_ids(2, 20)
    assert torch.equal(same(ids), model(ids))
    assert same.spec == model.spec
    metrics = run("replace_one", "scores", {}).metrics
    assert metrics["parent_difference"] == 0.0 and metrics["parent_kl"] == 0.0


def test_a_score_is_the_divergence_of_the_parent_with_one_half_exchanged(
    given: dict[str, Any], parent: tuple[Llama, str]
) -> None:
    model, known = parent
    opened = Library.open(given["library"], known)
    text = batches()
    scores = replace_one(model, opened, text)
    assert set(scores) == set(places(opened))
    for place in [(0, "attention", "none"), (2, "feed_forward", "linear"), (3, "attention", "kv_heads-1")]:
        layer, half, variant = place
        choice = [list(names) for names in everywhere(PARENT, PARENT)]
        choice[layer][HALVES.index(half)] = variant  # type: ignore[arg-type]
        child = assemble(model, opened, tuple((one, other) for one, other in choice))
        apart = mean_kl(model, final_states(model, text), child, text)
        assert scores[place] == pytest.approx(apart, rel=1e-4)  # type: ignore[index]
    assert predicted(scores, everywhere("none", PARENT)) == pytest.approx(
        sum(scores[layer, "attention", "none"] for layer in range(4))
    )


def test_many_no_ops_are_not_the_sum_of_each(given: dict[str, Any], parent: tuple[Llama, str]) -> None:
    """Why random children are measured beside the sums: halves are scored one at a time."""
    model, known = parent
    opened, text = Library.open(given["library"], known), batches()
    scores = replace_one(model, opened, text)
    empty = assemble(model, opened, everywhere("none", "none"))
    true = mean_kl(model, final_states(model, text), empty, text)
    assert abs(predicted(scores, everywhere("none", "none")) - true) > 0.2 * true


def test_linear_halves_are_quantised_as_projections_are(
    given: dict[str, Any], parent: tuple[Llama, str]
) -> None:
    model, known = parent
    child = assemble(model, Library.open(given["library"], known), everywhere("linear", "linear"))
    grid = Uniform(bits=3, group=16)
    quantize(child, Quantization(grid=grid, rounding=Gptq()), kit.random_ids(4, 24))
    for name, weight in child.named_parameters():
        if "linear_" in name:
            assert all(len(row.unique()) <= 8 for row in weight.detach().view(-1, 16))


@pytest.mark.parametrize(
    "choice",
    [
        everywhere("linear", "linear"),
        everywhere("none", "linear"),
        (("kv_heads-1", "none"), ("none", "none")) * 2,
    ],
    ids=["linear", "no attention", "mixed"],
)
def test_children_are_saved_loaded_and_stepped_alike(
    given: dict[str, Any], parent: tuple[Llama, str], tmp_path: Path, choice: Choice
) -> None:
    """No-op attention has no cache slots: layers behind it still find theirs."""
    model, known = parent
    child = assemble(model, Library.open(given["library"], known), choice)
    again = pretrained.load(pretrained.save(child, tmp_path / "child")).eval()
    assert again.spec == child.spec
    ids = kit.random_ids(1, 30)
    with torch.no_grad():
        expected = child(ids)[0]
        assert torch.equal(again(ids)[0], expected)
    for stepper in (PlainStepper(again, cache_tokens=64), NativeStepper(again, cache_tokens=64)):
        sequence = stepper.sequence()
        parts = [stepper.step([Read(sequence, ids[0, :20].tolist(), 20)])[0]]
        parts += [stepper.step([Read(sequence, [token], 1)])[0] for token in ids[0, 20:].tolist()]
        torch.testing.assert_close(stepper.logits(torch.cat(parts)), expected, atol=2e-4, rtol=2e-4)


def test_a_distilled_child_is_nearer_to_its_parent_than_an_initial_one(
    given: dict[str, Any], parent: tuple[Llama, str], run: Run
) -> None:
    model, known = parent
    opened = Library.open(given["library"], known)
    stream = text_stream(model, run.root / "corpus", rows=2, length=16, seed=5)  # type: ignore[attr-defined]
    text = [next(stream) for _ in range(4)]
    states = final_states(model, text)
    trained, initial_ = (
        mean_kl(model, states, assemble(model, opened, everywhere(PARENT, "width-20"), trained=way), text)
        for way in (True, False)
    )
    assert trained < initial_


def test_libraries_and_choices_of_another_parent_are_refused(
    run: Run, given: dict[str, Any], parent: tuple[Llama, str]
) -> None:
    with pytest.raises(PunaError, match="another parent"):
        run("replace_one", "wrong", {"model": "other", "corpus": "corpus", "library": given["library"]})
    choice = run("choose_child", "for-wrong", given).outputs["choice"]
    about = json.loads(choice.read_text())
    wrong = choice.with_name("wrong.json")
    wrong.write_text(json.dumps({**about, "parent": "another"}))
    inputs = {"model": "parent", "library": given["library"], "choice": wrong}
    with pytest.raises(PunaError, match="the choice was made for another parent"):
        run("assemble_child", "wrong-choice", inputs)
    with pytest.raises(PunaError, match="no such solution"):
        run("assemble_child", "no-such", {**inputs, "choice": choice}, solution=3)


def test_counts_of_heads_that_fit_no_layer_are_refused(run: Run) -> None:
    with pytest.raises(PunaError, match="no layer's key-value heads"):
        run("sub_blocks", "heads", TEXT, kv_heads=[3])


def test_times_that_scatter_give_way_to_operations_at_the_rate_of_the_others() -> None:
    work = Workload(batch=2, prompt=8, answer=8)
    blocks = (changed(BLOCK, "feed_forward", name) for name in (PARENT, "width-20"))
    wide, narrow = (alone(block, "feed_forward") for block in blocks)
    times = {wide: Times(3e-3, 1e-3, 0.01), narrow: Times(9e-3, 9e-3, 0.9)}
    found = costs.joined(SPEC, times, Times(0.0, 2e-3, 0.0), work, most_spread=0.25)
    assert found.halves[wide].timed and found.halves[wide].seconds == pytest.approx(2 * 3e-3 + 8 * 1e-3)
    assert not found.halves[narrow].timed
    share = costs.operations(SPEC, narrow, work) / costs.operations(SPEC, wide, work)
    assert share == pytest.approx(0.5)
    assert found.halves[narrow].seconds == pytest.approx(share * found.halves[wide].seconds)
    assert found.shared.seconds == pytest.approx(8 * 2e-3)
    assert found.of(0, "attention", "none").seconds == 0.0


def test_the_operations_of_a_job_are_those_of_its_prompt_and_its_steps() -> None:
    attention = alone(BLOCK, "attention")
    one, four = (costs.operations(SPEC, attention, Workload(batch, 8, 8)) for batch in (1, 4))
    assert four == 4 * one
    linear = alone(changed(BLOCK, "attention", "linear"), "attention")
    assert costs.operations(SPEC, linear, Workload(1, 8, 8)) == 16 * 2 * 32 * 32
    longer = costs.operations(SPEC, attention, Workload(1, 8, 64))
    assert longer > (8 + 64) / (8 + 8) * one  # later steps look at more keys


def test_shapes_are_timed_once_and_a_half_costs_its_share_of_the_copies(
    run: Run, given: dict[str, Any]
) -> None:
    measured = run(
        "block_costs", "timed", {"model": "parent", "library": given["library"]}, measure="timed", repeats=2,
        batches=[1, 2], most_spread=1e9,
    )  # fmt: skip
    assert measured.metrics["shapes"] == 6  # parent, one head, linear; parent, half, linear
    content = json.loads(measured.outputs["costs"].read_text())
    assert [about["workload"]["batch"] for about in content] == [1, 2]
    assert all(about["shared"]["seconds"] > 0 for about in content)
    rows = content[0]["variants"]
    by_name = {(row["layer"], row["half"], row["variant"]): row for row in rows}
    assert by_name[0, "attention", "linear"] | {"layer": 3} == by_name[3, "attention", "linear"]
    assert by_name[0, "attention", PARENT]["cache_bytes"] == 2 * 2 * 8 * 2
    assert by_name[0, "attention", "kv_heads-1"]["cache_bytes"] == 2 * 8 * 2


def test_stages_go_from_a_parent_to_children_within_their_limits(run: Run, given: dict[str, Any]) -> None:
    inputs = {"model": "parent", "library": given["library"]}
    found: dict[str, Outcome] = {}
    for method in ("programme", "greedy", "most_parameters", "no_op_only", "uniform"):
        check = {"check_problems": 10} if method == "programme" else {}
        found[method] = run("choose_child", f"choose-{method}", given, method=method, **check)
        assert found[method].metrics["runtime_share"] <= 0.7 + 1e-9
    best = found["programme"].metrics["score"]
    assert all(
        found[other].metrics["score"] >= best - 1e-9 for other in ("greedy", "most_parameters", "no_op_only")
    )
    assert found["programme"].metrics["brute_force_difference"] < 1e-9
    assert found["programme"].metrics["greedy_least_excess"] >= -1e-9
    models = {
        name: run(
            "assemble_child", f"child-{name}", {**inputs, "choice": found[name].outputs["choice"]}
        ).outputs["model"]
        for name in ("programme", "uniform")
    }
    untrained = {**inputs, "choice": found["programme"].outputs["choice"]}
    models["initial"] = run("assemble_child", "untrained", untrained, trained=False).outputs["model"]
    apart = run("parent_divergence", "apart", {**TEXT, "models": {"parent": "parent", **models}}).metrics
    assert apart["kl.parent"] == 0.0
    assert apart["kl.programme"] <= apart["kl.initial"]
    speed = run("model_speed", "speed", {"models": {"parent": "parent", **models}}).metrics
    assert speed["share.parent"] == 1.0 and set(speed) >= {"seconds.programme", "share.uniform"}


def test_a_uniform_child_has_the_widest_channels_that_fit(run: Run, given: dict[str, Any]) -> None:
    choice = json.loads(
        run("choose_child", "choose-uniform", given, method="uniform").outputs["choice"].read_text()
    )["solutions"][0]
    (attention, feed), *others = choice["choice"]
    assert attention == PARENT and all(names == [attention, feed] for names in others)
    width = int(feed.removeprefix("width-"))
    wider = dataclasses.replace(BLOCK, width=width + 1)
    work = Workload(1, 8, 8)

    def whole(block: BlockSpec) -> float:
        head = 2 * 320 * 32 * 8
        return head + 4 * sum(costs.operations(SPEC, alone(block, half), work) for half in HALVES)

    limit = 0.7 * whole(BLOCK)
    assert whole(dataclasses.replace(BLOCK, width=width)) <= limit < whole(wider)


def test_limits_of_memory_count_the_keys_of_the_whole_batch(run: Run, given: dict[str, Any]) -> None:
    inputs = {"model": "parent", "library": given["library"]}
    many = run("block_costs", "many", inputs, batches=[1, 64]).outputs["costs"]
    few, lots = json.loads(many.read_text())
    weights = 2 * SPEC.parameter_count()
    stored = 4 * 2 * 2 * 8 * 2 * 16  # layers, keys and values, heads, numbers, bytes, tokens of a text
    room = weights + stored
    alone_ = many.with_name("alone.json")
    alone_.write_text(json.dumps([few]))
    whole = run("choose_child", "roomy", {**given, "costs": alone_}, runtime=None, memory=room)
    assert whole.metrics["score"] == 0.0 and whole.metrics["memory"] == room
    alone_.with_name("crowd.json").write_text(json.dumps([lots]))
    crowd = {**given, "costs": alone_.with_name("crowd.json")}
    tight = run("choose_child", "tight", crowd, runtime=None, memory=room + 20 * stored)
    assert tight.metrics["score"] > 0 and tight.metrics["memory"] <= room + 20 * stored
    assert tight.metrics["cache_share"] < 0.5
    both = run("choose_child", "both", {**given, "costs": many}, runtime=None, memory=room)
    assert both.metrics["batch"] == 1.0 and both.metrics["score"] == 0.0


def test_throughput_is_a_limit_of_the_seconds_and_further_children_differ(
    run: Run, given: dict[str, Any]
) -> None:
    first = run("choose_child", "choose-programme", given)
    wanted = run("choose_child", "fast", given, runtime=None, throughput=first.metrics["throughput"] * 1.2)
    assert wanted.metrics["throughput"] >= first.metrics["throughput"] * 1.2 * (1 - 1e-9)
    slow = run("choose_child", "late", given, runtime=None, latency=wanted.metrics["seconds"])
    assert slow.metrics["score"] == pytest.approx(wanted.metrics["score"])
    several = run("choose_child", "several", given, solutions=3, diversity=0.75).outputs["choice"]
    solutions = json.loads(several.read_text())["solutions"]
    scores = [each["figures"]["score"] for each in solutions]
    assert scores == sorted(scores)
    halves = [[name for names in each["choice"] for name in names] for each in solutions]
    for place, later in enumerate(halves):
        for earlier in halves[:place]:
            assert sum(a == b for a, b in zip(earlier, later, strict=True)) <= 0.75 * 8
    with pytest.raises(PunaError, match="no child is this cheap"):
        run("choose_child", "never", given, runtime=0.01)
