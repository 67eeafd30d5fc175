"""Learnt masks: hard concrete gates, the Lagrangian that holds them to a size, folding, and the stage."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import write_corpus
from puna.edit.calibration import calibration_batches
from puna.edit.pruning import hard_concrete
from puna.edit.pruning.l0 import Gates, Lagrangian, density_error, target_at
from puna.edit.pruning.mask_job import GatedOptimizer, Learnt, cut
from puna.edit.pruning.mask_stages import LearnMasks
from puna.model.llama import Llama
from puna.model.probe import probe
from puna.model.slicing import Masks, folded, sliced, soft_mask
from puna.model.spec import BlockSpec, LlamaSpec
from puna.model.units import Kept, Kind
from puna.text import pretrained
from puna.text.template import CHATML, Template
from puna.train.loop import Loop
from puna.train.metrics import read_metrics
from puna.train.optimizer import OptimizerSettings
from tests.edit.running import run_stage
from tests.invariants import kit

WIDE = BlockSpec(heads=6, kv_heads=3, head_dim=8, width=40)
SPEC = kit.spec_of(WIDE, WIDE)
MIXED = kit.spec_of(
    WIDE, dataclasses.replace(WIDE, attention="linear"), dataclasses.replace(WIDE, feed_forward="linear")
)
KINDS: tuple[Kind, ...] = ("hidden", "head_group", "channel")


def matrices(spec: LlamaSpec) -> int:
    """Weights of the matrices of all blocks."""
    model = Llama(spec, device="meta")
    return sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if ".layers." in name and weight.dim() == 2
    )


# --- gates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_alpha", [-3.0, -1.0, 0.0, 0.7, 2.0, 4.0])
def test_draws_are_nonzero_as_often_as_one_minus_the_distribution_at_zero_says(log_alpha: float) -> None:
    drawn = hard_concrete.sample(torch.full((200_000,), log_alpha), torch_generator(0, "drawn"))
    at_zero = hard_concrete.BETA * math.log(-hard_concrete.GAMMA / hard_concrete.ZETA) - log_alpha
    chance = 1 - 1 / (1 + math.exp(-at_zero))  # 1 - cdf(0), written out
    assert float((drawn > 0).double().mean()) == pytest.approx(chance, rel=0.01)
    assert float(hard_concrete.open_chance(torch.tensor(log_alpha))) == pytest.approx(chance)
    assert float(drawn.min()) >= 0 and float(drawn.max()) <= 1
    assert bool((drawn == 1).any()) and bool(((drawn > 0) & (drawn < 1)).any())


def test_gradients_of_a_draw_reach_gates_that_are_neither_shut_nor_fully_open() -> None:
    log_alpha = torch.linspace(-4, 4, 2000, requires_grad=True)
    drawn = hard_concrete.sample(log_alpha, torch_generator(1, "drawn"))
    (gradient,) = torch.autograd.grad(drawn.sum(), log_alpha)
    between = (drawn > 0) & (drawn < 1)
    assert torch.equal(gradient > 0, between)


def test_settled_factors_are_as_many_zeros_as_expected_and_soft_for_the_rest() -> None:
    log_alpha = torch.tensor([3.0, -2.0, 0.5, 4.0, -3.0, 1.0])
    factors = hard_concrete.settled(log_alpha)
    zeros = round(6 - float(hard_concrete.open_chance(log_alpha).sum()))
    assert zeros == 2 and factors[4] == factors[1] == 0.0 and int((factors == 0).sum()) == zeros
    assert float(factors[2]) == pytest.approx(1 / (1 + math.exp(-0.8 * 0.5 / (2 / 3))))
    shut = torch.full((4,), -5.0)
    assert int((hard_concrete.settled(shut) > 0).sum()) == 0
    assert int((hard_concrete.settled(shut, least=1) > 0).sum()) == 1


def shut_some(gates: Gates, seed: int) -> None:
    """Gates spread out, most of them open."""
    with torch.no_grad():
        for place, values in gates.log_alpha.items():
            values.copy_(torch.randn(values.shape, generator=torch_generator(seed, *place)) * 2 + 1)


@pytest.mark.parametrize("spec", [SPEC, MIXED], ids=["plain", "linear halves"])
@pytest.mark.parametrize("kinds", [KINDS, ("hidden",), ("head_group",), ("channel", "hidden")])
def test_the_expected_size_is_that_of_the_matrices(kinds: tuple[Kind, ...], spec: LlamaSpec) -> None:
    gates = Gates(spec, kinds)
    for shut in (0.0, 1.0):  # chances of exactly 1 and 0 for the first units of each vector
        with torch.no_grad():
            for values in gates.log_alpha.values():
                values.fill_(100.0)
                values[: len(values) // 3] = -100.0 if shut else 100.0
        small = sliced(kit.decoder(spec), gates.kept())
        expected = 1 - matrices(small.spec) / matrices(spec)
        assert gates.share_gone().item() == pytest.approx(expected, abs=1e-6)
        assert (expected > 0) == bool(shut)


def test_gates_begin_nearly_open_and_stay_where_they_have_gradients() -> None:
    gates = Gates(SPEC, KINDS, drop_rate=0.01)
    channels = 2 * 3 * 40 * SPEC.hidden_size / matrices(SPEC)
    chance = 1 - 1 / (1 + math.exp(-math.log(99) - 2 / 3 * math.log(11)))
    assert gates.share_gone().item() == pytest.approx(channels * chance, rel=0.1)
    gates.bound()
    assert all(float(values.abs().max()) <= math.log(100) + 1e-6 for values in gates.log_alpha.values())
    assert density_error(gates, 0) < 0.01


# --- masks are folded -------------------------------------------------------------------------------


@kit.neutral("open masks")
def _() -> tuple[kit.Forward, kit.Forward]:
    model, masked = kit.decoder(SPEC), kit.decoder(SPEC)

    def forward(*arguments: Any, **named: Any) -> torch.Tensor:
        with soft_mask(masked, Gates(SPEC, KINDS).all_open()):
            found: torch.Tensor = masked(*arguments, **named)
        return found

    return model, forward


def test_open_masks_change_no_bit() -> None:
    plain, changed = kit.NEUTRAL["open masks"]()
    kit.assert_same_bits(plain, changed, kit.random_ids(2, 17))


@settings(max_examples=15)
@given(
    st.integers(0, 1000),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["none", "qkv", "all"]),
    st.booleans(),
)
def test_folded_and_sliced_is_masked(seed: int, tied: bool, gated: bool, bias: Any, mlp_bias: bool) -> None:
    """Soft survivors go into the weights: of a tied embedding without a trace in the head."""
    spec = LlamaSpec(
        kit.VOCABULARY, 24, MIXED.blocks, norm_eps=0.1, tied=tied, attention_bias=bias, mlp_bias=mlp_bias
    )
    model, gates = kit.decoder(spec).double(), Gates(spec, KINDS)
    shut_some(gates, seed)
    found = gates.settled()
    masks = Masks(found.head_groups, found.channels, found.hidden, torch.tensor([1.0, 0.5, 1.0]), gated)
    ids = kit.random_ids(2, 9)
    with soft_mask(model, masks), torch.no_grad():
        masked = model(ids)
    model.load_state_dict(folded(model.state_dict(), spec, masks))
    with torch.no_grad():
        small = sliced(model, gates.kept())(ids)
    torch.testing.assert_close(small, masked, atol=1e-5 * max(1.0, float(masked.abs().max())), rtol=0)
    assert len(gates.kept().hidden) < 24


def test_masks_of_gate_and_up_are_not_those_of_their_product() -> None:
    model, half = kit.decoder(SPEC), {0: torch.full((40,), 0.5)}
    ids = kit.random_ids(1, 9)
    with torch.no_grad():
        with soft_mask(model, Masks(channels=half)):
            product = model(ids)
        with soft_mask(model, Masks(channels=half, gated=True)):
            each = model(ids)
    assert float((product - each).abs().max()) > 1e-3


def test_the_small_model_of_a_cut_gives_the_masked_logits() -> None:
    model, gates = kit.decoder(SPEC), Gates(SPEC, KINDS)
    shut_some(gates, 3)
    plain = probe(model)
    small, figures = cut(model, gates)
    assert figures["open_difference"] == 0.0 and figures["masked_difference"] < 1e-5
    assert float((probe(small) - plain).abs().max()) > 1e-3
    assert figures["hidden_left"] < 1 and figures["parameters"] == small.spec.parameter_count()


# --- the Lagrangian ---------------------------------------------------------------------------------


def test_the_target_rises_on_a_straight_line_and_stays() -> None:
    assert [target_at(step, 8, 0.4, 0.5) for step in range(8)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4]
    )
    assert target_at(0, 8, 0.4, 0.0) == 0.4


def optimizer_of(learnt: Learnt, *, decay: float = 0.0, rate: float = 0.1) -> GatedOptimizer:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    settings_ = OptimizerSettings(learning_rate=1e-3, weight_decay=decay)
    return GatedOptimizer(
        [("weight", weight)], settings_, learnt=learnt, gate_rate=rate, multiplier_rate=rate
    )


def learnt_of(share: float, steps: int = 40) -> Learnt:
    return Learnt(Gates(SPEC, KINDS), Lagrangian(), share, 0.5, steps, 0)


def test_multipliers_climb_while_the_size_is_missed_and_decay_touches_neither_them_nor_gates() -> None:
    found = []
    for decay in (0.0, 0.9):
        learnt = learnt_of(0.4)
        optimizer = optimizer_of(learnt, decay=decay)
        prices = []
        for _ in range(5):
            gap = learnt.gates.share_gone().item() - learnt.target
            assert gap < 0  # too little is gone
            optimizer.step(1.0, 1.0, 1.0)
            prices.append(float(learnt.multipliers.penalty(torch.tensor(gap))))
        assert prices == sorted(prices) and prices[0] > 0
        assert learnt.multipliers.linear.item() < 0 < learnt.multipliers.quadratic.item()
        found.append({name: value.detach().clone() for name, value in learnt.named().items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_lagrangian_alone_brings_the_size_to_the_target() -> None:
    learnt = learnt_of(0.4, steps=400)
    optimizer = optimizer_of(learnt)
    for _ in range(400):
        optimizer.step(1.0, 1.0, 1.0)
    assert learnt.gates.share_gone().item() == pytest.approx(0.4, abs=0.01)


def test_a_closed_optimizer_gives_the_weights_of_the_model_alone() -> None:
    learnt = learnt_of(0.4)
    optimizer = optimizer_of(learnt)
    optimizer.step(1.0, 1.0, 1.0)
    assert "gates.hidden.-1" in optimizer.weights() and "first/multipliers.linear" in optimizer.moments()
    optimizer.close()
    assert list(optimizer.weights()) == ["weight"]


# --- the stages -------------------------------------------------------------------------------------

TASK = ["cat", "mat", "end", "other"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("masks")
    block = BlockSpec(heads=4, kv_heads=2, head_dim=8, width=48)
    model = Llama(
        LlamaSpec(vocab_size=320, hidden_size=32, blocks=(block,) * 2, tied=True, max_positions=128),
        generator=torch_generator(0, "masked"),
    )
    model.tokenizer = tiny_tokenizer
    model.template = Template(CHATML.replace("im_end", "end"), tiny_tokenizer.template_strings)
    pretrained.save(model, root / "model")
    about: dict[str, Any] = {"provenance": [{"source": "test", "licence": "CC0"}], "ledger": {}}
    for name, count in (("chats", 60), ("held_out", 8)):
        rows = [
            {
                "id": f"{name}{n}",
                "messages": [
                    {"role": "user", "content": f"the {TASK[n % 4]}"},
                    {"role": "assistant", "content": f"{TASK[n % 4]} on the {TASK[(n + 1) % 4]}"},
                ],
                "source": "test",
                "language": "en",
            }
            for n in range(count)
        ]
        write_corpus(root / name, "messages", rows, **about)
    return {name: root / name for name in ("model", "chats", "held_out")}


LEARNING: dict[str, Any] = {
    "share": 0.3,
    "mask_learning_rate": 0.5,
    "multiplier_learning_rate": 5.0,
    "train": {
        "objective": "sft",
        "max_steps": 12,
        "batch_tokens": 128,
        "micro_batch_tokens": 64,
        "max_length": 64,
        "learning_rate": 1e-2,
        "lora": {"r": 2, "target": ["q_proj", "v_proj"]},
        "dtype": "float32",
        "save_dtype": "float32",
    },
}


def inputs_of(places: dict[str, Path]) -> dict[str, Any]:
    return {
        "model": str(places["model"]),
        "corpus": {"main": places["chats"]},
        "held_out": {"chats": places["held_out"]},
    }


@pytest.fixture(scope="module")
def learnt_once(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Context]:
    return run_stage("learn_masks", tmp_path_factory.mktemp("learnt") / "out", inputs_of(places), LEARNING)


def test_the_stage_learns_cuts_saves_and_reports(
    places: dict[str, Path], learnt_once: tuple[Outcome, Context], tmp_path: Path
) -> None:
    outcome, context = learnt_once
    figures, whole = outcome.metrics, pretrained.load(places["model"])
    small = pretrained.load(outcome.outputs["model"])
    assert figures["open_difference"] == 0.0 and figures["masked_difference"] < 1e-4
    assert figures["density_error"] < 0.01
    assert figures["size_error"] == pytest.approx(abs(figures["share_gone"] - 0.3))
    assert figures["removed_share"] == pytest.approx(figures["share_gone"], abs=0.1)  # few head groups
    assert small.spec.hidden_size < whole.spec.hidden_size and small.adapter is None
    assert figures["parameters"] == small.spec.parameter_count() < whole.spec.parameter_count()
    lines = [line for line in read_metrics(context.out / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["share_wanted"] for line in lines] == pytest.approx(
        [target_at(step, 12, 0.3, 0.5) for step in range(12)]
    )
    assert lines[-1]["share_gone"] > 0.1 > lines[0]["share_gone"]
    assert context.report["tables"][-1]["rows"]
    # What was held out was measured under the masks that the small model has.
    measured, _ = run_stage(
        "train",
        tmp_path / "again",
        {**inputs_of(places), "model": str(outcome.outputs["model"])},
        {**LEARNING["train"], "max_steps": 1},
    )
    assert measured.metrics["before.chats.loss"] == pytest.approx(figures["after.chats.loss"], rel=1e-4)


@pytest.mark.parametrize("killed_at", [1, 7])
def test_a_killed_run_ends_with_the_same_weights(
    places: dict[str, Path],
    learnt_once: tuple[Outcome, Context],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_at: int,
) -> None:
    saving = {**LEARNING, "train": {**LEARNING["train"], "save_steps": 1}}
    step = Loop._step

    def dying(self: Loop, *arguments: Any) -> Any:
        if self.state.step == killed_at:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Loop, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        run_stage("learn_masks", tmp_path / "killed", inputs_of(places), saving)
    monkeypatch.setattr(Loop, "_step", step)
    resumed, _ = run_stage("learn_masks", tmp_path / "killed", inputs_of(places), saving)
    models = [pretrained.load(outcome.outputs["model"]) for outcome in (learnt_once[0], resumed)]
    assert models[0].spec == models[1].spec
    kit.assert_same_bits(models[0], models[1], torch.arange(4, 30)[None])


@pytest.mark.parametrize(
    "change",
    [
        {"share": 0.2},
        {"ramp": 0.1},
        {"mask_learning_rate": 0.2},
        {"multiplier_learning_rate": 1.0},
        {"quadratic_start": 50.0},
        {"drop_rate": 0.2},
        {"units": ["channel"]},
    ],
    ids=lambda change: str(*change),
)
def test_every_option_changes_the_small_model(
    places: dict[str, Path], learnt_once: tuple[Outcome, Context], tmp_path: Path, change: dict[str, Any]
) -> None:
    changed, _ = run_stage("learn_masks", tmp_path / "changed", inputs_of(places), {**LEARNING, **change})
    before, after = (
        {
            name: (tuple(value.shape), float(value.sum()))
            for name, value in pretrained.load(outcome.outputs["model"]).state_dict().items()
        }
        for outcome in (learnt_once[0], changed)
    )
    assert before != after


def test_no_option_is_left_out_of_these_tests() -> None:
    assert {*LearnMasks.model_fields} == {
        *("share", "ramp", "mask_learning_rate", "multiplier_learning_rate", "quadratic_start"),
        *("drop_rate", "units", "train"),
    }


def test_settings_that_do_not_go_together_are_told() -> None:
    stage = get_stage("learn_masks")
    for changes, words in (
        ({"lora": None}, "give it lora"),
        ({"objective": "clm", "lora": {"base": "nf4"}}, "lora.base as_is"),
        ({"objective": "dpo"}, "masks are learnt with"),
        ({"recompute": 1}, "no sharding, stop_after, state_after or recompute"),
    ):
        with pytest.raises(PunaError, match=words):
            validate(stage.parameters, {**LEARNING, "train": {**LEARNING["train"], **changes}}, where="test")
    with pytest.raises(PunaError, match="each kind once"):
        validate(stage.parameters, {**LEARNING, "units": ["channel", "channel"]}, where="test")


PROMPT = 'the cat says "in the end"\nand then it went on'


def test_a_system_prompt_goes_with_the_model_into_training_and_what_is_made_of_it(
    places: dict[str, Path], tmp_path: Path
) -> None:
    """It is in the template of the checkpoint, so that nobody can measure without what was trained with."""
    prompted, _ = run_stage(
        "system_prompt", tmp_path / "prompted", {"model": str(places["model"])}, {"content": PROMPT}
    )
    whole = pretrained.load(places["model"])
    model = pretrained.load(prompted.outputs["model"])
    kit.assert_same_bits(whole, model, torch.arange(4, 30)[None])
    asked = [{"role": "user", "content": "the cat"}]
    assert PROMPT in model.template.render(asked)
    own = [{"role": "system", "content": "on"}, *asked]
    assert model.template.render(own) == whole.template.render(own)
    inputs = {**inputs_of(places), "model": str(prompted.outputs["model"])}
    longer = {**LEARNING, "train": {**LEARNING["train"], "max_length": 128, "micro_batch_tokens": 128}}
    outcome, _ = run_stage("learn_masks", tmp_path / "small", inputs, longer)
    small = pretrained.load(outcome.outputs["model"])
    assert small.template.source == model.template.source
    (batch,) = calibration_batches(small, places["chats"], rows=1, length=128, batch_rows=1, seed=0)
    assert PROMPT in small.tokenizer.decode(batch.input_ids[0].tolist())


def test_calibration_reads_conversations_whole_and_learns_their_answers(places: dict[str, Path]) -> None:
    model = pretrained.load(places["model"])
    batches = calibration_batches(model, places["chats"], rows=6, length=96, batch_rows=4, seed=0)
    assert [len(batch.input_ids) for batch in batches] == [4, 2]
    batch = batches[0]
    learnt = batch.labels[batch.labels >= 0]
    text = model.tokenizer.decode(learnt.tolist())
    assert " on the " in text and "user" not in text
    assert 0 < len(learnt) < batch.tokens


def test_kept_says_what_masks_leave() -> None:
    gates = Gates(SPEC, ("head_group",))
    with torch.no_grad():
        gates.log_alpha["head_group", 1][:2] = -100.0
    everything = Kept.everything(SPEC)
    assert gates.kept() == dataclasses.replace(everything, head_groups=((0, 1, 2), (2,)))
