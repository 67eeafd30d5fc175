"""The reference stepper: the decoder's own modules over paged keys, on any device torch knows.

All tokens of a step lie in one line: projections and feed-forwards are products over all rows, and
attention goes by text. Texts with equally many new tokens share one padded product where these are
few. Adapters and hooks in the model work as they do elsewhere, since the modules are the model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from puna.core.errors import PunaError
from puna.model.attention import dense_attention
from puna.model.early_exit import read_through
from puna.model.paged import BLOCK, GONE, BlockPool, CachePolicy, PagedSequence, blocks_of
from puna.model.rope import Rotation, depends_on_length, rotation
from puna.model.spec import BlockSpec, RopeRule
from puna.model.stepper import FeedForwardTurns, Read

if TYPE_CHECKING:
    from puna.model.llama import Block, Llama

_FEW = 16  # up to so many new tokens, texts share one product over padded keys


class PlainStepper:
    """Steps a :class:`Llama` as it is. ``cache_tokens`` bounds the tokens of all texts together.

    ``policies`` has one :class:`CachePolicy` a layer; by default a layer with a window keeps that
    window and every other layer all. A narrower policy than the model's own changes what it says.
    ``like`` is a stepper whose model may have parameters in common with this one, which are counted.
    """

    name: ClassVar[str] = "plain"

    def __init__(
        self,
        model: Llama,
        *,
        cache_tokens: int,
        policies: Sequence[CachePolicy] | None = None,
        like: PlainStepper | None = None,
    ) -> None:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise PunaError(
                "the model's weights were let go once the native kernels had packed them",
                where=model.source,
                fix="open it for the plain kernels: kernels='plain', or --kernels plain",
            )
        self.model, self.spec = model.eval(), model.spec
        self.skipped: Sequence[int] = ()
        self.depths: Sequence[int] = ()
        self.ready: Sequence[Tensor | None] = ()
        self.weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        theirs = set() if like is None else {id(parameter) for parameter in like.model.parameters()}
        self.shared_bytes = sum(
            parameter.nbytes for parameter in model.parameters() if id(parameter) in theirs
        )
        by_layer = layer_policies(self.spec.blocks) if policies is None else list(policies)
        check_policies(self.spec.blocks, by_layer)
        self._groups = list(dict.fromkeys(by_layer)) or [CachePolicy()]
        slots = self.spec.slots  # a twin keeps what its layer keeps
        self._group_of = [self._groups.index(by_layer[slot.layer]) for slot in slots]
        self._rules = {
            (block.rope, block.head_dim) for block in self.spec.blocks if block.attention == "full"
        }
        blocks = blocks_of(max(1, cache_tokens))
        self._stores = [_storage(slot.block, blocks, model) for slot in slots]
        sizes = [0] * len(self._groups)
        for layer, store in enumerate(self._stores):
            if store is not None:
                sizes[self._group_of[layer]] += store.nbytes // blocks
        self.pool = BlockPool(blocks, self._copy, sizes, self._groups)
        # Keys that were rotated by another length are not those a text would have alone.
        self.pool.sharing = not any(depends_on_length(rule) for rule, _ in self._rules)

    def sequence(self) -> PagedSequence:
        """An empty text."""
        return self.pool.sequence()

    def _copy(self, source: int, target: int, group: int) -> None:
        for layer, store in enumerate(self._stores):
            if store is not None and self._group_of[layer] == group:
                store[:, target] = store[:, source]

    @torch.inference_mode()
    def step(self, reads: Sequence[Read]) -> list[Tensor]:
        """See :meth:`Stepper.step`."""
        reserve_all(reads)
        return read_through(self, reads)

    def run(
        self, reads: Sequence[Read], first: int, last: int, entering: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """See :meth:`puna.model.early_exit.LayerRanges.run`."""
        order = sorted(range(len(reads)), key=lambda place: len(reads[place].ids))
        line = [reads[place] for place in order]
        store = _Store(self._stores, self._group_of)
        for number, policy in enumerate(self._groups):
            store.slots.append(_slots(line, number, self.model.device))
            store.spans.append(_spans(line, number, policy, self.model.device))
        hidden = self._entering(reads, order, entering)  # [1, rows, hidden]
        rotations = self._rotations(line, hidden.dtype)
        turns = _Turns(line) if any(read.skip is not None for read in line) else None
        for layer in range(first, last):
            block = cast("Block", self.model.model.layers[layer])
            if turns is None:
                hidden = block(hidden, rotations, store, store)
            else:
                hidden = turns.feed(layer, block, block.attend(hidden, rotations, store, store))
        counts = turns.counts() if turns is not None else [0] * len(line)
        self.skipped = [counts[order.index(place)] for place in range(len(reads))]
        outputs = self._outputs(line, order, hidden[0])
        if last == len(self.spec.blocks):
            return outputs, hidden[0, :0]
        lengths = [len(read.ids) for read in line]
        parts = dict(zip(order, torch.split(hidden[0], lengths), strict=True))
        return outputs, torch.cat([parts[place] for place in range(len(reads))])

    def _entering(self, reads: Sequence[Read], order: Sequence[int], entering: Tensor | None) -> Tensor:
        """The rows that the first layer reads, [1, rows, hidden], in the line's ``order``."""
        if entering is not None:
            parts = torch.split(entering, [len(read.ids) for read in reads])
            return torch.cat([parts[place] for place in order])[None]
        ids = [token for place in order for token in reads[place].ids]
        return cast(Tensor, self.model.model.embed_tokens(torch.tensor(ids, device=self.model.device)[None]))

    def _outputs(self, line: Sequence[Read], order: Sequence[int], hidden: Tensor) -> list[Tensor]:
        """The final norm of what each read asked for, in the order the reads were given."""
        wanted: list[Tensor] = []
        end = 0
        for read in line:
            end += len(read.ids)
            wanted.append(hidden[end - read.outputs : end])
        normed = self.model.model.norm(torch.cat(wanted))
        parts = normed.split([read.outputs for read in line])
        outputs = [hidden] * len(line)
        for part, place in zip(parts, order, strict=True):
            outputs[place] = part
        return outputs

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See :meth:`Stepper.logits`."""
        return self.model.logits(hidden)

    def _rotations(self, line: Sequence[Read], dtype: torch.dtype) -> dict[tuple[RopeRule, int], Rotation]:
        """Cosines and sines [1, rows, 1, head_dim / 2] of each rule; each text goes by its own length."""
        device = self.model.device
        parts = [(read.begin, read.begin + len(read.ids), read.extent) for read in line]
        whole = torch.tensor([place for start, end, _ in parts for place in range(start, end)], device=device)
        found: dict[tuple[RopeRule, int], Rotation] = {}
        for rule, dim in self._rules:
            if not depends_on_length(rule):
                found[rule, dim] = rotation(rule, dim, whole[None], 0, dtype)
                continue
            turns = []
            for start, end, extent in parts:
                places = torch.arange(start, end, device=device)[None]
                turns.append(rotation(rule, dim, places, extent or end, dtype))
            cosines, sines = zip(*turns, strict=True)
            found[rule, dim] = torch.cat(cosines, dim=1), torch.cat(sines, dim=1)
        return found


def layer_policies(blocks: Sequence[BlockSpec]) -> list[CachePolicy]:
    """The policy of each layer that changes nothing: a window where the layer has one, else all keys."""
    return [CachePolicy() if block.window is None else CachePolicy.sliding(block.window) for block in blocks]


def check_policies(blocks: Sequence[BlockSpec], policies: Sequence[CachePolicy]) -> None:
    """Refuse policies under which these layers cannot be decoded, or would see more than they should."""
    both_ways = [str(layer) for layer, block in enumerate(blocks) if not block.causal]
    if both_ways:
        raise PunaError(
            "layers that attend both ways cannot be decoded",
            found=f"layers {', '.join(both_ways)} are not causal",
            fix="run the whole sequence without a cache",
        )
    if len(policies) != len(blocks):
        raise PunaError(
            "a cache policy is needed for each layer",
            found=f"{len(policies)} policies",
            expected=f"{len(blocks)}",
        )
    for layer, (block, policy) in enumerate(zip(blocks, policies, strict=True)):
        if block.window is not None and (policy.window is None or policy.window > block.window):
            raise PunaError(
                "a layer with a window cannot see more than its window",
                where=f"layer {layer}",
                found=f"policy {policy.kind!r}, window {policy.window}",
                expected=f"a window of at most {block.window}",
            )


def _storage(block: BlockSpec, blocks: int, model: Llama) -> Tensor | None:
    """Keys and values [2, blocks, 16, kv_heads, head_dim] of a layer.

    On a CPU the memory is the system's zero pages: what no text has used yet takes no room.
    """
    if block.attention != "full":
        return None
    shape = (2, blocks, BLOCK, block.kv_heads, block.head_dim)
    if model.device.type != "cpu":
        return torch.zeros(shape, dtype=model.dtype, device=model.device)
    items = 2 * blocks * BLOCK * block.kv_heads * block.head_dim
    raw = torch.from_numpy(numpy.zeros(items * model.dtype.itemsize, dtype=numpy.uint8))
    return raw.view(model.dtype).view(shape)


def reserve_all(reads: Sequence[Read]) -> None:
    """Room for all reads or for none."""
    before = [[len(table) for table in read.sequence.tables] for read in reads]
    for count, read in enumerate(reads):
        try:
            read.sequence.reserve(len(read.ids))
        except PunaError:
            for undone, lengths in zip(reads[:count], before, strict=False):
                undone.sequence.unreserve(lengths)
            raise


def _slots(line: Sequence[Read], group: int, device: torch.device) -> Tensor:
    """Where each row's keys are stored, [rows]: block * 16 + place in it."""
    slots: list[int] = []
    for read in line:
        table = read.sequence.tables[group]
        slots += [
            table[place // BLOCK] * BLOCK + place % BLOCK
            for place in range(read.begin, read.begin + len(read.ids))
        ]
    return torch.tensor(slots, device=device)


class _Span:
    """Consecutive texts of the line with equally many new tokens, whose attention is one product."""

    def __init__(
        self, texts: int, time: int, first: int, table: Tensor, mask: Tensor | None, keys: int
    ) -> None:
        self.texts, self.time, self.first = texts, time, first
        self.table = table  # [texts, blocks]
        self.mask = mask  # [texts, time, keys] bool; None: every key is seen
        self.keys = keys  # of the gathered keys, so many are looked at

    def attend(self, queries: Tensor, store: Tensor, block: BlockSpec) -> Tensor:
        """``queries`` [rows, heads, head_dim] of the span and a layer's storage; the shape of ``queries``."""
        keys, values = store[:, self.table].flatten(2, 3)[:, :, : self.keys].transpose(2, 3)
        shaped = queries.view(self.texts, self.time, block.heads, block.head_dim)
        if self.time <= _FEW:
            return dense_attention(shaped, keys, values, self.mask, block.scale).reshape(queries.shape)
        mixed = functional.scaled_dot_product_attention(
            shaped.transpose(1, 2),
            keys,
            values,
            attn_mask=None if self.mask is None else self.mask[:, None],
            scale=block.scale,
            enable_gqa=block.heads != block.kv_heads,
        )
        return mixed.transpose(1, 2).reshape(queries.shape)


def _spans(line: Sequence[Read], group: int, policy: CachePolicy, device: torch.device) -> list[_Span]:
    """The texts of the line, neighbours of equal length together where they are short."""
    spans: list[_Span] = []
    first = place = 0
    while place < len(line):
        time = len(line[place].ids)
        end = place + 1
        while time <= _FEW and end < len(line) and len(line[end].ids) == time:
            end += 1
        spans.append(_span(line[place:end], group, policy, first, device))
        first += time * (end - place)
        place = end
    return spans


def _span(texts: Sequence[Read], group: int, policy: CachePolicy, first: int, device: torch.device) -> _Span:
    time = len(texts[0].ids)
    held: list[list[tuple[int, int]]] = []  # (place in the text, block) of each text's blocks
    for read in texts:
        end = blocks_of(read.begin + time)
        table = read.sequence.tables[group][:end]
        held.append([(place, block) for place, block in enumerate(table) if block != GONE])
    widest = max(map(len, held))
    blocks = torch.tensor([[b for _, b in row] + [0] * (widest - len(row)) for row in held], device=device)
    lengths = {read.begin + time for read in texts}
    all_seen = policy.window is None or policy.sink + policy.window >= max(lengths)
    if time == 1 and all_seen and len(lengths) == 1 and all(len(row) == widest for row in held):
        (length,) = lengths
        return _Span(len(texts), 1, first, blocks, None, widest * BLOCK - (-length % BLOCK))
    starts = [[p * BLOCK for p, _ in row] + [-BLOCK] * (widest - len(row)) for row in held]
    inside = torch.arange(BLOCK, device=device)
    keys = (torch.tensor(starts, device=device)[:, :, None] + inside).flatten(1)[:, None]  # [texts, 1, keys]
    begins = torch.tensor([read.begin for read in texts], device=device)
    queries = (begins[:, None] + torch.arange(time, device=device))[:, :, None]  # [texts, time, 1]
    return _Span(len(texts), time, first, blocks, policy.visible(queries, keys), widest * BLOCK)


class _Store:
    """Stands where the decoder's modules expect a layout and a cache: stores rows, and attends by text."""

    length = 1  # attention always goes over what is stored

    def __init__(self, stores: Sequence[Tensor | None], group_of: Sequence[int]) -> None:
        self.slots: list[Tensor] = []
        self.spans: list[list[_Span]] = []
        self._stores = stores
        self._group_of = group_of
        self._layer = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the rows of a layer, [1, rows, kv_heads, head_dim] each; returns its whole storage."""
        store = self._stores[layer]
        assert store is not None
        self._layer = layer
        flat = store.flatten(1, 2)  # [2, slots, kv_heads, head_dim]
        slots = self.slots[self._group_of[layer]]
        flat[0].index_copy_(0, slots, keys[0])
        flat[1].index_copy_(0, slots, values[0])
        return store[0], store[1]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, block: BlockSpec) -> Tensor:
        """Never asked for: nothing here is read without being stored."""
        raise NotImplementedError

    def attend_stored(self, queries: Tensor, keys: Tensor, values: Tensor, block: BlockSpec) -> Tensor:
        """Attention of each row [1, rows, heads, head_dim] on the stored keys of its own text."""
        store = self._stores[self._layer]
        assert store is not None
        mixed = []
        for span in self.spans[self._group_of[self._layer]]:
            rows = queries[0, span.first : span.first + span.texts * span.time]
            mixed.append(span.attend(rows, store, block))
        return (mixed[0] if len(mixed) == 1 else torch.cat(mixed))[None]


class _Turns:
    """Feed-forwards of a step in which some texts leave some out."""

    def __init__(self, line: Sequence[Read]) -> None:
        self._lengths = [len(read.ids) for read in line]
        self._turns: list[FeedForwardTurns | None] = [
            read.skip.begin(len(read.ids)) if read.skip is not None else None for read in line
        ]

    def feed(self, layer: int, block: Block, hidden: Tensor) -> Tensor:
        """[1, rows, hidden] after attention to the same after the feed-forward, for the rows that run it."""
        wanted = [None if turn is None else turn.running(layer) for turn in self._turns]
        if all(rows is None for rows in wanted):
            after = block.feed(hidden)
        else:
            running = torch.cat(
                [
                    torch.ones(length, dtype=torch.bool) if rows is None else rows.cpu()
                    for rows, length in zip(wanted, self._lengths, strict=True)
                ]
            ).to(hidden.device)
            if not bool(running.any()):
                return hidden
            after = hidden.clone()
            after[:, running] = block.feed(hidden[:, running])
        parts = (torch.split(tensor[0], self._lengths) for tensor in (hidden, after))
        for turn, rows, old, new in zip(self._turns, wanted, *parts, strict=True):
            if turn is not None:
                turn.saw(layer, rows, old if rows is None else old[rows], new if rows is None else new[rows])
        return after

    def counts(self) -> list[int]:
        """Feed-forwards skipped, by read in the line's order."""
        return [0 if turn is None else turn.skipped for turn in self._turns]
