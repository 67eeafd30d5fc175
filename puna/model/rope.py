"""Rotary positions: the frequencies of each :class:`RopeRule`, and the rotation of queries and keys.

The formulas follow the papers (RoPE 2104.09864, NTK-aware and dynamic scaling, YaRN 2309.00071,
LongRoPE 2402.13753) and the Llama 3.1 report as transformers reads them; order of operations and
float32 are kept, since at far positions the last bit of a frequency is visible.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from puna.model.spec import RopeRule

Rotation = tuple[Tensor, Tensor]  # cosines and sines, [batch or 1, time, 1, head_dim / 2] each


def depends_on_length(rule: RopeRule) -> bool:
    """Whether the frequencies depend on how long the input is."""
    return rule.kind in ("dynamic", "longrope")


def frequencies(
    rule: RopeRule, head_dim: int, length: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, float]:
    """Angle per position of each pair of head dimensions, and a factor on cosines and sines.

    The angles are [head_dim / 2] in float32. ``length`` is the largest position plus one; only
    rules that depend on the length look at it.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    if rule.kind == "dynamic":
        return 1.0 / (_dynamic_base(rule, head_dim, length, device) ** exponents), 1.0
    if rule.kind == "longrope":
        return _longrope(rule, exponents, length)
    plain = 1.0 / (rule.theta**exponents)
    if rule.kind == "linear":
        assert rule.factor is not None
        return plain / rule.factor, 1.0
    if rule.kind == "yarn":
        return _yarn(rule, head_dim, exponents)
    if rule.kind == "llama3":
        return _llama3(rule, plain), 1.0
    return plain, 1.0


def _dynamic_base(rule: RopeRule, head_dim: int, length: int, device: torch.device | str) -> Tensor | float:
    """NTK-aware base that grows with the input once it is longer than the pre-training length."""
    assert rule.factor is not None and rule.original_max_positions is not None
    if length <= rule.original_max_positions:
        return rule.theta
    # As float32 tensor arithmetic, since transformers reads the length off the positions tensor.
    reach = torch.tensor(length, dtype=torch.int64, device=device)
    stretch = (rule.factor * reach / rule.original_max_positions) - (rule.factor - 1)
    return rule.theta * stretch ** (head_dim / (head_dim - 2))


def _longrope(rule: RopeRule, exponents: Tensor, length: int) -> tuple[Tensor, float]:
    """One of two sets of divisors, by whether the input is longer than the pre-training length."""
    assert rule.factor is not None and rule.original_max_positions is not None
    divisors = rule.long_factor if length > rule.original_max_positions else rule.short_factor
    factor = rule.attention_factor
    if factor is None:
        stretched = rule.factor > 1.0
        factor = (
            math.sqrt(1 + math.log(rule.factor) / math.log(rule.original_max_positions)) if stretched else 1.0
        )
    scale = torch.tensor(divisors, dtype=torch.float32, device=exponents.device)
    return 1.0 / (scale * rule.theta**exponents), factor


def _yarn(rule: RopeRule, head_dim: int, exponents: Tensor) -> tuple[Tensor, float]:
    """Fast pairs keep their frequency, slow ones are divided by the factor, a ramp lies between."""
    assert rule.factor is not None and rule.original_max_positions is not None
    original = rule.original_max_positions

    def pair_turning(turns: float) -> float:
        """The (fractional) pair of dimensions that makes ``turns`` turns within the original length."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rule.theta))

    low, high = pair_turning(rule.beta_fast or 32), pair_turning(rule.beta_slow or 1)
    if rule.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device=exponents.device)
    kept = 1 - torch.clamp((pairs - low) / (high - low), 0, 1)
    periods = rule.theta**exponents
    blended = 1.0 / (rule.factor * periods) * (1 - kept) + 1.0 / periods * kept
    return blended, _yarn_attention_factor(rule)


def _yarn_attention_factor(rule: RopeRule) -> float:
    assert rule.factor is not None
    if rule.attention_factor is not None:
        return rule.attention_factor

    def temperature(weight: float) -> float:
        assert rule.factor is not None
        return 0.1 * weight * math.log(rule.factor) + 1.0 if rule.factor > 1 else 1.0

    if rule.mscale and rule.mscale_all_dim:
        return temperature(rule.mscale) / temperature(rule.mscale_all_dim)
    return temperature(1)


def _llama3(rule: RopeRule, plain: Tensor) -> Tensor:
    """Llama 3.1: long waves are divided by the factor, short ones kept, a smooth passage between."""
    assert rule.factor is not None and rule.original_max_positions is not None
    assert rule.low_freq_factor is not None and rule.high_freq_factor is not None
    waves = 2 * math.pi / plain
    longest = rule.original_max_positions / rule.low_freq_factor
    shortest = rule.original_max_positions / rule.high_freq_factor
    spread = rule.high_freq_factor - rule.low_freq_factor
    share = (rule.original_max_positions / waves - rule.low_freq_factor) / spread
    passage = (1 - share) * plain / rule.factor + share * plain
    result = torch.where(waves > longest, plain / rule.factor, plain)
    return torch.where((waves >= shortest) & (waves <= longest), passage, result)


def rotation(rule: RopeRule, head_dim: int, positions: Tensor, length: int, dtype: torch.dtype) -> Rotation:
    """Cosines and sines for ``positions`` [batch or 1, time], computed in float32 and cast to ``dtype``."""
    per_position, factor = frequencies(rule, head_dim, length, positions.device)
    angles = positions[..., None, None].float() * per_position  # [batch, time, 1, head_dim / 2]
    cosines, sines = angles.cos(), angles.sin()
    if factor != 1.0:
        cosines, sines = cosines * factor, sines * factor
    return cosines.to(dtype), sines.to(dtype)


def rotate(heads: Tensor, turn: Rotation) -> Tensor:
    """Rotate queries or keys [batch, time, heads, head_dim]; dimension i is paired with i + head_dim / 2."""
    cosines, sines = turn
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
