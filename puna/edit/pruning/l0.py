"""The L0-Lagrangian allocator: gates learn which units stay, held to a size by multipliers.

Every unit has a hard concrete gate (:mod:`puna.edit.pruning.hard_concrete`): one vector for the hidden
dimensions, shared by the whole residual stream, one a layer for head groups and one for channels. The
expected number of weights left has a closed form in the gates, for a matrix has as many weights as its units'
sides multiply to, and gates are independent. Its share that is gone, s, is held to a target t by

    lambda1 (s - t) + lambda2 (s - t)^2,

which gates descend and the multipliers ascend; t rises on a straight line. Compresso (S62, 2310.05015),
after CoFi (2204.00408). Unlike the allocators of :mod:`puna.edit.pruning.allocate` this one asks no scorer:
shares of layers and choice of units are learnt together.

Simplified: no gates of whole layers; a head group is gated, not a query head. Biases and norms, which weigh
next to nothing, are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from puna.core.seeds import torch_generator
from puna.edit.pruning import hard_concrete
from puna.model.slicing import Masks
from puna.model.spec import LlamaSpec
from puna.model.units import WHOLE, Kept, Kind, layers_of, members, number_of

OPEN = 10.0
"""log alpha that hidden dimensions and head groups begin with: as good as always open."""
_SPREAD = 0.01
_IN_LAYER: tuple[Kind, ...] = ("head_group", "channel")


class Gates:
    """Gates of the units of ``kinds`` of a decoder; units of other kinds always stay.

    ``log_alpha`` are float32 [units] by kind and layer. Channels begin where
    sigmoid(log alpha) is 1 - ``drop_rate``.
    """

    def __init__(
        self,
        spec: LlamaSpec,
        kinds: Sequence[Kind],
        *,
        drop_rate: float = 0.01,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.spec = spec
        self.log_alpha: dict[tuple[Kind, int], Parameter] = {}
        for kind in kinds:
            mean = hard_concrete.log_alpha_of(1 - drop_rate) if kind == "channel" else OPEN
            for layer in layers_of(spec, kind):
                number = number_of(spec, kind, layer)
                if number:
                    drawn = torch.randn(number, generator=torch_generator(seed, "gates", kind, layer))
                    self.log_alpha[kind, layer] = Parameter((mean + _SPREAD * drawn).to(device))
        self._per_dimension = {
            (kind, layer): sum(
                member.span for member in members(spec, kind, layer) if member.name.endswith(".weight")
            )
            for kind in _IN_LAYER
            for layer in range(len(spec.blocks))
        }
        halves = [half for block in spec.blocks for half in (block.attention, block.feed_forward)]
        self._squares = halves.count("linear")  # halves of one matrix, both sides of it on the stream

    def named(self) -> dict[str, Parameter]:
        """The learnt tensors by name."""
        return {f"gates.{kind}.{layer}": value for (kind, layer), value in self.log_alpha.items()}

    def share_gone(self) -> Tensor:
        """Of the weights of the blocks' matrices the share that is expected to be gone; a scalar, float32."""
        hidden = self.log_alpha.get(("hidden", WHOLE))
        width = torch.ones(()) if hidden is None else hard_concrete.open_chance(hidden).mean()
        whole: float = self._squares * self.spec.hidden_size  # of one hidden dimension
        left = whole * width
        for (kind, layer), weights in self._per_dimension.items():
            number = number_of(self.spec, kind, layer)
            whole += weights * number
            gates = self.log_alpha.get((kind, layer))
            left = left + weights * (number if gates is None else hard_concrete.open_chance(gates).sum())
        return 1 - width * left / whole

    def drawn(self, generator: torch.Generator) -> Masks:
        """Masks of one draw of all gates; gradients reach the gates."""
        return self._masks(
            {place: hard_concrete.sample(gates, generator) for place, gates in self.log_alpha.items()}
        )

    def settled(self) -> Masks:
        """The masks when learning is over: exact zeros, and soft factors for all that stays."""
        return self._masks(
            {
                place: hard_concrete.settled(gates, least=self._least(*place))
                for place, gates in self._places()
            }
        )

    def all_open(self) -> Masks:
        """Masks of ones: the neutral setting."""
        return self._masks({place: torch.ones_like(gates) for place, gates in self._places()})

    def kept(self) -> Kept:
        """The units that the settled masks leave."""
        masks, everything = self.settled(), Kept.everything(self.spec)

        def open_(factors: Tensor | None, numbers: tuple[int, ...]) -> tuple[int, ...]:
            return numbers if factors is None else tuple(factors.nonzero()[:, 0].tolist())

        layers = range(len(self.spec.blocks))
        return Kept(
            tuple(open_(masks.head_groups.get(layer), everything.head_groups[layer]) for layer in layers),
            tuple(open_(masks.channels.get(layer), everything.channels[layer]) for layer in layers),
            open_(masks.hidden, everything.hidden),
            everything.blocks,
        )

    @torch.no_grad()
    def bound(self) -> None:
        """Keep log alpha where its gradient does not vanish."""
        for gates in self.log_alpha.values():
            gates.clamp_(-hard_concrete.LARGEST, hard_concrete.LARGEST)

    def _places(self) -> list[tuple[tuple[Kind, int], Tensor]]:
        return [(place, gates.detach()) for place, gates in self.log_alpha.items()]

    def _least(self, kind: Kind, layer: int) -> int:
        """Units that have to stay: of a half whose output has a bias one, and of the stream one."""
        biased = self.spec.attention_bias == "all" if kind == "head_group" else self.spec.mlp_bias
        return 1 if kind == "hidden" or biased else 0

    def _masks(self, factors: dict[tuple[Kind, int], Tensor]) -> Masks:
        by_kind: dict[Kind, dict[int, Tensor]] = {"head_group": {}, "channel": {}}
        for (kind, layer), factor in factors.items():
            by_kind.setdefault(kind, {})[layer] = factor
        hidden = by_kind.get("hidden", {}).get(WHOLE)
        return Masks(by_kind["head_group"], by_kind["channel"], hidden, gated=True)


class Lagrangian:
    """The two multipliers, which are to be ascended, without any decay.

    Both begin at 0, unless a ``quadratic`` one holds the gates to the target from the first step on.
    """

    def __init__(self, device: torch.device | str = "cpu", *, quadratic: float = 0.0) -> None:
        self.linear = Parameter(torch.zeros((), device=device))
        self.quadratic = Parameter(torch.full((), quadratic, device=device))

    def named(self) -> dict[str, Parameter]:
        """The multipliers by name."""
        return {"multipliers.linear": self.linear, "multipliers.quadratic": self.quadratic}

    def penalty(self, gap: Tensor) -> Tensor:
        """What missing the target by ``gap`` costs."""
        return self.linear * gap + self.quadratic * gap.square()


def target_at(step: int, steps: int, target: float, ramp: float) -> float:
    """The share aimed at in ``step``, from 0, of ``steps``: all of it behind a share ``ramp`` of them."""
    rising = ramp * steps
    return target * min(1.0, (step + 1) / rising) if rising else target


def density_error(gates: Gates, seed: int, *, draws: int = 1_000_000) -> float:
    """How far the share of nonzero factors among draws is from the closed form, at most over the kinds.

    Relative to the closed form, 1 - cdf(0), averaged over the gates of a kind, which together are drawn about
    ``draws`` times.
    """
    generator = torch_generator(seed, "density")
    errors = []
    for kind in dict.fromkeys(kind for kind, _ in gates.log_alpha):
        own = torch.cat([value.detach().cpu() for (k, _), value in gates.log_alpha.items() if k == kind])
        times = math.ceil(draws / len(own))
        nonzero = sum(float((hard_concrete.sample(own, generator) > 0).sum()) for _ in range(times))
        expected = float(hard_concrete.open_chance(own.double()).sum())
        errors.append(abs(nonzero / times - expected) / expected)
    return max(errors)
