"""Lays a model's weights out for the kernels: fused matrices, packed, quantised where that is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from puna.core.errors import PunaError
from puna.model.group_rounding import GROUP
from puna.model.light_adapter import AttentionPrompt
from puna.model.llama import Attention, FeedForward

if TYPE_CHECKING:
    from puna.model.llama import Block, LinearAttention, LinearFeedForward, Llama
    from puna.model.native.build import Library
    from puna.model.nonlinearity import SeriesActivation
    from puna.model.spec import BlockSpec

Quantize = Literal["int8", "int4"]
FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
QKV, OUT, GATE_UP, DOWN, HEAD = 0, 1, 2, 3, 0
BITS = {"int8": 8, "int4": 4}
MOST_HEAD_DIM = 1024
_GATES = 16  # gates and ups alternate by so many: a panel of 32 outputs holds 16 gates and their 16 ups
_ROWS = 4096  # handed over at once, since the head alone in float32 may be larger than the packed model


def formats(model: Llama, quantize: Quantize | None) -> tuple[int, int]:
    """Formats of the layers and of the head.

    With int4 the head is int8: its rows are the embedding as well, where it is tied, and every token
    is chosen by it; 4-bit files keep it so too.
    """
    if quantize is None:
        form = FORMATS[str(model.dtype).removeprefix("torch.")]
        return form, form
    return FORMATS[quantize], FORMATS["int8"]


def check_model(model: Llama, quantize: Quantize | None) -> None:
    """Raise :class:`PunaError` for what the kernels cannot run, or would silently run differently."""
    if model.device.type != "cpu":
        raise _unfit("they run on the CPU", f"a model on {model.device}")
    if quantize is None and model.dtype not in (torch.float32, torch.bfloat16):
        raise _unfit("they compute in float32 or bfloat16", str(model.dtype))
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise _unfit("they would not run its hooks", f"a hook on {name or 'the model'}")
        if name.endswith(("_proj", "linear_attn", "linear_mlp")) and type(module) is not nn.Linear:
            raise _unfit("they take plain linear layers", f"{type(module).__name__} at {name}")
        if isinstance(module, AttentionPrompt):
            raise _unfit("they do not look at attention prompts", f"one at {name}")
    expanded = [layer for layer, block in enumerate(model.spec.blocks) if block.merger]
    if expanded:
        raise _unfit("they have no layers with a twin", f"a merger in layer {expanded[0]}")
    widest = max(block.head_dim for block in model.spec.blocks)
    if widest > MOST_HEAD_DIM:
        raise _unfit(f"they take heads of at most {MOST_HEAD_DIM} numbers", f"head_dim {widest}")


def _unfit(why: str, found: str) -> PunaError:
    return PunaError(
        f"the native kernels do not fit this model: {why}",
        found=found,
        fix="kernels='plain' without quantize",
    )


Place = tuple[int, int]
"""Where a packed matrix stands: its layer, -1 for the head, and which of the layer's."""


def sources(model: Llama) -> dict[Place, tuple[nn.Parameter, ...]]:
    """The parameters, biases too, that each packed matrix is made of."""
    found: dict[Place, tuple[nn.Parameter, ...]] = {(-1, HEAD): (cast(nn.Parameter, model.head_weight),)}
    blocks = cast("Iterable[Block]", model.model.layers)
    for layer, (spec, block) in enumerate(zip(model.spec.blocks, blocks, strict=True)):
        if spec.attention == "full":
            attention = block.self_attn
            joined = [attention.q_proj, attention.k_proj, attention.v_proj]
            found[layer, OUT] = tuple(attention.o_proj.parameters())
            if spec.shortcut:
                joined.append(attention.squeeze_proj)
                found[layer, OUT] += tuple(attention.expand_proj.parameters())
            found[layer, QKV] = tuple(each for projection in joined for each in projection.parameters())
        elif spec.attention == "linear":
            found[layer, OUT] = tuple(block.self_attn.linear_attn.parameters())
        if spec.feed_forward == "swiglu":
            feed_forward = block.mlp
            gate, up = feed_forward.gate_proj.parameters(), feed_forward.up_proj.parameters()
            series = feed_forward.act_fn.parameters() if spec.series else ()
            found[layer, GATE_UP] = (*gate, *up, *series)
            found[layer, DOWN] = tuple(feed_forward.down_proj.parameters())
        elif spec.feed_forward == "linear":
            found[layer, DOWN] = tuple(block.mlp.linear_mlp.parameters())
    return found


@torch.inference_mode()
def fill(
    library: Library,
    handle: int,
    model: Llama,
    threads: int,
    shared: frozenset[Place],
    quantize: Quantize | None = None,
) -> None:
    """Pack every matrix, bias and norm of ``model`` into the native model ``handle``, but what is shared.

    With ``quantize``, matrices that lie on a grid of their own that fits (``Llama.grids``) keep its levels.
    """
    blocks = cast("Iterable[Block]", model.model.layers)
    for layer, (spec, block) in enumerate(zip(model.spec.blocks, blocks, strict=True)):
        grids = _Grids(model, f"model.layers.{layer}", quantize)
        if spec.attention != "none":
            _norm(library, handle, layer, 0, block.input_layernorm.weight)
            for which, rows, bias in _attention(block.self_attn, grids):
                if (layer, which) not in shared:
                    _matrix(library, handle, layer, which, rows, bias, threads)
        if spec.feed_forward != "none":
            _norm(library, handle, layer, 1, block.post_attention_layernorm.weight)
            for which, rows, bias in _feed_forward(block.mlp, grids):
                if (layer, which) not in shared:
                    _matrix(library, handle, layer, which, rows, bias, threads)
            if spec.series and (layer, GATE_UP) not in shared:
                _series(library, handle, layer, block.mlp.act_fn)
    _norm(library, handle, -1, 0, model.model.norm.weight)
    if (-1, HEAD) not in shared:
        _matrix(library, handle, -1, HEAD, [(model.head_weight, None)], None, threads)


_Steps = tuple[Tensor, Tensor]
"""Scales and minimums of a matrix, float32 [outputs, groups of 32] each."""
_Rows = tuple[Tensor, _Steps | None]
_Parts = Iterator[tuple[int, Sequence[_Rows], Tensor | None]]


class _Grids:
    """The grids of one layer's matrices, for those that lie on one the kernels have."""

    def __init__(self, model: Llama, prefix: str, quantize: Quantize | None) -> None:
        self._model, self._prefix, self._quantize = model, prefix, quantize

    def of(self, name: str, weight: Tensor) -> _Steps | None:
        return grid_steps(self._model, f"{self._prefix}.{name}.weight", weight, self._quantize)


def grid_steps(model: Llama, name: str, weight: Tensor, quantize: Quantize | None) -> _Steps | None:
    """Scales and minimums of the parameter ``name`` if the kernels can keep its grid, and it lies on it."""
    grid = model.grids.get(name)
    if quantize is None or grid is None or grid.bits > BITS[quantize]:
        return None
    if grid.levels(weight) is None:
        return None
    return grid.packed(weight.shape[1])


def _attention(attention: Attention | LinearAttention, grids: _Grids) -> _Parts:
    if not isinstance(attention, Attention):
        linear = attention.linear_attn
        yield OUT, [(linear.weight, grids.of("self_attn.linear_attn", linear.weight))], linear.bias
        return
    block = attention.block
    names = ["q_proj", "k_proj", "v_proj", *(["squeeze_proj"] if block.shortcut else [])]
    joined = [cast(nn.Linear, getattr(attention, name)) for name in names]
    biases: list[Tensor] = [projection.bias for projection in joined if projection.bias is not None]
    rows = [
        (projection.weight, grids.of(f"self_attn.{name}", projection.weight))
        for name, projection in zip(names, joined, strict=True)
    ]
    if biases and block.shortcut:
        biases.append(biases[0].new_zeros(block.shortcut))
    yield QKV, rows, torch.cat(biases) if biases else None
    out = attention.o_proj
    steps = grids.of("self_attn.o_proj", out.weight)
    weight: Tensor = out.weight
    if block.shortcut:
        expand = attention.expand_proj.weight
        also = grids.of("self_attn.expand_proj", expand)
        steps = None if steps is None or also is None else _beside(steps, also)
        weight = torch.cat((nn.functional.pad(weight, (0, -weight.shape[1] % GROUP)), expand), dim=1)
    yield OUT, [(weight, steps)], out.bias


def _beside(one: _Steps, other: _Steps) -> _Steps:
    """The steps of two matrices whose inputs lie side by side."""
    scales, minimums = (torch.cat(pair, dim=1) for pair in zip(one, other, strict=True))
    return scales, minimums


def out_inputs(block: BlockSpec) -> int:
    """Inputs of the packed output projection: a shortcut's follow the heads', in groups of their own."""
    heads = block.heads * block.head_dim
    return -(-heads // GROUP) * GROUP + block.shortcut if block.shortcut else heads


def _feed_forward(feed_forward: FeedForward | LinearFeedForward, grids: _Grids) -> _Parts:
    if not isinstance(feed_forward, FeedForward):
        linear = feed_forward.linear_mlp
        yield DOWN, [(linear.weight, grids.of("mlp.linear_mlp", linear.weight))], linear.bias
        return
    gate, up, down = feed_forward.gate_proj, feed_forward.up_proj, feed_forward.down_proj
    bias = None if gate.bias is None else _alternate(gate.bias[:, None], up.bias[:, None])[:, 0]
    of_gate, of_up = grids.of("mlp.gate_proj", gate.weight), grids.of("mlp.up_proj", up.weight)
    steps = None
    if of_gate is not None and of_up is not None:
        steps = (_alternate(of_gate[0], of_up[0]), _alternate(of_gate[1], of_up[1]))
    yield GATE_UP, [(_alternate(gate.weight, up.weight), steps)], bias
    yield DOWN, [(down.weight, grids.of("mlp.down_proj", down.weight))], down.bias


def _alternate(gates: Tensor, ups: Tensor) -> Tensor:
    """16 gates, their 16 ups, the next 16 gates ...: [2 * width, inputs], width filled up with zeros."""
    missing = -gates.shape[0] % _GATES
    parts = [
        nn.functional.pad(rows, (0, 0, 0, missing)).view(-1, _GATES, rows.shape[1]) for rows in (gates, ups)
    ]
    return torch.stack(parts, dim=1).flatten(0, 2)


def _matrix(
    library: Library,
    handle: int,
    layer: int,
    which: int,
    parts: Sequence[_Rows],
    bias: Tensor | None,
    threads: int,
) -> None:
    """Pack ``parts`` one below the other as one matrix [outputs, inputs]."""
    first = 0
    for part, steps in parts:
        for start in range(0, len(part), _ROWS):
            numbers = part[start : start + _ROWS].float().contiguous()
            grid = [] if steps is None else [each[start : start + _ROWS].contiguous() for each in steps]
            addresses = [each.data_ptr() for each in grid] or [0, 0]
            library.call(
                "fill", handle, layer, which, first, len(numbers), numbers.data_ptr(), *addresses, threads
            )
            first += len(numbers)
    if bias is not None:
        numbers = bias.float().contiguous()
        library.call("bias", handle, layer, which, numbers.data_ptr())


def _series(library: Library, handle: int, layer: int, series: SeriesActivation) -> None:
    """Scales and shifts [terms, 2, channels], channels filled up to panels of 16."""
    numbers = torch.stack([torch.stack(pair) for pair in series.by_term()]).float()
    padded = nn.functional.pad(numbers, (0, -numbers.shape[-1] % _GATES)).contiguous()
    library.call("series", handle, layer, padded.data_ptr())


def _norm(library: Library, handle: int, layer: int, which: int, weight: Tensor) -> None:
    numbers = weight.float().contiguous()
    library.call("norm", handle, layer, which, numbers.data_ptr())
