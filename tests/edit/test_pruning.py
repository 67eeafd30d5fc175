"""Pruning: shares become units, the lowest scores go, targets are met, and rounds of training go on."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator, torch_generator
from puna.core.stage import Context, get_stage, validate
from puna.data.corpus import write_corpus
from puna.edit.calibration import calibration_batches
from puna.edit.pruning.allocate import ALLOCATORS, MOST, Pace, centred, removals, weight_of
from puna.edit.pruning.prune import PruneSettings, prune
from puna.edit.pruning.scores import SCORERS, needs_of, score_units
from puna.model.llama import Llama
from puna.model.slicing import Masks, soft_mask
from puna.model.spec import BlockSpec, LlamaSpec
from puna.model.units import KINDS, Kind, block_parameters, unit_parameters
from puna.text import pretrained
from puna.text.packing import Batch
from puna.train.metrics import read_metrics
from tests.edit.running import run_stage
from tests.invariants import kit

WIDE = BlockSpec(heads=6, kv_heads=3, head_dim=8, width=40)
SPEC = kit.spec_of(WIDE, WIDE, WIDE, WIDE)


def batches(seed: int = 0) -> list[Batch]:
    ids = kit.random_ids(4, 16, seed)
    labels = torch.cat((ids[:, 1:], torch.full((4, 1), -100)), dim=1)
    return [Batch(ids, labels, torch.arange(16).expand(4, 16), torch.zeros_like(ids))]


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=40))
def test_centred_importances_have_mean_zero_and_largest_magnitude_one(values: list[float]) -> None:
    found = centred(values)
    if len({*values}) == 1:
        assert not any(found)
    else:
        assert abs(sum(found)) / len(found) <= 1e-6
        assert max(map(abs, found)) == pytest.approx(1)


def test_an_adaptive_step_takes_more_of_layers_that_matter_less() -> None:
    pace = Pace(total=0.4, steps=4, amplitude=0.05)
    shares = ALLOCATORS["adaptive"]([0.2, 0.2, 0.0, 0.98], [-1.0, 0.5, 1.0, -1.0], pace)
    assert shares == pytest.approx([0.35, 0.275, 0.05, MOST])
    assert ALLOCATORS["adaptive"]([0.02, 0.2], [1.0, 0.0], Pace(0.0, 4, 0.05)) == pytest.approx([0.0, 0.2])
    assert ALLOCATORS["uniform"]([0.2, 0.98], [-1.0, 1.0], pace) == pytest.approx([0.3, MOST])
    no_pull = Pace(0.4, 4, 0.0)
    assert ALLOCATORS["adaptive"]([0.2, 0.3], [1, -1], no_pull) == ALLOCATORS["uniform"](
        [0.2, 0.3], [0, 0], no_pull
    )


@given(st.lists(st.floats(0, 0.9), min_size=4, max_size=4))
def test_shares_become_units_that_weigh_as_much_but_for_one_unit_a_layer(shares: list[float]) -> None:
    counts = removals(SPEC, ("head_group", "channel"), shares, {})
    exact = sum(
        share * number * unit_parameters(SPEC, kind, layer)
        for layer, share in enumerate(shares)
        for kind, number in (("head_group", 3), ("channel", 40))
    )
    channel = unit_parameters(SPEC, "channel", 0)
    full = any(counts["channel", layer] == 39 for layer in range(4))
    assert full or abs(weight_of(SPEC, counts) - exact) <= 4 * channel
    assert all(counts["head_group", layer] <= 2 and counts["channel", layer] <= 39 for layer in range(4))


def test_fractions_of_head_groups_add_up_instead_of_falling_due_in_all_layers_at_once() -> None:
    taken: dict[tuple[Kind, int], int] = {}
    totals = []
    for share in (0.1, 0.15, 0.2, 0.25, 0.3):
        taken = removals(SPEC, ("head_group", "channel"), [share] * 4, taken)
        totals.append(sum(taken["head_group", layer] for layer in range(4)))
    assert totals == [1, 1, 2, 3, 3]  # of 12 head groups
    assert max(taken["head_group", layer] for layer in range(4)) == 1


def test_equal_debts_are_paid_where_the_order_says() -> None:
    counts = removals(SPEC, ("head_group",), [0.1] * 4, {}, {0: 3.0, 1: 2.0, 2: 1.0, 3: 4.0})
    assert [counts["head_group", layer] for layer in range(4)] == [0, 0, 1, 0]


@pytest.mark.parametrize("scorer", [*SCORERS])
@pytest.mark.parametrize("kind", KINDS)
def test_any_scorer_goes_with_any_unit_it_is_defined_for(scorer: str, kind: Kind) -> None:
    model = kit.decoder(SPEC)
    if kind not in SCORERS[scorer].kinds:
        with pytest.raises(PunaError, match="not defined for this kind"):
            needs_of(scorer, (kind,))
        return
    pruned = prune(model, batches(), PruneSettings(0.3, (kind,), scorer, steps=2))
    removed = 1 - block_parameters(pruned.model.spec) / block_parameters(SPEC)
    assert 0.3 <= removed < 0.56
    with soft_mask(model, Masks.of(SPEC, pruned.kept)):
        masked = model(batches()[0].input_ids)
    torch.testing.assert_close(pruned.model(batches()[0].input_ids), masked, atol=1e-4, rtol=0)


@pytest.mark.parametrize("allocator", [*ALLOCATORS])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_the_target_is_met_within_a_unit_a_layer(allocator: str, steps: int, share: float) -> None:
    settings = PruneSettings(share, scorer="magnitude", allocator=allocator, steps=steps, amplitude=0.1)
    pruned = prune(kit.decoder(SPEC), batches(), settings)
    removed = block_parameters(SPEC) - block_parameters(pruned.model.spec)
    wanted = share * block_parameters(SPEC)
    assert 0 <= removed - wanted <= 4 * unit_parameters(SPEC, "channel", 0) + 1
    assert pruned.steps <= steps


def test_importances_of_the_steps_are_centred_and_of_the_model_as_it_is_then() -> None:
    pruned = prune(kit.decoder(SPEC), batches(), PruneSettings(0.5, steps=4, amplitude=0.05))
    assert len(pruned.importances) == pruned.steps > 1
    for values in pruned.importances:
        assert sum(values) == pytest.approx(0, abs=1e-9) and max(map(abs, values)) == pytest.approx(1)
    assert any(first != second for first, second in itertools.pairwise(pruned.importances))


def test_units_that_give_nothing_go_first_by_taylor_and_contribution() -> None:
    """Channels whose column of down is zero change nothing: pruning them leaves the logits."""
    model = kit.decoder(SPEC)
    dead = [3, 11, 12, 30]
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight[:, dead] = 0
            block.mlp.up_proj.weight[dead] = 0
    ids = kit.random_ids(1, 9)
    for scorer in ("taylor", "contribution", "magnitude"):
        pruned = prune(model, batches(), PruneSettings(0.1, ("channel",), scorer, "uniform", steps=1))
        share = 4 * 4 * unit_parameters(SPEC, "channel", 0) / block_parameters(SPEC)
        exact = prune(model, batches(), PruneSettings(share - 1e-6, ("channel",), scorer, "uniform", steps=1))
        assert all(not {*dead} & {*channels} for channels in (*exact.kept.channels, *pruned.kept.channels))
        torch.testing.assert_close(exact.model(ids), model(ids), atol=1e-4, rtol=0)


def test_random_scores_follow_the_seed() -> None:
    first, again, other = (
        score_units(kit.decoder(SPEC), "random", ("channel",), seed=seed)["channel", 1] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@kit.neutral("nothing pruned")
def _() -> tuple[kit.Forward, kit.Forward]:
    model = kit.decoder(SPEC)
    return model, prune(model, batches(), PruneSettings(0.0)).model


def test_a_share_of_zero_changes_no_bit() -> None:
    plain, changed = kit.NEUTRAL["nothing pruned"]()
    kit.assert_same_bits(plain, changed, kit.random_ids(2, 17))


def test_pruning_leaves_the_model_it_was_given() -> None:
    model = kit.decoder(SPEC)
    prune(model, batches(), PruneSettings(0.4, steps=2))
    kit.assert_same_bits(kit.decoder(SPEC), model, kit.random_ids(1, 9))


def test_what_cannot_be_pruned_is_told() -> None:
    model = kit.decoder(SPEC)
    for settings, words in (
        (PruneSettings(0.99), "every half keeps a unit"),
        (PruneSettings(0.5, ("hidden", "channel")), "taken out alone"),
        (PruneSettings(0.5, scorer="tailor"), "unknown scorer"),
        (PruneSettings(0.5, allocator="adaptiv"), "unknown allocator"),
        (PruneSettings(0.9, ("block",), "cosine"), "one unit stays"),
    ):
        with pytest.raises(PunaError, match=words):
            prune(model, batches(), settings)


# --- the stages -------------------------------------------------------------------------------------


def sentences(count: int, seed: int) -> list[str]:
    generator = numpy_generator(seed, "sentences")
    words = ["the", "cat", "sat", "on", "that", "mat", "and", "other", "end", "then", "it", "went"]
    return [" ".join(str(generator.choice(words)) for _ in range(12)) for _ in range(count)]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pruning")
    block = BlockSpec(heads=4, kv_heads=2, head_dim=8, width=48)
    model = Llama(
        LlamaSpec(vocab_size=320, hidden_size=32, blocks=(block,) * 3, tied=True, max_positions=64),
        generator=torch_generator(0, "pruned"),
    )
    model.tokenizer = tiny_tokenizer
    pretrained.save(model, root / "model")
    about: dict[str, Any] = {"provenance": [{"source": "test", "licence": "CC0"}], "ledger": {}}
    for name, count in (("text", 60), ("held_out", 6)):
        rows = [
            {"id": f"{name}{n}", "text": text, "source": "test", "language": "en"}
            for n, text in enumerate(sentences(count, len(name)))
        ]
        write_corpus(root / name, "documents", rows, **about)
    return {name: root / name for name in ("model", "text", "held_out")}


PRUNING = {
    "share": 0.4,
    "steps": 2,
    "calibration_rows": 4,
    "calibration_length": 16,
    "calibration_batch_rows": 2,
}
TRAINING: dict[str, Any] = {
    "max_steps": 6,
    "batch_tokens": 64,
    "micro_batch_tokens": 64,
    "max_length": 32,
    "learning_rate": 1e-2,
    "schedule": "wsd",
    "warmup_ratio": 0.2,
    "dtype": "float32",
    "save_dtype": "float32",
}


def test_the_stage_prunes_saves_and_reports(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path / "cache"))
    inputs = {"model": str(places["model"]), "corpus": places["text"]}
    outcome, context = run_stage("prune", tmp_path / "out", inputs, {**PRUNING, "save_dtype": "float32"})
    small, whole = pretrained.load(outcome.outputs["model"]), pretrained.load(places["model"])
    figures = outcome.metrics
    removed = 1 - block_parameters(small.spec) / block_parameters(whole.spec)
    assert figures["removed_share"] == pytest.approx(removed)
    assert figures["target_error"] < 0.01 and figures["importance_mean"] < 1e-6
    assert figures["importance_largest_error"] < 1e-6 and figures["masked_difference"] < 1e-5
    assert figures["parameters"] == small.spec.parameter_count()
    assert 0 < figures["step_operations_share"] < 1 and 0 < figures["cache_share"] <= 1
    assert small.tokenizer is not None and context.report["tables"][0]["rows"]
    assert any((tmp_path / "cache" / "statistics").iterdir())
    again, _ = run_stage("prune", tmp_path / "again", inputs, {**PRUNING, "save_dtype": "float32"})
    kit.assert_same_bits(small, pretrained.load(again.outputs["model"]), torch.arange(4, 30)[None])


def test_calibration_text_is_drawn_by_the_seed_and_laid_end_to_end(places: dict[str, Path]) -> None:
    model = pretrained.load(places["model"])

    def ids(seed: int) -> torch.Tensor:
        found = calibration_batches(model, places["text"], rows=5, length=16, batch_rows=2, seed=seed)
        assert [len(batch.input_ids) for batch in found] == [2, 2, 1]
        assert all((batch.segments >= 0).all() for batch in found)
        return torch.cat([batch.input_ids for batch in found])

    assert torch.equal(ids(0), ids(0)) and not torch.equal(ids(0), ids(1))
    with pytest.raises(PunaError, match="too small"):
        calibration_batches(model, places["text"], rows=5000, length=16, batch_rows=2, seed=0)


def rounds_inputs(places: dict[str, Path]) -> dict[str, Any]:
    return {
        "model": str(places["model"]),
        "corpus": {"main": places["text"]},
        "calibration": places["text"],
        "held_out": {"en": places["held_out"]},
    }


def test_rounds_prune_to_a_straight_line_of_sizes_on_one_schedule(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puna.edit.pruning import job as prune_job

    sizes: list[int] = []
    original = prune_job._Rounds._begin

    def noting(self: Any, *arguments: Any) -> Any:
        loop = original(self, *arguments)
        sizes.append(block_parameters(loop.model.spec))
        return loop

    monkeypatch.setattr(prune_job._Rounds, "_begin", noting)
    parameters = {"prune": PRUNING, "train": TRAINING, "rounds": 3}
    outcome, context = run_stage("prune_and_train", tmp_path / "out", rounds_inputs(places), parameters)
    whole = block_parameters(pretrained.load(places["model"]).spec)
    assert sizes == pytest.approx([whole * (1 - 0.4 * n / 3) for n in (1, 2, 3)], rel=0.02)
    lines = [line for line in read_metrics(context.out / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    straight, straight_context = run_stage(
        "train",
        tmp_path / "straight",
        {"model": str(places["model"]), "corpus": {"main": places["text"]}},
        TRAINING,
    )
    plain = [line for line in read_metrics(straight_context.out / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["learning_rate"] for line in lines] == [line["learning_rate"] for line in plain]
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in plain]
    assert straight.metrics["loss.first"] != outcome.metrics["loss.first"]
    assert outcome.metrics["after.en.loss"] < outcome.metrics["before.en.loss"]
    assert not (context.out / "rounds").exists()
    small = pretrained.load(outcome.outputs["model"])
    assert block_parameters(small.spec) == sizes[-1]


def test_nothing_pruned_in_rounds_is_training_to_the_bit(places: dict[str, Path], tmp_path: Path) -> None:
    parameters = {"prune": {**PRUNING, "share": 0.0}, "train": TRAINING, "rounds": 3}
    rounds, _ = run_stage("prune_and_train", tmp_path / "x" / "train", rounds_inputs(places), parameters)
    inputs = {"model": str(places["model"]), "corpus": {"main": places["text"]}}
    stage = get_stage("train")
    context = Context("prune_and_train", tmp_path / "y", inputs, seed=0, dtype="float32")
    plain = stage.function(context, validate(stage.parameters, TRAINING, where="test"))
    models = [pretrained.load(outcome.outputs["model"]) for outcome in (rounds, plain)]
    kit.assert_same_bits(models[0], models[1], torch.arange(4, 30)[None])


@pytest.mark.parametrize(("killed_at", "dtype"), [(1, "float32"), (3, "bfloat16"), (4, "float32")])
def test_a_killed_run_goes_on_in_the_round_it_was_in(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, dtype: str
) -> None:
    from puna.train.loop import Loop

    parameters = {"prune": PRUNING, "train": {**TRAINING, "save_steps": 1, "dtype": dtype}, "rounds": 3}
    whole, _ = run_stage("prune_and_train", tmp_path / "whole", rounds_inputs(places), parameters)
    step = Loop._step

    def dying(self: Loop, *arguments: Any) -> Any:
        if self.state.step == killed_at:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Loop, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        run_stage("prune_and_train", tmp_path / "killed", rounds_inputs(places), parameters)
    monkeypatch.setattr(Loop, "_step", step)
    resumed, context = run_stage("prune_and_train", tmp_path / "killed", rounds_inputs(places), parameters)
    models = [pretrained.load(outcome.outputs["model"]) for outcome in (whole, resumed)]
    kit.assert_same_bits(models[0], models[1], torch.arange(4, 30)[None])
    lines = [line for line in read_metrics(context.out / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_settings_that_do_not_go_together_are_told_by_the_stages() -> None:
    for name, parameters, words in (
        ("prune", {"share": 0.5, "units": ["hidden", "channel"]}, "or hidden; or block"),
        ("prune", {"share": 0.5, "scorer": "cosine"}, "blocks alone"),
        ("prune_and_train", {"prune": PRUNING, "train": {"lora": {"r": 2}}}, "no lora"),
    ):
        with pytest.raises(PunaError, match=words):
            validate(get_stage(name).parameters, parameters, where="test")
