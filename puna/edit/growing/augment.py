"""Give a decoder series activations and shortcuts around attention, and leave every logit as it is.

System S82, PanGu-pi (2312.17276), retrofitted: the first term of a series is the plain SiLU and the second
has scale and shift 0, so that it adds silu(0) = 0; a shortcut's first matrix is drawn and its second is 0,
so that it adds 0. Both get gradients nevertheless: the second scale because silu has slope 1/2 at 0, the
second matrix because what enters it is not 0. A drawn one would throw a trained model off.

More than two terms cannot be retrofitted: the later ones would all begin at 0, get equal gradients and stay
equal for good.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import nn

from puna.core.errors import PunaError
from puna.model.llama import Llama
from puna.model.spec import INITIAL_DEVIATION, BlockSpec, LlamaSpec

PAPERS_RATIO = 32  # hidden size over the bottleneck's width


def augmented_spec(spec: LlamaSpec, series: int, shortcut: int) -> LlamaSpec:
    """The spec with a series of so many terms and a bottleneck of such a width wherever there is a place."""
    if not 0 <= series <= 2:
        raise PunaError(
            "a trained model can be given a series of one or two terms: further ones would stay equal",
            where="series",
            found=series,
            expected="0, 1 or 2; more in a new model (the stage initialise)",
        )
    spec.refuse_twins("augmenting a model")
    augmented = spec.replace(
        blocks=tuple(_augmented(block, layer, series, shortcut) for layer, block in enumerate(spec.blocks))
    )
    if augmented == spec:
        raise PunaError(
            "nothing is added to the model",
            where="series, shortcut",
            found=f"series {series}, shortcut {shortcut}",
            expected="a number above 0, and layers with attention or a gated feed-forward",
        )
    return augmented


def _augmented(block: BlockSpec, layer: int, series: int, shortcut: int) -> BlockSpec:
    for name, wanted, there in (
        ("series", series, block.series),
        ("shortcut", shortcut, block.shortcut),
    ):
        if wanted and there:
            raise PunaError(f"the layer has its {name} already", where=f"layer {layer}", found=there)
    return dataclasses.replace(
        block, series=block.series or series, shortcut=block.shortcut or shortcut
    )  # a half that has no place for it clears it


@torch.no_grad()
def augment(model: Llama, *, series: int, shortcut: int, generator: torch.Generator) -> Llama:
    """``model`` with more nonlinearity and the same logits, to the bit; the weights that it had are shared.

    ``series`` is 0, 1 or 2 terms, ``shortcut`` the width of the bottleneck (0: none). The squeezing matrices
    are drawn from N(0, 0.02) by ``generator``.
    """
    if model.adapter is not None:
        raise PunaError("a model is not augmented under an adapter", fix="merge the adapter first")
    spec = augmented_spec(model.spec, series, shortcut)
    richer = Llama(spec, dtype=model.dtype, device="meta")
    theirs = model.state_dict()
    own = {name: tensor for name, tensor in richer.state_dict().items() if name not in theirs}
    for name, tensor in own.items():
        made = torch.zeros(tensor.shape)
        if name.endswith("squeeze_proj.weight"):
            made.normal_(0, INITIAL_DEVIATION, generator=generator)
        elif name.endswith("act_fn.weight"):
            made.view(-1, series)[:, 0] = 1.0
        own[name] = made.to(model.dtype).to(model.device)
    richer.load_state_dict(theirs | own, strict=True, assign=True)
    for parameter in cast(nn.Module, richer).parameters():
        parameter.requires_grad_(True)
    richer.tokenizer, richer.template, richer.source = model.tokenizer, model.template, model.source
    return richer.train(model.training)
