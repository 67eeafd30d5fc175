"""muP: how weights begin and how fast they learn, so that a rate found on a narrow model fits a wide one.

Systems S46 (Crystal, arXiv:2411.04156); Yang et al. 2022 (arXiv:2203.03466), tables 3 and 8 for Adam, with
the multipliers of Cerebras-GPT. In their form a decoder has multipliers: of the embedding, of the logits,
1/d in place of 1/sqrt(d) on query-key products. None is needed. Adam does not see a constant factor on a
gradient, so a matrix W behind a multiplier c learns as the matrix cW without one that begins c times as
large and learns c times as fast, with 1/c of the decay. So the decoder stays a plain Llama, also on disk:

* embedding: begins and learns times ``embedding_multiplier``;
* hidden matrices learn at base_width / width of the rate, and begin at deviation * sqrt(base_width / width);
  those that write into the residual stream (o_proj, down_proj) by another sqrt(2 layers) smaller;
* q_proj: times sqrt(1/head_dim), which makes query-key products over sqrt(head_dim) those over head_dim;
* logits: times output_multiplier * base_width / width: in the head, or where it is tied, and W is the
  embedding's, in the gain of the final norm, together with one over the embedding's multiplier.

What is not the same: AdamW's epsilon, and the norm that gradients are clipped to, see the scaled gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pydantic

from puna.core.errors import PunaError
from puna.core.stage import Parameters
from puna.model.spec import INITIAL_DEVIATION, LlamaSpec

if TYPE_CHECKING:
    from puna.model.llama import Llama

_WRITES = ("o_proj", "down_proj")
_FINAL_NORM = "model.norm.weight"


class Mup(Parameters):
    """muP's constants; those of the paper are the defaults, but for the width they were found at."""

    base_width: pydantic.PositiveInt = 256
    """Hidden size at which the learning rate is what is said."""
    deviation: pydantic.PositiveFloat = 0.073
    """Standard deviation of the weights at the base width."""
    embedding_multiplier: pydantic.PositiveFloat = 14.6
    """Of the embedding's rows."""
    output_multiplier: pydantic.PositiveFloat = 2.22
    """Of the logits, at the base width."""
    attention: Literal["inverse", "inverse_root"] = "inverse"
    """Query-key products over head_dim, or over its square root, as a Llama's are."""
    depth_scaled: bool = True
    """Whether matrices that write into the residual stream begin smaller by sqrt(2 layers)."""


@dataclass(frozen=True)
class Part:
    """What muP says of a parameter, all relative: ``start`` to its usual draw (of a norm: its gain), ``rate``
    to the learning rate, ``decay`` to the weight decay, which AdamW multiplies by the parameter's rate."""

    start: float = 1.0
    rate: float = 1.0
    decay: float = 1.0


def parts(spec: LlamaSpec, mup: Mup) -> dict[str, Part]:
    """What muP says of every parameter of a decoder that is not as usual."""
    narrower = mup.base_width / spec.hidden_size
    plain = mup.deviation / INITIAL_DEVIATION
    embedding, output = mup.embedding_multiplier, mup.output_multiplier * narrower
    found = {"model.embed_tokens.weight": Part(plain * embedding, embedding, 1 / embedding)}
    if spec.tied:
        found[_FINAL_NORM] = Part(output / embedding, output / embedding)
    else:
        found["lm_head.weight"] = Part(plain * output, output, 1 / output)
    hidden = Part(plain * math.sqrt(narrower), narrower)
    writing = hidden
    if mup.depth_scaled:
        writing = Part(hidden.start / math.sqrt(2 * len(spec.blocks)), narrower)
    for layer, projection, head_dim in _matrices(spec):
        part = writing if projection.endswith(_WRITES) else hidden
        if projection.endswith("q_proj") and mup.attention == "inverse":
            turned = head_dim**-0.5
            part = Part(part.start * turned, part.rate * turned, 1 / turned)
        found[f"model.layers.{layer}.{projection}.weight"] = part
    return {name: part for name, part in found.items() if part != Part()}


def _matrices(spec: LlamaSpec) -> Iterator[tuple[int, str, int]]:
    """Layer, name and size of a head for every matrix of the layers."""
    for layer, block in enumerate(spec.blocks):
        if not block.plain:
            raise PunaError(
                "muP is told for a Llama's plain layers alone",
                where=f"layer {layer}",
                found=f"{block.attention}, {block.feed_forward}",
            )
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield layer, f"self_attn.{name}", block.head_dim
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield layer, f"mlp.{name}", block.head_dim


def begin(model: Llama, mup: Mup) -> None:
    """Scale the weights of a new model, in place, to what they are at muP's start.

    With constants that change nothing no bit moves. A model that has been trained is refused: its norms
    are no longer ones.
    """
    import torch

    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and not name.endswith(".bias") and not bool((parameter == 1).all()):
            raise PunaError(
                "muP is how a new model begins, and this one has been trained",
                where=name,
                expected="norms of ones, as the stage initialise leaves them",
            )
    with torch.no_grad():
        for name, part in parts(model.spec, mup).items():
            if part.start != 1:
                model.get_parameter(name).mul_(part.start)
