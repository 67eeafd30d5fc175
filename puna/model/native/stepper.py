"""The native stepper: one call into the compiled kernels reads all tokens of all texts of a step."""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.model.early_exit import read_through
from puna.model.feed_forward_skip import FeedForwardSkip
from puna.model.native.build import LayerDescription, Library, ModelDescription, load
from puna.model.native.weights import (
    DOWN,
    HEAD,
    OUT,
    Place,
    Quantize,
    check_model,
    fill,
    formats,
    out_inputs,
    sources,
)
from puna.model.paged import BLOCK, BlockPool, CachePolicy, PagedSequence, blocks_of
from puna.model.plain_stepper import check_policies, layer_policies, reserve_all
from puna.model.rope import depends_on_length, rotation
from puna.model.stepper import Read

if TYPE_CHECKING:
    from torch import nn

    from puna.model.llama import Llama

_FIRST_POSITIONS = 2048  # of the tables of rotations, which double as texts grow


_STORED = {torch.float32: 0, torch.bfloat16: 1}


class NativeStepper:
    """Steps a :class:`Llama` on the CPU, in float32 or bfloat16 as its weights are, or quantised.

    ``quantize`` stores the layers' weights as 8 or 4 bits in groups of 32 inputs, each with a scale and
    a minimum in half precision (9 or 5 bits a weight); the head takes 9 either way. Matrices on a grid of
    their own (``Llama.grids``) keep its levels where it fits. Activations become
    int8 by groups of 32 then, and keys and values are kept in bfloat16. ``policies`` has one
    :class:`CachePolicy` a layer; by default a layer with a window keeps that window. ``threads`` is
    torch's number unless given. Matrices that ``like`` packed from the very same parameters, which have
    not changed since, are its and this stepper's in common. A text's results are the same bits in any
    batch, in any cutting, with any number of threads. Raises :class:`PunaError` where the kernels cannot
    be compiled or cannot run this model.
    """

    name: ClassVar[str] = "native"

    def __init__(
        self,
        model: Llama,
        *,
        quantize: Quantize | None = None,
        cache_tokens: int,
        policies: Sequence[CachePolicy] | None = None,
        threads: int | None = None,
        library: Library | None = None,
        like: NativeStepper | None = None,
    ) -> None:
        check_model(model, quantize)
        self.spec, self.dtype = model.spec, model.dtype
        self.threads = threads or torch.get_num_threads()
        self.skipped: Sequence[int] = ()
        self.depths: Sequence[int] = ()
        self.ready: Sequence[Tensor | None] = ()
        self._library = library or load()
        by_layer = layer_policies(self.spec.blocks) if policies is None else list(policies)
        check_policies(self.spec.blocks, by_layer)
        self._groups = list(dict.fromkeys(by_layer)) or [CachePolicy()]
        self._group_of = [self._groups.index(policy) for policy in by_layer]
        self._rules = list(
            dict.fromkeys((block.rope, block.head_dim) for block in self.spec.blocks if block.heads)
        )
        if any(depends_on_length(rule) for rule, _ in self._rules):
            raise PunaError(
                "the native kernels take rotations that do not depend on a text's length",
                found=", ".join(rule.kind for rule, _ in self._rules),
                fix="kernels='plain' without quantize",
            )
        blocks = blocks_of(max(1, cache_tokens))
        self._embedding = None if self.spec.tied else _embedding(model)
        self._formats = formats(model, quantize)
        packed = sources(model)
        self._sources = {place: _references(parameters) for place, parameters in packed.items()}
        shared = frozenset(place for place in packed if like is not None and self._is_same(like, place))
        self._like = like if shared else None  # lives as long as this one does
        self._handle = self._create(model, quantize, blocks, shared)
        self._finalizer = weakref.finalize(self, self._library.destroy, self._handle)
        fill(self._library, self._handle, model, self.threads, shared, quantize)
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._positions = 0
        self._turn_up_to(min(_FIRST_POSITIONS, self.spec.max_positions))
        self.shared_bytes = self._library.shared_bytes(self._handle)
        self.weight_bytes = self._library.weight_bytes(self._handle) + self.shared_bytes
        if self._embedding is not None:
            self.weight_bytes += self._embedding.nbytes
        self.pool = BlockPool(blocks, self._copy, self._block_bytes(quantize), self._groups)

    def sequence(self) -> PagedSequence:
        """An empty text."""
        return self.pool.sequence()

    def step(self, reads: Sequence[Read]) -> list[Tensor]:
        """See :meth:`Stepper.step`; hidden states have the type of the model's weights."""
        self._check(reads)
        reserve_all(reads)
        self._turn_up_to(max(read.begin + len(read.ids) for read in reads))
        return read_through(self, reads)

    def run(
        self, reads: Sequence[Read], first: int, last: int, entering: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """See :meth:`puna.model.early_exit.LayerRanges.run`; the stream is float32, none at the top."""
        rows = sum(len(read.ids) for read in reads) if last < len(self.spec.blocks) else 0
        leaving = torch.empty(rows, self.spec.hidden_size)
        ids, shapes, tables, starts = array("i"), array("i"), array("i"), array("i")
        for read in reads:
            ids.extend(read.ids)
            shapes.extend((len(read.ids), read.begin, read.outputs))
            for table in read.sequence.tables:
                starts.append(len(tables))
                tables.extend(table)
        outputs = [read.outputs for read in reads]
        hidden = torch.empty(sum(outputs), self.spec.hidden_size)
        addresses = [numbers.buffer_info()[0] for numbers in (ids, shapes, tables, starts)]
        middles, thresholds = _skips(reads)
        skipped = array("i", bytes(4 * len(reads)))
        skips = [numbers.buffer_info()[0] if numbers else 0 for numbers in (middles, thresholds, skipped)]
        groups = len(self._groups)
        entering = None if entering is None else entering.contiguous()
        streams = [0 if entering is None else entering.data_ptr(), leaving.data_ptr() if rows else 0]
        given = (self._handle, len(reads), *addresses, groups, *skips)
        self._library.call("step", *given, first, last, *streams, hidden.data_ptr(), self.threads)
        self.skipped = skipped.tolist()
        return list(torch.split(hidden.to(self.dtype), outputs)), leaving

    def logits(self, hidden: Tensor) -> Tensor:
        """See :meth:`Stepper.logits`."""
        rows = hidden.detach().float().contiguous()
        target = torch.empty(len(rows), self.spec.vocab_size)
        if len(rows):
            self._library.call(
                "logits", self._handle, rows.data_ptr(), len(rows), target.data_ptr(), self.threads
            )
        return target

    def stored_row(self, layer: int, which: int, row: int) -> Tensor:
        """The weights of one output as the kernels multiply with them, float32, filled up to groups of 32.

        ``which`` is one of the packed matrices of :mod:`puna.model.native.weights`; layer -1 is the head.
        """
        block = self.spec.blocks[layer]
        inputs = {OUT: out_inputs(block), DOWN: block.width} if layer >= 0 else {}
        target = torch.empty(-(-(inputs.get(which) or self.spec.hidden_size) // 32) * 32)
        self._library.call("row", self._handle, layer, which, row, target.data_ptr())
        return target

    def _is_same(self, like: NativeStepper, place: Place) -> bool:
        """Whether ``like`` has packed the same parameters, which are still there, in the same way."""
        theirs = like._sources.get(place, ())
        return (
            self._formats == like._formats
            and len(theirs) == len(self._sources[place])
            and all(a() is b() is not None for a, b in zip(theirs, self._sources[place], strict=True))
        )

    def _create(self, model: Llama, quantize: Quantize | None, blocks: int, shared: frozenset[Place]) -> int:
        spec = self.spec
        layer_format, head_format = self._formats
        layers = (LayerDescription * len(spec.blocks))()
        for number, block in enumerate(spec.blocks):
            policy = self._groups[self._group_of[number]]
            layers[number] = LayerDescription(
                heads=block.heads,
                kv_heads=block.kv_heads,
                head_dim=block.head_dim,
                width=block.width,
                window=policy.window or 0,
                sink=policy.sink,
                rope=self._rules.index((block.rope, block.head_dim)) if block.heads else 0,
                table=self._group_of[number],
                format=layer_format,
                qkv_bias=spec.attention_bias != "none",
                out_bias=spec.attention_bias == "all"
                or (block.attention == "linear" and spec.attention_bias != "none"),
                feed_forward_bias=spec.mlp_bias,
                linear_attention=block.attention == "linear",
                linear_feed_forward=block.feed_forward == "linear",
                series=block.series,
                shortcut=block.shortcut,
                shared=sum(1 << which for layer, which in shared if layer == number),
                scale=block.scale if block.heads else 1.0,
            )
        description = ModelDescription(
            hidden=spec.hidden_size,
            vocabulary=spec.vocab_size,
            layers=len(spec.blocks),
            blocks=blocks,
            stored=_STORED[torch.bfloat16] if quantize else _STORED[model.dtype],
            head_format=head_format,
            ropes=len(self._rules),
            epsilon=spec.norm_eps,
            embedding=None if self._embedding is None else self._embedding.data_ptr(),
            embedding_stored=_STORED.get(model.dtype, 0),
            head_shared=(-1, HEAD) in shared,
            donor=None if self._like is None else self._like._handle,
        )
        handle = self._library.create(ctypes.byref(description), layers)
        if handle is None:
            raise PunaError(
                "there is not enough memory for this model and its cache", fix="a smaller cache_tokens"
            )
        return handle

    def _block_bytes(self, quantize: Quantize | None) -> list[int]:
        """Bytes of a block in each group of layers."""
        sizes = [0] * len(self._groups)
        number = 4 if quantize is None and self.dtype == torch.float32 else 2
        for layer, block in enumerate(self.spec.blocks):
            padded = -(-block.head_dim // 16) * 16
            sizes[self._group_of[layer]] += 2 * BLOCK * block.kv_heads * padded * number
        return sizes

    def _copy(self, source: int, target: int, group: int) -> None:
        self._library.call("copy_block", self._handle, group, source, target)

    def _turn_up_to(self, positions: int) -> None:
        """Have rotations ready for so many positions."""
        if positions <= self._positions:
            return
        self._positions = max(positions, 2 * self._positions)
        places = torch.arange(self._positions)[None]
        self._tables = []
        for index, (rule, head_dim) in enumerate(self._rules):
            turn = rotation(rule, head_dim, places, 0, torch.float32)  # [1, positions, 1, head_dim / 2] each
            cosines, sines = (numbers.contiguous() for numbers in turn)
            self._tables.append((cosines, sines))
            addresses = (cosines.data_ptr(), sines.data_ptr())
            self._library.call("rope", self._handle, index, *addresses, self._positions)

    def _check(self, reads: Sequence[Read]) -> None:
        """Refuse what the kernels would not notice, or not survive."""
        for read in reads:
            if read.skip is not None:
                _saturation(read.skip).check(len(self.spec.blocks))
            if read.sequence.pool is not self.pool:
                raise PunaError("a text of another stepper was given to read")
            if not 0 <= read.outputs <= len(read.ids) or not read.ids:
                raise PunaError(
                    "a read needs tokens, and gives at most one hidden state for each",
                    found=f"{len(read.ids)} tokens, {read.outputs} outputs",
                )
            if min(read.ids) < 0 or max(read.ids) >= self.spec.vocab_size:
                raise PunaError(
                    "ids outside the vocabulary",
                    found=[token for token in read.ids if not 0 <= token < self.spec.vocab_size][:5],
                    expected=f"0 to {self.spec.vocab_size - 1}",
                )


def _references(parameters: Sequence[nn.Parameter]) -> tuple[weakref.ref[nn.Parameter], ...]:
    """What tells whether a parameter is the same one, without keeping it."""
    return tuple(weakref.ref(parameter) for parameter in parameters)


def _skips(reads: Sequence[Read]) -> tuple[array[int], array[float]]:
    """Of each read the middle's ends and the budget, and the threshold; empty if none skips."""
    middles, thresholds = array("i"), array("f")
    if all(read.skip is None for read in reads):
        return middles, thresholds
    for read in reads:
        skip = None if read.skip is None else _saturation(read.skip)
        middles.extend((0, -1, 0) if skip is None else (skip.first, skip.last, skip.budget))
        thresholds.append(0.0 if skip is None else skip.threshold)
    return middles, thresholds


def _saturation(skip: object) -> FeedForwardSkip:
    """The settings of a skip, if it is of the rule that the kernels know."""
    if not isinstance(skip, FeedForwardSkip) or skip.rule != "saturation":
        raise PunaError(
            "the native kernels skip feed-forwards by saturation alone",
            found=getattr(skip, "rule", type(skip).__name__),
            fix="read with the plain stepper",
        )
    return skip


def _embedding(model: Llama) -> Tensor:
    """The weights of an embedding that is not the head, the model's own where the kernels read their type."""
    weight = model.model.embed_tokens.weight.detach()
    return weight.contiguous() if weight.dtype in _STORED else weight.float()
