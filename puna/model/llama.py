"""The decoder: Llama from a list of layer specs, with transformers' parameter names.

Seams, from the inside out: rope (``rope.py``), attention for training, prefill and decoding
(``attention.py``), the cache (``cache.py``), feed-forward, block, embedding, head. ``hidden`` and
``logits`` are separate, so that a loss or a sampler can stand between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.model.attention import lay_out
from puna.model.cache import KeyValueCache
from puna.model.nonlinearity import SeriesActivation, shortcut
from puna.model.rope import Rotation, depends_on_length, rotate, rotation
from puna.model.spec import INITIAL_DEVIATION, BlockSpec, LlamaSpec, RopeRule
from puna.model.uniform_grid import UniformGrid

if TYPE_CHECKING:
    from puna.model.labels import LabelKind

_Rotations = dict[tuple[RopeRule, int], Rotation]


class Attending(Protocol):
    """What attention asks of a layout; see :class:`puna.model.attention.Layout`."""

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, block: BlockSpec) -> Tensor:
        """Attention among the tokens of this pass alone."""
        ...

    def attend_stored(self, queries: Tensor, keys: Tensor, values: Tensor, block: BlockSpec) -> Tensor:
        """Attention on all that is stored for the layer."""
        ...


class Storing(Protocol):
    """What attention asks of a cache; see :class:`puna.model.cache.KeyValueCache`."""

    @property
    def length(self) -> int:
        """Tokens stored by earlier passes."""
        ...

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's keys and values; returns all that is stored for it."""
        ...


class _RootMeanSquare(torch.autograd.Function):
    """The norm keeps its input alone for the backward pass: no float32 copies of the hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = hidden.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(hidden, weight, inverse)
        return weight * (wide * inverse).to(hidden.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, inverse = ctx.saved_tensors
        normed = hidden * inverse  # float32
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = (gradient * normed.to(gradient.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
        scaled = (gradient * weight).float()
        to_hidden = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * inverse
        return to_hidden.to(hidden.dtype), to_weight, None


class _Lookup(torch.autograd.Function):
    """Rows of the embedding, whose gradients go straight to ``weight.gradient_sink``.

    A dense gradient would be a matrix of zeros with a few rows filled in, made and added up in every
    backward pass: with a large vocabulary that takes as long as several layers.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.sink = weight.gradient_sink  # type: ignore[attr-defined]
        return functional.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        (ids,) = ctx.saved_tensors
        rows = gradient.flatten(0, -2).to(ctx.sink.dtype)
        ctx.sink.index_add_(0, ids.flatten(), rows)
        return None, None


class Norm(nn.Module):
    """Root-mean-square norm: computed in float32, scaled in the input's own type."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., size] to the same shape."""
        normed: Tensor = _RootMeanSquare.apply(hidden, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return normed


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, spec: LlamaSpec, layer: int) -> None:
        super().__init__()
        self.block, self.layer = spec.blocks[layer], layer
        queries, keys = self.block.heads * self.block.head_dim, self.block.kv_heads * self.block.head_dim
        biased = spec.attention_bias != "none"
        self.q_proj = nn.Linear(spec.hidden_size, queries, bias=biased)
        self.k_proj = nn.Linear(spec.hidden_size, keys, bias=biased)
        self.v_proj = nn.Linear(spec.hidden_size, keys, bias=biased)
        self.o_proj = nn.Linear(queries, spec.hidden_size, bias=spec.attention_bias == "all")
        if self.block.shortcut:
            self.squeeze_proj = nn.Linear(spec.hidden_size, self.block.shortcut, bias=False)
            self.expand_proj = nn.Linear(self.block.shortcut, spec.hidden_size, bias=False)
        self.prompt: nn.Module | None = None  # what an adapter may let attention look at besides

    def forward(
        self, hidden: Tensor, rotations: _Rotations, layout: Attending, cache: Storing | None
    ) -> Tensor:
        """[batch, time, hidden] to the same; appends to the cache if there is one."""
        block = self.block
        heads = (*hidden.shape[:2], -1, block.head_dim)
        turn = rotations[block.rope, block.head_dim]
        queries = rotate(self.q_proj(hidden).view(heads), turn)  # [batch, time, heads, head_dim]
        keys = rotate(self.k_proj(hidden).view(heads), turn)  # [batch, time, kv_heads, head_dim]
        values = self.v_proj(hidden).view(heads)
        if cache is None:
            mixed = layout.attend(queries, keys, values, block)
        else:
            stored_keys, stored_values = cache.append(self.layer, keys, values)
            if cache.length:
                mixed = layout.attend_stored(queries, stored_keys, stored_values, block)
            else:
                mixed = layout.attend(queries, keys, values, block)
        if self.prompt is not None:
            mixed = self.prompt(self, queries, mixed)
        attended = cast(Tensor, self.o_proj(mixed.flatten(2)))
        if block.shortcut:
            attended = attended + shortcut(hidden, self.squeeze_proj, self.expand_proj)
        return attended


class _GatedUnit(torch.autograd.Function):
    """silu(gate) * up, which keeps its two inputs for the backward pass and not the silu between them."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        to_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return to_gate, functional.silu(gate).mul_(gradient)


class _GatedProjection(torch.autograd.Function):
    """silu(gate) * up times a matrix; their product is not kept for the matrix's gradient, but made again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return functional.linear(functional.silu(gate).mul_(up), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        silu = functional.silu(gate)
        outer = gradient.reshape(-1, gradient.shape[-1])  # [rows, outputs]
        to_weight = to_bias = None
        if ctx.needs_input_grad[2]:
            to_weight = outer.T @ (silu * up).view(-1, weight.shape[1])
        if ctx.needs_input_grad[3]:
            to_bias = outer.sum(0)
        to_hidden = (outer @ weight).view(gate.shape)
        to_up = silu.mul_(to_hidden)
        to_gate = torch.ops.aten.silu_backward(to_hidden.mul_(up), gate)
        return to_gate, to_up, to_weight, to_bias


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), or a series of so many terms in place of the silu."""

    def __init__(self, hidden_size: int, width: int, bias: bool, series: int = 0) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=bias)
        self.up_proj = nn.Linear(hidden_size, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden_size, bias=bias)
        self.act_fn = SeriesActivation(width, series) if series else None

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, time, hidden] to the same."""
        gate, up = self.gate_proj(hidden), self.up_proj(hidden)
        down: Any = self.down_proj  # or what an adapter put in its place
        if self.act_fn is not None:
            return cast(Tensor, down(self.act_fn(gate, up)))
        projected: Tensor | None = None
        if not (down._forward_hooks or down._forward_pre_hooks):  # a hook wants to see what enters
            if isinstance(down, nn.Linear):
                projected = _GatedProjection.apply(gate, up, down.weight, down.bias)  # type: ignore[no-untyped-call]
            elif hasattr(down, "gated"):
                projected = down.gated(gate, up)
        if projected is None:
            projected = down(_GatedUnit.apply(gate, up))  # type: ignore[no-untyped-call]
        return cast(Tensor, projected)


class LinearAttention(nn.Module):
    """One matrix where attention was: each token by itself (Puzzle, 2411.19146)."""

    def __init__(self, hidden_size: int, bias: bool) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(
        self, hidden: Tensor, _rotations: _Rotations, _layout: Attending, _cache: Storing | None
    ) -> Tensor:
        """[batch, time, hidden] to the same; nothing is stored."""
        return cast(Tensor, self.linear_attn(hidden))


class LinearFeedForward(nn.Module):
    """One matrix where the feed-forward was (Puzzle, 2411.19146)."""

    def __init__(self, hidden_size: int, bias: bool) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to the same."""
        return cast(Tensor, self.linear_mlp(hidden))


class Block(nn.Module):
    """One layer: attention and feed-forward, each with its norm and residual; a "none" half is not there."""

    self_attn: Any  # Attention or LinearAttention, as the spec says
    mlp: Any  # FeedForward or LinearFeedForward

    def __init__(self, spec: LlamaSpec, layer: int) -> None:
        super().__init__()
        self.block: BlockSpec = spec.blocks[layer]
        if self.block.attention != "none":
            self.input_layernorm = Norm(spec.hidden_size, spec.norm_eps)
            full = self.block.attention == "full"
            biased = spec.attention_bias != "none"
            self.self_attn = Attention(spec, layer) if full else LinearAttention(spec.hidden_size, biased)
        if self.block.feed_forward != "none":
            self.post_attention_layernorm = Norm(spec.hidden_size, spec.norm_eps)
            gated = self.block.feed_forward == "swiglu"
            self.mlp = (
                FeedForward(spec.hidden_size, self.block.width, spec.mlp_bias, self.block.series)
                if gated
                else LinearFeedForward(spec.hidden_size, spec.mlp_bias)
            )

    def forward(
        self, hidden: Tensor, rotations: _Rotations, layout: Attending, cache: Storing | None
    ) -> Tensor:
        """[batch, time, hidden] to the same."""
        return self.feed(self.attend(hidden, rotations, layout, cache))

    def tell(self, block: BlockSpec) -> None:
        """Change what the layer is told, such as its mask; not a shape."""
        self.block = block
        if block.attention == "full":
            self.self_attn.block = block

    def attend(
        self, hidden: Tensor, rotations: _Rotations, layout: Attending, cache: Storing | None
    ) -> Tensor:
        """The attention half, [batch, time, hidden] to the same."""
        if self.block.attention != "none":
            hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotations, layout, cache)
        return hidden

    def feed(self, hidden: Tensor) -> Tensor:
        """The feed-forward half, [..., hidden] to the same."""
        if self.block.feed_forward != "none":
            hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return hidden


def _layer(spec: LlamaSpec, layer: int) -> Block:
    """The module of one layer."""
    if spec.blocks[layer].merger is None:
        return Block(spec, layer)
    from puna.model.twins import TwinBlock  # which is made of Blocks

    return TwinBlock(spec, layer)


class Decoder(nn.Module):
    """Embedding, blocks and final norm, under the names transformers gives them."""

    def __init__(self, spec: LlamaSpec) -> None:
        super().__init__()
        # Not drawn here: torch draws normals on the meta device through its compiler, a second of imports.
        undrawn = torch.empty(spec.vocab_size, spec.hidden_size)
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size, _weight=undrawn)
        self.layers = nn.ModuleList(_layer(spec, layer) for layer in range(len(spec.blocks)))
        self.norm = Norm(spec.hidden_size, spec.norm_eps)


class Llama(nn.Module):
    """A Llama-family decoder described by ``spec``.

    Parameters are named as in transformers' LlamaForCausalLM; with tied embeddings there is no
    ``lm_head``. On ``device="meta"`` the weights are left without storage, for a checkpoint reader
    to assign; otherwise matrices, and scales of the later terms of a series, are drawn from N(0, 0.02) by
    ``generator`` (seed 0 if None), norms and other scales are ones and biases zeros. ``tokenizer``,
    ``template`` and ``source`` are set by whoever loads a checkpoint.
    """

    def __init__(
        self,
        spec: LlamaSpec,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.tokenizer: Any | None = None
        self.template: Any | None = None
        self.source: str | None = None
        self.recomputed_layers = 0  # of these first layers only the input is kept for the backward pass
        self.adapter: Any | None = None  # what ``adapters.py`` remembers of an adapter in these layers
        self.labels: LabelKind | None = None  # what ``labels.py``'s head says, where there is one
        self.grids: dict[str, UniformGrid] = {}  # by parameter: the grid that quantisation put it on
        with torch.device("meta"):  # no storage and no draws from torch's global generator
            self.model = Decoder(spec)
            if not spec.tied:
                self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.to(dtype)
        if torch.device(device).type != "meta":
            self.to_empty(device=device)
            self.initialise(generator or torch_generator(0, "model", "initial weights"))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights anew; the values depend on the generator alone, not on type or device."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                drawn = torch.empty(parameter.shape, device=generator.device)
                parameter.copy_(drawn.normal_(0, INITIAL_DEVIATION, generator=generator))
            else:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
        for module in self.modules():
            if isinstance(module, SeriesActivation):
                module.initialise(generator, INITIAL_DEVIATION)

    def set_blocks(self, blocks: tuple[BlockSpec, ...]) -> None:
        """Change what the layers are told, such as their masks; not a shape."""
        for layer, block in zip(self.model.layers, blocks, strict=True):
            cast(Block, layer).tell(block)
        self.spec = self.spec.replace(blocks=blocks)

    @property
    def head_weight(self) -> Tensor:
        """The matrix that makes logits, [vocab, hidden]: the embedding's when tied."""
        source = self.model.embed_tokens if self.spec.tied else self.lm_head
        return source.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.head_weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Float32 logits [batch, time, vocab] of ``input_ids`` [batch, time]; see :meth:`hidden`."""
        return self.logits(self.hidden(input_ids, positions, segments, cache))

    def hidden(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [batch, time, hidden].

        ``segments`` [batch, time] are document ids from 0, each id one contiguous run of its row;
        -1 is padding, which sees nothing and is seen by nothing. ``positions`` [batch, time]
        default to counting from 0 in each document. With a cache the tokens follow those stored,
        going on in each row's last document unless ``segments`` says otherwise.
        """
        (hidden,) = self.hidden_at((len(self.model.layers),), input_ids, positions, segments, cache)
        return hidden

    def hidden_at(
        self,
        depths: Sequence[int],
        input_ids: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> list[Tensor]:
        """:meth:`hidden` of the models that end behind ``depths`` layers, numbers that rise from 1."""
        if input_ids.dim() != 2 or 0 in input_ids.shape:
            raise PunaError("input_ids must be [batch, time]", found=tuple(input_ids.shape))
        batch, time = input_ids.shape
        hidden: Tensor = self._embed(input_ids)
        if cache is not None:
            cache.check_room(batch, time, hidden.dtype)
        layout = lay_out(batch, time, input_ids.device, positions, segments, cache)
        rotations = self._rotations(layout.positions, hidden.dtype)
        again = self.recomputed_layers if torch.is_grad_enabled() and cache is None else 0
        found = []
        for index, block in enumerate(self.model.layers):
            if index < again:
                hidden = checkpoint(block, hidden, rotations, layout, cache, use_reentrant=False)
            else:
                hidden = block(hidden, rotations, layout, cache)
            if index + 1 in depths:
                found.append(cast(Tensor, self.model.norm(hidden)))
        if cache is not None:
            cache.advance(time)
        return found

    def _embed(self, input_ids: Tensor) -> Tensor:
        """[batch, time] to [batch, time, hidden]; the trainer may set a sink."""
        embedding = self.model.embed_tokens
        if getattr(embedding.weight, "gradient_sink", None) is None:
            return cast(Tensor, embedding(input_ids))
        return cast(Tensor, _Lookup.apply(embedding.weight, input_ids))  # type: ignore[no-untyped-call]

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., vocab] of hidden states [..., hidden]."""
        logits = functional.linear(hidden, self.head_weight) if self.spec.tied else self.lm_head(hidden)
        return cast(Tensor, logits.float())

    def _rotations(self, positions: Tensor, dtype: torch.dtype) -> _Rotations:
        """Cosines and sines once per forward pass for each rope rule in use.

        Rules that depend on the length take the largest position of this call, over the whole
        batch, as transformers does; keys already in a cache keep the rotation they were stored with.
        """
        rules = {(block.rope, block.head_dim) for block in self.spec.blocks if block.attention == "full"}
        length = int(positions.max()) + 1 if any(depends_on_length(rule) for rule, _ in rules) else 0
        return {(rule, dim): rotation(rule, dim, positions, length, dtype) for rule, dim in rules}
