"""Grids and roundings: levels, their fit, GPTQ and LDLQ, storage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from puna.core.seeds import torch_generator
from puna.edit.quantize.grids import Fitted, dual_levels, fit, fit_binary, fit_dual, fit_uniform
from puna.edit.quantize.methods import METHODS, SETTINGS, setting
from puna.edit.quantize.nf4_planner import Nf4Planner, entropy
from puna.edit.quantize.planners import PlainPlanner, salient_mask
from puna.edit.quantize.quantize import round_matrix
from puna.edit.quantize.rounding import Moments, gptq
from puna.edit.quantize.settings import (
    Binary,
    BitsByGroup,
    DualBinary,
    Gptq,
    Ldlq,
    Nf4,
    Quantization,
    ResidualBinary,
    Rotate,
    SalientColumns,
    SalientWeights,
    Uniform,
)
from puna.model import nf4
from puna.model.uniform_grid import UniformGrid, short_step


def weight(rows: int = 24, columns: int = 128, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch_generator(seed, "weight")) * 0.1


def moments(columns: int = 128, samples: int = 400, seed: int = 0) -> Moments:
    """Correlated inputs, some channels large."""
    generator = torch_generator(seed, "inputs")
    drawn, mixing = (torch.randn(count, columns, generator=generator) for count in (samples, columns))
    mixed = drawn @ mixing * torch.logspace(1, -1, columns)
    return Moments(mixed.T @ mixed)


def error(found: Tensor, exact: Tensor, seen: Moments) -> float:
    return float(seen.error((found - exact).T).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_takes_the_nearest_of_all_levels_and_zero_is_one(bits: int, symmetric: bool) -> None:
    values = weight().T.contiguous()
    values[3] = 0
    levels = fit_uniform(values, Uniform(bits=bits, symmetric=symmetric))
    rounded = levels.nearest(values)
    assert (rounded[3] == 0).all()
    every = (torch.arange(2**bits)[:, None] - levels.zero) * levels.step  # [levels, rows]
    least = (values[:, None] - every).abs().amin(dim=1)
    torch.testing.assert_close((values - rounded).abs(), least, atol=1e-6, rtol=0)
    # What lies beyond the last level does so by at most a step, half of it the zero point's own rounding.
    assert (least <= 1.2 * levels.step).all()


def test_a_short_step_times_any_zero_point_is_a_number_of_half_precision() -> None:
    steps = torch.logspace(-3, 0, 200)
    short = short_step(steps, 4).float()
    assert (short >= steps).all() and (short <= steps * (1 + 2**-6)).all()
    for zero in range(16):
        low = zero * short
        assert torch.equal(low.half().float(), low)


def test_gptq_without_correlations_is_rounding_to_nearest() -> None:
    exact = weight()
    grid = Uniform(bits=3, group=32)
    plain = round_matrix(exact, Quantization(grid=grid)).weight
    found = round_matrix(exact, Quantization(grid=grid, rounding=Gptq()), Moments(torch.eye(128))).weight
    assert torch.equal(plain, found)


def test_gptq_is_ldlq_and_better_than_nearest() -> None:
    exact, seen = weight(), moments()
    grid = Uniform(bits=3, group=None)
    plain = round_matrix(exact, Quantization(grid=grid)).weight
    forward = round_matrix(exact, Quantization(grid=grid, rounding=Gptq()), seen).weight
    back = round_matrix(exact, Quantization(grid=grid, rounding=Ldlq()), seen).weight
    assert (forward != back).float().mean() < 0.01  # two orders of the same sums may part at a tie
    assert error(forward, exact, seen) < 0.7 * error(plain, exact, seen)


def test_gptq_in_blocks_is_gptq_column_by_column() -> None:
    exact, seen = weight(8, 96), moments(96)
    found = round_matrix(exact, Quantization(grid=Uniform(bits=3, group=None), rounding=Gptq()), seen).weight
    left, factor = exact.T.clone().double(), seen.factor.double()
    levels = fit_uniform(exact.T.contiguous(), Uniform(bits=3, group=None))
    for column in range(96):
        rounded = levels.nearest(left[column].float()).double()
        gap = (left[column] - rounded) / factor[column, column]
        left[column] = rounded
        left[column + 1 :] -= factor[column, column + 1 :, None] * gap
    assert (left.float() != found.T).float().mean() < 0.01


def test_a_group_is_fitted_on_weights_that_were_updated_until_then() -> None:
    class Spy(PlainPlanner):
        def begin(self, start: int, values: Tensor) -> Fitted:
            seen[start] = values.clone()
            return super().begin(start, values)

    seen: dict[int, Tensor] = {}
    exact = weight().T.contiguous()
    gptq(exact, moments(), Spy(Uniform(bits=2, group=32), exact))
    assert sorted(seen) == [0, 32, 64, 96]
    assert torch.equal(seen[0], exact[:32])
    assert all(not torch.equal(seen[start], exact[start : start + 32]) for start in (32, 64, 96))


def test_large_inputs_first_help_where_they_stand_last() -> None:
    exact, seen = weight(), moments()
    turned = Moments(seen.sums.flip(0, 1))  # the largest inputs are the last ones
    for group in (32, None):
        grid = Uniform(bits=3, group=group)
        found = [
            error(
                round_matrix(exact, Quantization(grid=grid, rounding=rounding), turned).weight, exact, turned
            )
            for rounding in (Gptq(), Gptq(by_activation=True))
        ]
        assert found[1] < 0.9 * found[0]


def test_inputs_that_never_came_neither_break_nor_disturb_gptq() -> None:
    exact, seen = weight(), moments()
    sums = seen.sums.clone()
    sums[5], sums[:, 5] = 0, 0
    found = round_matrix(exact, Quantization(grid=Uniform(bits=3), rounding=Gptq()), Moments(sums)).weight
    assert torch.isfinite(found).all() and (found[:, 5] == 0).all()


def test_moments_of_few_rows_can_be_inverted() -> None:
    rows = torch.randn(3, 64, generator=torch_generator(0, "few"))
    few = Moments(rows.T @ rows)
    assert torch.isfinite(few.factor).all()


def test_binary_levels_are_means_and_residual_ones_are_nearer() -> None:
    values = weight().T.contiguous()
    signed = fit_binary(values)
    torch.testing.assert_close(signed.magnitude, values.abs().mean(dim=0).half().float())
    once = (signed.nearest(values) - values).square().sum()
    twice = (fit(values, ResidualBinary()).nearest(values) - values).square().sum()
    assert twice < 0.5 * once


def test_a_dual_grid_has_four_evenly_spaced_levels_with_zero() -> None:
    first, second = fit_dual(weight().T.contiguous())
    assert torch.equal(first, -2 * second)
    levels = dual_levels(first, second)
    assert (levels == 0).any(dim=0).all()
    gaps = levels.diff(dim=0)
    torch.testing.assert_close(gaps, gaps[:1].expand_as(gaps))


def test_nf4_by_the_planner_is_the_codec_of_qlora() -> None:
    exact = weight(40, 128)
    rounded = round_matrix(exact, Quantization(grid=Nf4()))
    packed = nf4.encode(exact)
    assert torch.equal(rounded.weight, nf4.decode(packed))
    assert rounded.storage.bytes == packed.nbytes
    assert (nf4.levels() == 0).sum() == 1


def test_no_shifted_block_has_less_entropy_and_most_have_more() -> None:
    exact = weight(64, 128) + 0.03
    planner = Nf4Planner(Nf4(shift=True, points=10), exact.T.contiguous())
    blocks, counts = exact.reshape(-1, 64), torch.full((128,), 64)
    gain = entropy(blocks, counts, planner.shift) - entropy(blocks, counts, torch.zeros(128))
    assert (gain >= 0).all() and (gain > 0).float().mean() > 0.5
    assert (planner.shift == 0).any() or gain.min() > 0


def test_nominal_bits_are_the_papers_and_true_bits_count_maps_and_magnitudes() -> None:
    exact, seen = weight(70, 256), moments(256, 600)
    for name, nominal, least in (("pb-1.7", 1.7, 2.7), ("pb-2.0", 2.0, 3.0), ("billm-1.1", 1.1, 2.0)):
        storage = round_matrix(exact, setting(name).quantization, seen).storage
        assert storage.nominal == pytest.approx(nominal, abs=0.15 if name == "billm-1.1" else 1e-3)
        assert storage.bits > least
    plain = round_matrix(exact, Quantization(grid=Uniform(bits=4, group=128))).storage
    assert plain.bits == 4 + (16 + 4) / 128


def test_more_salient_weights_leave_less_error_and_a_share_of_all_is_int8() -> None:
    exact, seen = weight(32, 128), moments()
    found = [
        error(
            round_matrix(
                exact, Quantization(grid=Binary(), rounding=Gptq(), mix=SalientWeights(share=share)), seen
            ).weight,
            exact,
            seen,
        )
        for share in (0.0, 0.1, 0.3, 1.0)
    ]
    assert found == sorted(found, reverse=True)
    eight = Quantization(grid=Uniform(bits=8, group=None), rounding=Gptq())
    whole = error(round_matrix(exact, eight, seen).weight, exact, seen)
    assert found[-1] == pytest.approx(whole, rel=1e-3)


def test_salient_columns_beat_signs() -> None:
    exact, seen = weight(32, 128), moments()
    signs = error(round_matrix(exact, Quantization(grid=Binary())).weight, exact, seen)
    mixed = Quantization(grid=Binary(), rounding=Gptq(), mix=SalientColumns(block=64))
    assert error(round_matrix(exact, mixed, seen).weight, exact, seen) < 0.7 * signs


def test_bits_by_group_keep_their_mean_and_lower_the_error() -> None:
    seen = moments(256, 600)
    exact = weight(32, 256)
    exact[:, :32] *= 6
    even = Quantization(grid=Uniform(bits=3, group=32))
    mixed = Quantization(grid=Uniform(bits=3, group=32), mix=BitsByGroup(fit_salient=False))
    found = round_matrix(exact, mixed, seen)
    assert found.storage.nominal == 3
    assert error(found.weight, exact, seen) < error(round_matrix(exact, even).weight, exact, seen)


def test_the_salient_are_the_largest_or_those_the_hessian_names() -> None:
    values, seen = weight().T.contiguous(), moments()
    by_size = salient_mask(values, 0.1, "magnitude", None)
    assert by_size.sum() == round(0.1 * values.numel())
    assert values.abs()[by_size].min() >= values.abs()[~by_size].max()
    by_hessian = salient_mask(values, 0.1, "hessian", seen)
    scores = values.square() / torch.linalg.inv(seen.settled.double()).diagonal().float().square()[:, None]
    assert scores[by_hessian].min() >= 0.99 * scores[~by_hessian].max()


def test_rotated_weights_come_back_and_are_rounded_better_where_some_are_large() -> None:
    seen, generator = moments(), torch_generator(0, "turn")
    exact = weight()
    exact[2, 7] = 4.0
    grid = Uniform(bits=3, group=None, deviations=2.4)
    settings = Quantization(grid=grid, rounding=Ldlq(), transform=Rotate())
    turned = round_matrix(exact, settings, seen, generator).weight
    plain = round_matrix(exact, Quantization(grid=Uniform(bits=3, group=None)), seen).weight
    assert error(turned, exact, seen) < error(plain, exact, seen)


def test_every_setting_of_the_study_belongs_to_one_of_eleven_methods() -> None:
    assert len(METHODS) == 11 and {each.method for each in SETTINGS.values()} == set(METHODS)
    widths = {name for name in SETTINGS if name.startswith("gptq")}
    assert widths == {f"gptq-{end}" for end in ("8", "4", "3", "2", "4-g128", "3-g128", "2-g128")}


@pytest.mark.parametrize(
    "chosen",
    [
        {"grid": {"kind": "nf4"}, "mix": {"kind": "salient_weights"}},
        {"grid": {"kind": "uniform", "bits": 3}, "mix": {"kind": "salient_columns"}},
        {"grid": {"kind": "uniform", "bits": 8}, "mix": {"kind": "bits_by_group"}},
        {"grid": {"kind": "binary"}, "transform": {"kind": "awq"}},
        {"grid": {"kind": "binary"}, "mix": {"kind": "salient_weights"}, "transform": {"kind": "rotate"}},
        {"grid": {"kind": "uniform", "deviations": 2.4}, "transform": {"kind": "awq"}},
        {"grid": {"kind": "nf4", "shift": True}, "transform": {"kind": "rotate"}},
        {"grid": {"kind": "uniform", "step": 4}},
    ],
)
def test_combinations_without_a_sense_are_refused(chosen: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Quantization.model_validate(chosen)


def test_a_uniform_grid_finds_its_levels_again_even_from_bfloat16() -> None:
    exact = weight()
    for bits, symmetric in ((4, False), (8, True), (3, False)):
        rounded = round_matrix(exact, Quantization(grid=Uniform(bits=bits, group=32, symmetric=symmetric)))
        grid = rounded.grid
        assert isinstance(grid, UniformGrid) and grid.packed(128) is not None
        levels = grid.levels(rounded.weight)
        assert levels is not None and torch.equal(grid.decode(levels), rounded.weight)
        again = grid.levels(rounded.weight.bfloat16())
        assert again is not None and torch.equal(again, levels)
        assert grid.levels(exact) is None
        assert grid.levels(rounded.weight[:5]) is None


def test_a_dual_binary_matrix_is_two_bits_and_two_numbers_a_group() -> None:
    storage = round_matrix(weight(), Quantization(grid=DualBinary(group=64))).storage
    assert (storage.nominal, storage.bits) == (2, 2.5)
