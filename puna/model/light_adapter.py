"""LLaMA-Adapter: prompts that attention may look at, and a scale and a bias for every matrix.

Systems: LLaMA-Adapter (2303.16199) and the text part of LLaMA-Adapter V2 (S09, 2304.15010). A layer with a
prompt P of a few vectors adds to what each query head h has gathered tanh(g_h) softmax(q K_P^T) V_P, with K_P
and V_P by the layer's own matrices, without rotation, in a softmax of its own; g_h is 0 at first, so that
nothing changes by a bit. A key-value head of the prompt serves its whole group of query heads. V2 adds y =
s * (W x + b) for every matrix, s = 1 and b = 0 at first, and trains the norms.

Scale, bias and norms go into weights (:func:`fold`): a Llama with biases, which transformers knows. Prompts
cannot: they stay, and are written in a form of puna's own. peft has an adaption prompt too, with one gate for
all heads and no tanh, which is another method.

What is trained is float32 whatever the model computes in: near 1 a bfloat16 scale has steps of 0.4%.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from puna.core.errors import PunaError, unknown_name
from puna.core.seeds import torch_generator
from puna.model.nf4 import replace_layer

if TYPE_CHECKING:
    from puna.model.llama import Attention, Llama

Kind = Literal["llama_adapter", "llama_adapter_v2"]
KINDS: tuple[Kind, ...] = ("llama_adapter", "llama_adapter_v2")


@dataclass(frozen=True)
class LightSettings:
    """``kind``, and a prompt of ``prompt_length`` vectors in the last ``prompt_layers`` layers.

    None are all layers but the first; a length of 0 leaves prompts out.
    """

    kind: Kind = "llama_adapter_v2"
    prompt_length: int = 10
    prompt_layers: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("kind of adapter", self.kind, KINDS)
        if self.prompt_length < 0 or (self.prompt_layers is not None and self.prompt_layers < 1):
            raise PunaError(
                "a prompt has a length, and layers that look at it",
                found=f"prompt_length {self.prompt_length}, prompt_layers {self.prompt_layers}",
            )
        if not self.prompt_length and self.kind == "llama_adapter":
            raise PunaError("an adapter of prompts alone needs one", where="prompt_length", found=0)

    def layers(self, count: int) -> range:
        """The layers with a prompt, of so many."""
        if not self.prompt_length:
            return range(0)
        wanted = max(1, count - 1) if self.prompt_layers is None else self.prompt_layers
        if wanted > count:
            raise PunaError(
                "more layers with a prompt than there are",
                where="prompt_layers",
                found=wanted,
                expected=count,
            )
        return range(count - wanted, count)


@dataclass
class LightState:
    """What a decoder remembers of such an adapter; held in ``Llama.adapter``."""

    settings: LightSettings
    scaled: bool
    """Whether its matrices have scales and biases that are not folded yet."""


class AttentionPrompt(nn.Module):
    """``embedding`` [length, hidden] that attention looks at through ``gate`` [heads], 0 at first."""

    def __init__(self, length: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(length, hidden))
        self.gate = nn.Parameter(torch.zeros(heads))

    def forward(self, attention: Attention, queries: Tensor, mixed: Tensor) -> Tensor:
        """``mixed``, what heads have gathered from tokens, and what they gather from the prompt.

        ``queries``, rotated, and ``mixed`` are [batch, time, heads, head_dim].
        """
        block = attention.block
        prompt = self.embedding.to(queries.dtype)
        shape = (len(prompt), block.kv_heads, block.head_dim)
        keys, values = attention.k_proj(prompt).view(shape), attention.v_proj(prompt).view(shape)
        batch, time, heads, size = queries.shape
        # Heads of a group follow one another.
        grouped = queries.reshape(batch, time, block.kv_heads, heads // block.kv_heads, size)
        scores = torch.einsum("btkgd,lkd->btkgl", grouped, keys).float() * block.scale
        weights = scores.softmax(dim=-1).to(values.dtype)
        seen = torch.einsum("btkgl,lkd->btkgd", weights, values).flatten(2, 3)
        gated = seen.float() * torch.tanh(self.gate.float())[:, None]
        return mixed + gated.to(mixed.dtype)


class ScaledLinear(nn.Module):
    """scale * (W x + shift), both [outputs] float32, over a linear layer that stays as it is."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        device = linear.weight.device
        self.scale = nn.Parameter(torch.ones(linear.out_features, device=device))
        self.shift = nn.Parameter(torch.zeros(linear.out_features, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        product: Tensor = self.base_layer(hidden)
        moved = (product.float() + self.shift.float()) * self.scale.float()
        return moved.to(product.dtype)

    def folded(self) -> nn.Linear:
        """A plain layer that computes the same but for the rounding of its weights, in their type."""
        base = self.base_layer
        bias = self.shift.detach() if base.bias is None else base.bias.detach().float() + self.shift.detach()
        scale = self.scale.detach().float()
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=True)
        dtype = base.weight.dtype
        linear.weight = nn.Parameter((base.weight.detach().float() * scale[:, None]).to(dtype))
        linear.bias = nn.Parameter((bias.float() * scale).to(dtype))
        return linear.train(self.training)


def add_light(model: Llama, settings: LightSettings, *, seed: int) -> LightState:
    """Add the adapter in place and freeze everything else; logits do not change by a bit.

    Prompts are drawn from N(0, 1) by a generator for each layer and ``seed``.
    """
    if model.adapter is not None:
        raise PunaError("the model carries an adapter already", where=model.source, fix="merge it first")
    layers = settings.layers(len(model.spec.blocks))
    scaled = settings.kind == "llama_adapter_v2"
    linears = [(name, module) for name, module in model.named_modules() if name.endswith("_proj")]
    odd = next((name for name, module in linears if type(module) is not nn.Linear), None)
    if odd is not None:
        raise PunaError("such an adapter goes on plain matrices", where=model.source, found=odd)
    if any("linear" in (block.attention, block.feed_forward) for block in model.spec.blocks):
        raise PunaError(
            "such an adapter goes on layers of a Llama", where=model.source, found="a linear half"
        )
    model.spec.refuse_twins("a LLaMA-Adapter")
    model.requires_grad_(False)
    for layer in layers:
        put_prompt(model, layer, settings.prompt_length, torch_generator(seed, "prompt", layer))
    for name, module in linears if scaled else ():
        replace_layer(model, name, ScaledLinear(cast(nn.Linear, module)).train(model.training))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_light(name) or (scaled and name.endswith("norm.weight")))
    state = LightState(settings, scaled)
    model.adapter = state
    return state


def is_light(name: str) -> bool:
    """Whether a parameter is one that :func:`add_light` brought."""
    return name.endswith((".prompt.embedding", ".prompt.gate", "_proj.scale", "_proj.shift"))


def put_prompt(model: Llama, layer: int, length: int, generator: torch.Generator | None) -> None:
    """Give a layer a prompt, drawn by ``generator`` or of zeros, with gates of zero."""
    block: Any = model.model.layers[layer]
    if block.block.attention != "full":
        raise PunaError("a layer without attention looks at no prompt", where=f"layer {layer}")
    prompt = AttentionPrompt(length, model.spec.hidden_size, block.block.heads)
    if generator is not None:
        nn.init.normal_(prompt.embedding, generator=generator)
    block.self_attn.prompt = prompt.to(model.device).train(model.training)


def prompted_layers(model: Llama) -> Iterator[tuple[int, AttentionPrompt]]:
    """The layers with a prompt."""
    for layer, block in enumerate(cast(Any, model.model.layers)):
        if block.block.attention == "full" and block.self_attn.prompt is not None:
            yield layer, block.self_attn.prompt


@torch.no_grad()
def fold(model: Llama) -> None:
    """Put scales and biases into the weights, in place: all matrices have biases then, as the spec says.

    Prompts stay. Logits stay within the rounding of the weights: 1e-5 in float32.
    """
    state = model.adapter
    assert isinstance(state, LightState)
    if state.scaled:
        for name, module in list(model.named_modules()):
            if isinstance(module, ScaledLinear):
                replace_layer(model, name, module.folded())
        model.spec = model.spec.replace(attention_bias="all", mlp_bias=True)
        state.scaled = False
    model.adapter = state if any(True for _ in prompted_layers(model)) else None
    model.requires_grad_(model.adapter is None)


@contextlib.contextmanager
def take_prompts(model: Llama) -> Iterator[None]:
    """A block in which the model is without its prompts: its weights alone."""
    state, taken = model.adapter, dict(prompted_layers(model))
    blocks = cast(Any, model.model.layers)
    try:
        for layer in taken:
            blocks[layer].self_attn.prompt = None
        model.adapter = None
        yield
    finally:
        for layer, prompt in taken.items():
            blocks[layer].self_attn.prompt = prompt
        model.adapter = state


def refuse_prompts(model: Llama, purpose: str) -> None:
    """Prompts are no weights: an error for what can keep weights alone."""
    found = [layer for layer, _ in prompted_layers(model)]
    if found:
        raise PunaError(
            f"attention prompts cannot be {purpose}",
            where=model.source,
            found=f"prompts in {len(found)} layers",
            fix="use the adapter's folder as the model, or train one with prompt_length 0",
        )
