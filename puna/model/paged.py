"""Paged storage of keys: blocks of 16 tokens, handed out, counted and shared.

What a block holds and where is the stepper's business; here are only block numbers. Layers that
keep different keys (a window in some, all in others) form groups, and each group has a table of
its own in every sequence. Full blocks of texts that have ended stay findable by their tokens until
their room is needed, so a text that begins the same does not read that beginning again.

Sources: PagedAttention (arXiv:2309.06180) for blocks with reference counts; attention sinks
(arXiv:2309.17453) for the policy ``sink_window``, here with the positions the text really has.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from puna.core.errors import PunaError

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 16
"""Tokens of a block."""
GONE = -1
"""Stands in a table where a block was let go."""
_STILL_CROPPABLE = 2 * BLOCK  # so far a text can always be cropped, though a window has moved on

PolicyKind = Literal["full", "sliding", "sink_window", "retained"]


class OutOfBlocks(PunaError):  # noqa: N818  (the contract's name: a state of the pool that callers handle)
    """No block is free; what asked for one has changed nothing."""


@dataclass(frozen=True)
class CachePolicy:
    """Which stored keys a token may see, and so which blocks a layer has to keep.

    ``full``: all. ``sliding``: the last ``window``, the token's own included. ``sink_window``: the
    first ``sink`` and the last ``window``. ``retained``: those in blocks that nobody let go with
    :meth:`PagedSequence.retain`. Made by the class methods of these names.
    """

    kind: PolicyKind = "full"
    window: int | None = None
    sink: int = 0

    @classmethod
    def full(cls) -> CachePolicy:
        """Every key is kept and seen."""
        return cls()

    @classmethod
    def sliding(cls, window: int) -> CachePolicy:
        """The last ``window`` keys."""
        return cls._windowed("sliding", window, 0)

    @classmethod
    def sink_window(cls, sink: int, window: int) -> CachePolicy:
        """The first ``sink`` and the last ``window`` keys."""
        return cls._windowed("sink_window", window, sink)

    @classmethod
    def retained(cls) -> CachePolicy:
        """The keys of blocks that were not let go by name."""
        return cls("retained")

    @classmethod
    def _windowed(cls, kind: PolicyKind, window: int, sink: int) -> CachePolicy:
        if window < 1 or sink < 0:
            raise PunaError(
                "a cache policy is out of range",
                where=kind,
                found=f"sink {sink}, window {window}",
                expected="a sink of at least 0 and a window of at least 1 token",
            )
        return cls(kind, window, sink)

    def kept(self, length: int) -> tuple[int, int]:
        """(sinks, first): blocks before ``sinks`` and from ``first`` on matter to token ``length``."""
        if self.window is None:
            return 0, 0
        return -(-self.sink // BLOCK), max(0, length - self.window + 1) // BLOCK

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether each key is seen, from positions that broadcast ([..., queries, 1] and [..., 1, keys]).

        A key at a negative position is seen by nobody.
        """
        seen = (keys <= queries) & (keys >= 0)
        if self.window is None:
            return seen
        near = keys > queries - self.window
        return seen & (near | (keys < self.sink) if self.sink else near)


class _Node:
    """A full block of some text: its number in each group, found by the tokens of it and of all before it."""

    __slots__ = ("blocks", "key", "name")

    def __init__(self, name: int, key: tuple[int, tuple[int, ...]], groups: int) -> None:
        self.name = name
        self.key = key
        self.blocks = [GONE] * groups


class _Group:
    """Blocks of one group of layers."""

    def __init__(self, blocks: int, policy: CachePolicy, bytes_per_block: int) -> None:
        self.policy = policy
        self.bytes_per_block = bytes_per_block
        self.unused = list(range(blocks - 1, -1, -1))  # the lowest number is handed out first
        self.references = [0] * blocks
        self.idle: dict[int, None] = {}  # held by nobody but still findable, the longest idle first
        self.nodes: dict[int, _Node] = {}

    @property
    def free(self) -> int:
        return len(self.unused) + len(self.idle)


class BlockPool:
    """Hands out, counts and shares the blocks of one stepper.

    ``blocks`` are those of every group. ``copy(source, target, group)`` copies what the stepper has
    stored. ``bytes_per_block`` has one number a group (or is the number of the only one), and
    ``policies`` one policy a group.
    """

    def __init__(
        self,
        blocks: int,
        copy: Callable[[int, int, int], None],
        bytes_per_block: int | Sequence[int],
        policies: Sequence[CachePolicy] = (CachePolicy(),),
    ) -> None:
        if blocks < 1:
            raise PunaError("a pool needs at least one block", found=blocks)
        sizes = (bytes_per_block,) if isinstance(bytes_per_block, int) else tuple(bytes_per_block)
        self.capacity = blocks
        self.policies = tuple(policies)
        self.sharing = True  # False: no text takes over another's blocks
        self._copy = copy
        self._groups = [_Group(blocks, policy, size) for policy, size in zip(policies, sizes, strict=True)]
        self._known: dict[tuple[int, tuple[int, ...]], _Node] = {}
        self._names = itertools.count(1)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of a block of all layers together."""
        return sum(group.bytes_per_block for group in self._groups)

    @property
    def free(self) -> int:
        """Blocks that can be handed out, in the fullest group; those that are only findable count."""
        return min(group.free for group in self._groups)

    @property
    def used(self) -> int:
        """Blocks that texts hold, each counted once, in the fullest group."""
        return self.capacity - self.free

    @property
    def bytes(self) -> int:
        """Exact bytes of the blocks that texts hold, each counted once."""
        return sum((self.capacity - group.free) * group.bytes_per_block for group in self._groups)

    def sequence(self) -> PagedSequence:
        """An empty text."""
        return PagedSequence(self)

    def match(self, ids: Sequence[int]) -> PagedSequence:
        """A text holding the longest known beginning of ``ids``, at least one token short of it."""
        sequence = PagedSequence(self)
        nodes: list[_Node] = []
        name = 0
        for start in range(0, len(ids) - BLOCK if self.sharing else 0, BLOCK):
            node = self._known.get((name, tuple(ids[start : start + BLOCK])))
            if node is None:
                break
            nodes.append(node)
            name = node.name
        while nodes and not all(
            nodes[place].blocks[number] != GONE
            for number, group in enumerate(self._groups)
            for place in _needed(group.policy, len(nodes))
        ):
            nodes.pop()
        if nodes:
            sequence._adopt(nodes)
        return sequence

    def remember(self, sequence: PagedSequence, ids: Sequence[int]) -> None:
        """Make the full blocks of ``sequence`` findable; ``ids`` are its tokens."""
        if not self.sharing:
            return
        names = sequence._names
        for place in range(len(names), sequence.settled // BLOCK):
            key = (names[-1] if names else 0, tuple(ids[place * BLOCK : (place + 1) * BLOCK]))
            node = self._known.get(key) or _Node(next(self._names), key, len(self._groups))
            for number, group in enumerate(self._groups):
                block = sequence.tables[number][place]
                if block != GONE and node.blocks[number] == GONE and block not in group.nodes:
                    node.blocks[number] = block
                    group.nodes[block] = node
                    self._known[key] = node
            names.append(node.name)

    def _take(self, number: int) -> int:
        group = self._groups[number]
        if group.unused:
            block = group.unused.pop()
        else:
            block = next(iter(group.idle))
            del group.idle[block]
            self._forget(number, block)
        group.references[block] = 1
        return block

    def _share(self, number: int, block: int) -> None:
        group = self._groups[number]
        if not group.references[block]:
            del group.idle[block]
        group.references[block] += 1

    def _release(self, number: int, block: int) -> None:
        group = self._groups[number]
        group.references[block] -= 1
        if not group.references[block]:
            if block in group.nodes:
                group.idle[block] = None
            else:
                group.unused.append(block)

    def _forget(self, number: int, block: int) -> None:
        """A block's content is about to change: it is found no more."""
        node = self._groups[number].nodes.pop(block, None)
        if node is not None:
            node.blocks[number] = GONE
            if all(other == GONE for other in node.blocks):
                del self._known[node.key]


def _needed(policy: CachePolicy, blocks: int) -> list[int]:
    """Which of the first ``blocks`` full blocks a text that goes on behind them has to hold."""
    sinks, first = policy.kept(blocks * BLOCK)
    return [place for place in range(blocks) if place < sinks or place >= first]


def blocks_of(tokens: int) -> int:
    """Blocks that so many tokens take."""
    return -(-tokens // BLOCK)


class PagedSequence:
    """The stored keys of one text in one model.

    ``tables[group][i]`` is the block with tokens 16 i to 16 i + 15, or -1 where the policy let it
    go. ``length`` tokens are stored; a table may reach further, into what is reserved. ``waiting[n]`` are
    the rows [tokens, hidden] of tokens that the layers from n on have not read: the latest wait lowest.
    """

    __slots__ = ("_first", "_names", "length", "pool", "tables", "waiting")

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.length = 0
        self.waiting: dict[int, Tensor] = {}
        self.tables: list[list[int]] = [[] for _ in pool._groups]
        self._names: list[int] = []  # of the nodes of its full blocks, as far as they are findable
        self._first = [0] * len(self.tables)  # before these blocks, sinks aside, everything was let go

    @property
    def blocks(self) -> list[int]:
        """The table of the first group, the only one where all layers keep the same."""
        return self.tables[0]

    @property
    def settled(self) -> int:
        """Tokens that every layer has read."""
        return self.length - sum(map(len, self.waiting.values()))

    def wait(self, layer: int, rows: Tensor) -> None:
        """Let ``rows`` [tokens, hidden], the latest tokens', wait before ``layer``."""
        import torch

        earlier = self.waiting.get(layer)
        self.waiting[layer] = rows if earlier is None else torch.cat((earlier, rows))

    @property
    def bytes(self) -> int:
        """Exact bytes of the blocks this text holds; a shared block counts in each text that holds it."""
        return sum(
            (len(table) - table.count(GONE)) * group.bytes_per_block
            for table, group in zip(self.tables, self.pool._groups, strict=True)
        )

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` more; raises :class:`OutOfBlocks`, with nothing changed, if there is none.

        A last block that other texts hold too is copied first.
        """
        target = blocks_of(self.length + tokens)
        groups = self.pool._groups
        place = self.length // BLOCK
        written = bool(self.length % BLOCK and tokens)  # a block that holds something already
        for number, (table, group) in enumerate(zip(self.tables, groups, strict=True)):
            shared = written and group.references[table[place]] > 1
            needed = max(0, target - len(table)) + shared
            if needed > group.free:
                raise OutOfBlocks(
                    "the cache has no room",
                    where=f"group {number}" if len(groups) > 1 else None,
                    found=f"{needed} blocks needed, {group.free} of {self.pool.capacity} free",
                    fix="a larger cache_tokens",
                )
        for number, (table, group) in enumerate(zip(self.tables, groups, strict=True)):
            if written:
                self._own(number, group, table, place)
            while len(table) < target:
                table.append(self.pool._take(number))
        if written:
            del self._names[place:]

    def unreserve(self, lengths: Sequence[int]) -> None:
        """Give back what was reserved beyond a table of ``lengths[group]`` blocks."""
        for number, (table, length) in enumerate(zip(self.tables, lengths, strict=True)):
            for block in table[length:]:
                self.pool._release(number, block)
            del table[length:]

    def _own(self, number: int, group: _Group, table: list[int], place: int) -> None:
        """See to it that the block at ``place`` is this text's alone and not findable."""
        block = table[place]
        if group.references[block] > 1:
            table[place] = self.pool._take(number)
            self.pool._copy(block, table[place], number)
            self.pool._release(number, block)
        elif block in group.nodes:
            self.pool._forget(number, block)

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` as stored; then what the policies need no more is let go."""
        self.length += tokens
        for number, policy in enumerate(self.pool.policies):
            if policy.window is None:
                continue
            sinks, first = policy.kept(max(0, self.length - _STILL_CROPPABLE))
            table = self.tables[number]
            for place in range(max(self._first[number], sinks), first):
                if table[place] != GONE:
                    self.pool._release(number, table[place])
                    table[place] = GONE
            self._first[number] = max(self._first[number], first)

    def retain(self, places: Collection[int], group: int = 0) -> None:
        """Of a group with the policy ``retained``, keep only the full blocks at ``places``."""
        if self.pool.policies[group].kind != "retained":
            raise PunaError(
                "only a group with the policy 'retained' lets blocks go by name",
                found=self.pool.policies[group].kind,
            )
        table = self.tables[group]
        for place in range(self.length // BLOCK):
            if place not in places and table[place] != GONE:
                self.pool._release(group, table[place])
                table[place] = GONE

    def can_crop(self, length: int) -> bool:
        """Whether everything that a text of ``length`` tokens needs is still here."""
        if not 0 <= length <= self.length:
            return False
        partial = length // BLOCK if length % BLOCK else None
        return all(
            first <= policy.kept(length)[1] and (partial is None or table[partial] != GONE)
            for policy, first, table in zip(self.pool.policies, self._first, self.tables, strict=True)
        )

    def crop(self, length: int) -> None:
        """Forget every token after the first ``length``, and what was reserved."""
        if not 0 <= length <= self.length:
            raise PunaError(
                "a text can only be cropped to what it holds", found=length, expected=f"0 to {self.length}"
            )
        if not self.can_crop(length):
            raise PunaError(
                "what the shorter text needs was let go as the window moved on",
                found=f"a crop from {self.length} to {length} tokens",
                fix="free the text and read it again",
            )
        for number, table in enumerate(self.tables):
            for block in table[blocks_of(length) :]:
                if block != GONE:
                    self.pool._release(number, block)
            del table[blocks_of(length) :]
        beyond = self.length - length
        for layer in sorted(self.waiting):
            rows = self.waiting.pop(layer)
            if len(rows) > beyond:
                self.waiting[layer] = rows[: len(rows) - beyond]
            beyond -= min(beyond, len(rows))
        self.length = length
        del self._names[length // BLOCK :]

    def fork(self) -> PagedSequence:
        """Another text that shares everything stored so far."""
        other = PagedSequence(self.pool)
        other.length = self.length
        other.waiting = dict(self.waiting)
        other._names = list(self._names)
        other._first = list(self._first)
        for number, table in enumerate(self.tables):
            other.tables[number] = table[: blocks_of(self.length)]
            for block in other.tables[number]:
                if block != GONE:
                    self.pool._share(number, block)
        return other

    def free(self) -> None:
        """Give every block back; the text is empty then and may be used again."""
        for number, table in enumerate(self.tables):
            for block in reversed(table):  # of what is findable, the ends go first when room is needed
                if block != GONE:
                    self.pool._release(number, block)
            table.clear()
        self.length = 0
        self.waiting.clear()
        self._names.clear()
        self._first = [0] * len(self.tables)

    def _adopt(self, nodes: Sequence[_Node]) -> None:
        """Hold the blocks of ``nodes``, which the caller found to be enough."""
        self.length = len(nodes) * BLOCK
        self._names = [node.name for node in nodes]
        for number, group in enumerate(self.pool._groups):
            needed = set(_needed(group.policy, len(nodes)))
            self._first[number] = group.policy.kept(self.length)[1]
            for place, node in enumerate(nodes):
                block = node.blocks[number] if place in needed else GONE
                if block != GONE:
                    self.pool._share(number, block)
                self.tables[number].append(block)
