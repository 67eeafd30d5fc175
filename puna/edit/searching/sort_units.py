"""Channels of every feed-forward put in the order of their importance: a narrow child takes the first ones.

System S29: a super-network's narrow feed-forwards are the first channels of the wide ones. As channels lie in
no order in a trained model, they are sorted before the super-network is tuned, the most important first. The
decoder computes what it did, but for the order in which numbers are added up.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.model.llama import Llama
from puna.model.units import Kind, members, number_of


@torch.no_grad()
def sort_channels(model: Llama, scores: Mapping[tuple[Kind, int], Tensor]) -> None:
    """Put the channels of each layer of ``model`` in the order of falling ``scores``.

    ``scores`` holds [width] numbers by kind and layer, as :func:`puna.edit.pruning.scores.score_units` gives
    them. A grid that quantisation put the weights on is forgotten: its groups of channels are no more.
    """
    if model.adapter is not None:
        raise PunaError("channels cannot be sorted under an adapter", fix="merge the adapter first")
    weights = dict(model.named_parameters())
    for layer in range(len(model.spec.blocks)):
        if not number_of(model.spec, "channel", layer):
            continue
        order = scores["channel", layer].argsort(descending=True, stable=True).to(model.device)
        for member in members(model.spec, "channel", layer):
            weight = weights[member.name]
            weight.copy_(weight.index_select(member.dimension, order))
    model.grids = {}


def held_by_first_half(scores: Mapping[tuple[Kind, int], Tensor]) -> float:
    """Share of the importance that the first half of the channels holds in the order they are in, by layer,
    averaged: 0.5 where they lie in no order.
    """
    channels = [each.double() for (kind, _), each in scores.items() if kind == "channel"]
    shares = [float(each[: len(each) // 2].sum() / each.sum()) for each in channels if each.sum() > 0]
    return sum(shares) / len(shares) if shares else 0.0
