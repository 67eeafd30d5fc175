"""Quantising whole decoders: order of blocks, folds, what is left alone, wrong inputs, neutral settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.edit.quantize.calibration import collect, round_tokens, rounded_activations
from puna.edit.quantize.dual import DualLinear, put_in, take_out
from puna.edit.quantize.methods import SETTINGS, setting
from puna.edit.quantize.quantize import quantize
from puna.edit.quantize.settings import (
    Awq,
    DualBinary,
    Gptq,
    Nf4,
    Quantization,
    Smooth,
    Uniform,
)
from puna.edit.quantize.study import apply, kernels_for, twin
from puna.edit.quantize.transforms import awq, clip, smooth
from puna.edit.quantize.tuning import Budget, pool, settle
from puna.model.adapters import LoraSettings, add_lora
from puna.model.blockwise import Blockwise
from puna.model.llama import Llama
from puna.model.sites import fold_inputs, sites
from puna.model.spec import BlockSpec
from tests.invariants import kit

RICH = BlockSpec(heads=4, kv_heads=2, head_dim=8, width=48, series=2, shortcut=8)
OWN_HEADS = BlockSpec(heads=4, kv_heads=4, head_dim=8, width=48)
GRID = Uniform(bits=3, group=16)


def model(*blocks: BlockSpec) -> Llama:
    return kit.decoder(kit.spec_of(*blocks))


def rows(count: int = 4, time: int = 24) -> Tensor:
    return kit.random_ids(count, time)


@kit.neutral("quantised with every layer skipped")
def _() -> tuple[kit.Forward, kit.Forward]:
    changed = model()
    quantize(changed, Quantization(rounding=Gptq(), transform=Awq(), skip_layers=(0, 1)), rows())
    return model(), changed


@kit.neutral("weights on a grid, put on it again")
def _() -> tuple[kit.Forward, kit.Forward]:
    plain, changed = model(), model()
    for each in (plain, changed):
        quantize(each, Quantization(grid=Nf4()))
    quantize(changed, Quantization(grid=Uniform(bits=8), skip_layers=(0, 1)))
    return plain, changed


@pytest.mark.parametrize("name", ["quantised with every layer skipped", "weights on a grid, put on it again"])
def test_neutral_settings_change_no_bit(name: str) -> None:
    plain, changed = kit.NEUTRAL[name]()
    kit.assert_same_bits(plain, changed, rows())


def test_blockwise_reading_is_reading_whole() -> None:
    whole = model()
    passing = Blockwise(whole, rows(5), rows_at_once=2)
    for _ in whole.spec.blocks:
        passing.advance()
    with torch.no_grad():
        torch.testing.assert_close(whole.model.norm(passing.hidden), whole.hidden(rows(5)))


def test_statistics_are_those_of_the_inputs() -> None:
    whole = model()
    passing = Blockwise(whole, rows(5), rows_at_once=2)
    places = list(sites(whole, 0))
    found = collect(passing, places)[0]
    with torch.no_grad():
        entering = whole.model.layers[0].input_layernorm(passing.hidden).flatten(0, 1)
    assert found.sums.dtype == torch.float32 and found.count == len(entering)
    torch.testing.assert_close(found.sums, entering.T @ entering)
    torch.testing.assert_close(found.mean, entering.abs().mean(dim=0))
    assert torch.equal(found.largest, entering.abs().amax(dim=0))


def test_block_by_block_and_in_one_pass_the_sums_are_the_same() -> None:
    from puna.edit import stats
    from puna.text.packing import Batch

    whole = model()
    ids = rows(5)
    batch = Batch(ids, ids, torch.arange(24).expand(5, 24), torch.zeros_like(ids))
    theirs = stats.collect(whole, [batch], ("gram", "mean_abs", "max_abs"))
    passing = Blockwise(whole, ids, rows_at_once=2)
    for layer in range(2):
        places = list(sites(whole, layer))
        for site, inputs in zip(places, collect(passing, places), strict=True):
            name = stats.site_of(site.names[0].removesuffix(".weight"))
            torch.testing.assert_close(inputs.sums, theirs.of("gram")[name])
            torch.testing.assert_close(inputs.mean, theirs.of("mean_abs")[name])
            torch.testing.assert_close(inputs.largest, theirs.of("max_abs")[name])
        passing.advance()


def test_a_later_block_is_calibrated_on_what_quantised_ones_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    from puna.edit.quantize import quantize as module

    seen: list[Tensor] = []

    def watching(passing: Blockwise, places: Any) -> Any:
        seen.append(passing.hidden.clone())
        return collect(passing, places)

    monkeypatch.setattr(module, "collect", watching)
    changed, exact = model(), model()
    quantize(changed, Quantization(grid=Uniform(bits=2, group=16), rounding=Gptq()), rows())
    passing = Blockwise(changed, rows())
    passing.advance()  # through the quantised first block
    torch.testing.assert_close(seen[1], passing.hidden)
    passing = Blockwise(exact, rows())
    passing.advance()
    assert (seen[1] - passing.hidden).abs().max() > 0.1


@pytest.mark.parametrize("block", [kit.BLOCK, OWN_HEADS, RICH])
@pytest.mark.parametrize("kind", ["awq", "smooth", "any"])
def test_folding_scales_changes_no_output(block: BlockSpec, kind: str) -> None:
    changed, exact = model(block, block), model(block, block)
    for layer in range(2):
        passing = Blockwise(changed, rows())
        for _ in range(layer):
            passing.advance()
        places = list(sites(changed, layer))
        for site, inputs in zip(places, collect(passing, places), strict=True):
            if kind == "awq":
                awq(site, inputs, Awq(), GRID)
            elif kind == "smooth":
                smooth(site, inputs, Smooth())
            elif site.folds_into is not None:
                fold_inputs(site, torch.linspace(0.5, 2, site.reader.in_features))
    with torch.no_grad():
        name = "model.layers.0.mlp.gate_proj.weight"
        assert not torch.equal(changed.get_parameter(name), exact.get_parameter(name))
        torch.testing.assert_close(changed(rows()), exact(rows()), atol=1e-4, rtol=1e-4)


def test_values_take_a_scale_only_where_every_head_has_its_own() -> None:
    shared = {site.names[0].split(".")[-2]: site.folds_into for site in sites(model(), 0)}
    own = {site.names[0].split(".")[-2]: site.folds_into for site in sites(model(OWN_HEADS), 0)}
    assert shared["o_proj"] is None and own["o_proj"] == "rows"
    assert shared["q_proj"] == "norm" and shared["down_proj"] == "rows"


def _error(settings: Quantization, seed: int = 0) -> float:
    changed = kit.decoder(kit.spec_of(kit.BLOCK, kit.BLOCK), seed)
    with torch.no_grad():
        exact = changed(rows(8))
        quantize(changed, settings, rows(8))
        return float((changed(rows(8)) - exact).square().mean())


def test_gptq_and_awq_move_logits_less_than_rounding_to_nearest() -> None:
    plain, better = _error(Quantization(grid=GRID)), _error(Quantization(grid=GRID, rounding=Gptq()))
    assert better < 0.8 * plain
    assert _error(Quantization(grid=GRID, transform=Awq())) < plain


def test_clipping_lowers_the_error_of_each_output() -> None:
    whole = model()
    site = list(sites(whole, 0))[2]
    inputs = collect(Blockwise(whole, rows()), [site])[0]
    grid = Uniform(bits=2, group=None)
    exact = site.linears[0].weight.detach().clone()

    def error() -> float:
        left = _nearest(site.linears[0].weight.detach(), grid) - exact
        return float((left * (left @ inputs.sums)).sum())

    before = error()
    clip(site.linears[0], inputs, grid)
    assert error() < before


def _nearest(weight: Tensor, grid: Uniform) -> Tensor:
    from puna.edit.quantize.quantize import round_matrix

    return round_matrix(weight, Quantization(grid=grid)).weight


def test_embedding_head_norms_and_skipped_layers_stay_as_they_are() -> None:
    changed, exact = model(kit.BLOCK, kit.BLOCK, kit.BLOCK), model(kit.BLOCK, kit.BLOCK, kit.BLOCK)
    quantize(changed, Quantization(grid=GRID, rounding=Gptq(), skip_layers=(1,)), rows())
    theirs = dict(exact.named_parameters())
    for name, weight in changed.named_parameters():
        touched = "_proj" in name and ".1." not in name
        assert torch.equal(weight, theirs[name]) != touched, name
    assert set(changed.grids) == {name for name in theirs if "_proj" in name and ".1." not in name}


def test_activations_are_rounded_token_by_token_and_only_within_the_block() -> None:
    hidden = torch.randn(3, 5, 32)
    rounded = round_tokens(hidden, 8)
    step = hidden.abs().amax(dim=-1, keepdim=True) / 127
    assert ((rounded - hidden).abs() <= 0.51 * step).all()
    assert torch.equal(rounded[1], round_tokens(hidden[1], 8))
    whole = model()
    with torch.no_grad():
        before = whole(rows())
        with rounded_activations(whole, 4):
            assert (whole(rows()) - before).abs().max() > 0.05
        assert torch.equal(whole(rows()), before)


@pytest.mark.parametrize("name", [name for name in SETTINGS if setting(name).training is None])
def test_every_setting_runs_and_counts_its_bits(name: str) -> None:
    changed = model()
    done = quantize(changed, setting(name).quantization, rows())
    assert all(torch.isfinite(weight).all() for weight in changed.parameters())
    assert done.storage.bits >= done.storage.nominal >= 1
    assert set(done.matrices) == {key for key, _ in changed.named_parameters() if "_proj" in key}
    packed = setting(name).method in ("rtn", "gptq", "awq", "smooth")
    assert (kernels_for(changed) is not None) == packed


@pytest.mark.parametrize("name", ["db-2", "qlora-4", "ir-qlora-4"])
def test_trainings_after_rounding_lower_the_loss_and_leave_a_plain_model(name: str) -> None:
    exact, changed = model(), model()
    lessons = rows(6, 16)

    def loss(each: Llama) -> float:
        with torch.no_grad():
            return -float(each(lessons)[:, :-1].log_softmax(-1).gather(-1, lessons[:, 1:, None]).mean())

    def distance(each: Llama) -> float:
        with torch.no_grad():
            theirs = exact(lessons).log_softmax(-1)
            return float((theirs.exp() * (theirs - each(lessons).log_softmax(-1))).sum(-1).mean())

    untrained = model()
    quantize(untrained, setting(name).quantization)
    budget = Budget(steps=8, rows=3, rate=5e-3, rank=8)
    apply(changed, setting(name), rows(), lessons, budget, 0)
    kinds = {type(module) for key, module in changed.named_modules() if key.endswith("_proj")}
    assert kinds == {torch.nn.Linear}
    measure = distance if name == "db-2" else loss
    assert measure(changed) < measure(untrained)
    assert all(parameter.requires_grad for parameter in changed.parameters())


def test_dual_layers_begin_as_the_grid_and_their_gradients_are_exact() -> None:
    changed, rounded = model(), model()
    grid = DualBinary(group=16)
    quantize(rounded, Quantization(grid=grid))
    put_in(changed, grid)
    layer = changed.model.layers[0].mlp.gate_proj
    assert isinstance(layer, DualLinear)
    assert torch.equal(layer.decoded(), rounded.model.layers[0].mlp.gate_proj.weight)
    entering = torch.randn(6, 32)
    (layer(entering) ** 2).sum().backward()
    assert layer.first.grad is not None and layer.second.grad is not None
    ones, twos = layer.digits()
    first = layer.first.detach().clone().requires_grad_()
    second = layer.second.detach().clone().requires_grad_()
    wide = [each.repeat_interleave(16, dim=1)[:, :32] for each in (first, second)]
    ((entering @ (wide[0] * ones + wide[1] * twos).T) ** 2).sum().backward()
    torch.testing.assert_close(layer.first.grad, first.grad)
    torch.testing.assert_close(layer.second.grad, second.grad)
    take_out(changed)
    name = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(changed.get_parameter(name), rounded.get_parameter(name))


def test_ways_around_a_lora_begin_at_nothing_and_end_inside_it() -> None:
    changed = model()
    add_lora(changed, LoraSettings(r=8, alpha=8.0), seed=0)
    with torch.no_grad():
        before = changed(rows())
        pool(changed)
        assert torch.equal(changed(rows()), before)
        for name, parameter in changed.named_parameters():
            if name.endswith("strength"):
                parameter.fill_(0.3)
        moved = changed(rows())
        layer = changed.model.layers[0].self_attn.q_proj
        entering = torch.randn(2, 32)
        down, up = layer.lora_A["default"], layer.lora_B["default"]
        plain_down = down.parametrizations.weight.original
        pooled = entering @ plain_down.T + 0.3 * entering.view(2, 8, 4).mean(dim=2)
        torch.testing.assert_close(down(entering), pooled)
        plain_up = up.parametrizations.weight.original
        torch.testing.assert_close(up(pooled), pooled @ plain_up.T + 0.3 * pooled.repeat_interleave(4, dim=1))
        settle(changed)
        torch.testing.assert_close(changed(rows()), moved)
    assert (moved - before).abs().max() > 1e-3


def test_a_rank_that_does_not_divide_the_widths_is_refused() -> None:
    changed = model()
    add_lora(changed, LoraSettings(r=3), seed=0)
    with pytest.raises(PunaError, match="its rank divides"):
        pool(changed)


def test_wrong_models_and_missing_text_are_told() -> None:
    with pytest.raises(PunaError, match="no text to make them from"):
        quantize(model(), Quantization(rounding=Gptq()))
    with pytest.raises(PunaError, match="float32"):
        quantize(model().bfloat16(), Quantization())
    with pytest.raises(PunaError, match="a layer to skip"):
        quantize(model(), Quantization(skip_layers=(2,)))
    adapted = model()
    add_lora(adapted, LoraSettings(r=2), seed=0)
    with pytest.raises(PunaError, match="merge the adapter"):
        quantize(adapted, Quantization())


def test_the_same_seed_gives_the_same_rotations() -> None:
    found = []
    for seed in (0, 0, 1):
        changed = model()
        quantize(changed, setting("quip-3").quantization, rows(), seed=seed)
        found.append(changed.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_twin_shares_nothing_that_quantising_changes() -> None:
    exact = model()
    before = {name: tensor.clone() for name, tensor in exact.state_dict().items()}
    quantize(twin(exact), Quantization(grid=GRID, transform=Awq()), rows())
    assert all(torch.equal(before[name], tensor) for name, tensor in exact.state_dict().items())
    assert not exact.grids
