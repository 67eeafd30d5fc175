"""What the decoding loop asks of a model: to read some tokens of some texts, in one pass.

A :class:`Stepper` is a decoder laid out for decoding, with the storage of the keys it has read. The
loop knows no more of a model than this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from puna.model.paged import BlockPool, PagedSequence
from puna.model.spec import LlamaSpec

if TYPE_CHECKING:
    from torch import Tensor

    from puna.model.early_exit import EarlyExit


class FeedForwardTurns(Protocol):
    """One read's rows on their way through the layers: which run their feed-forward, which skip it."""

    @property
    def skipped(self) -> int:
        """Feed-forwards skipped so far, by all rows together."""
        ...

    def running(self, layer: int) -> Tensor | None:
        """Which rows run the feed-forward of ``layer``, [rows] bool; None: all of them."""
        ...

    def saw(self, layer: int, rows: Tensor | None, before: Tensor, after: Tensor) -> None:
        """Hidden states before and after the feed-forward of the ``rows`` that ran it, [running, hidden]."""
        ...


class FeedForwardSkip(Protocol):
    """Settings of a rule that skips feed-forwards; equal settings decide alike, row by row."""

    def begin(self, rows: int) -> FeedForwardTurns:
        """Start a pass of ``rows`` tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Read:
    """Tokens of one text to be read in a step.

    Of the last ``outputs`` tokens the final hidden states are returned. ``skip`` leaves out
    feed-forwards, ``exits`` lets the last token leave before the last layer. ``extent`` is the length
    that rotations which depend on the text's length go by; None: the length after this read. ``start``
    is the first token's position, for layers that have read fewer tokens than the first; None: behind
    what is stored.
    """

    sequence: PagedSequence
    ids: Sequence[int]
    outputs: int = 1
    skip: FeedForwardSkip | None = None
    extent: int | None = None
    exits: EarlyExit | None = None
    start: int | None = None

    @property
    def begin(self) -> int:
        """Position of the first token."""
        return self.sequence.length if self.start is None else self.start


class Stepper(Protocol):
    """A decoder that reads texts of any lengths together.

    What a text gets does not depend on the texts beside it, nor on how it was cut into reads: a
    native stepper gives the same bits, the plain one is equal to rounding.
    """

    name: ClassVar[str]
    spec: LlamaSpec
    pool: BlockPool
    weight_bytes: int
    """Bytes of the weights as they are laid out, which a step has to read; a tied head counts once."""
    shared_bytes: int
    """Of these, what another stepper holds: the one that this was made ``like``."""
    skipped: Sequence[int]
    """Of the last step, by read: feed-forwards that were skipped."""
    depths: Sequence[int]
    """Of the last step, by read: the layers that its outputs went through."""
    ready: Sequence[Tensor | None]
    """Of the last step, by read: logits of its outputs, where an exit has asked for them already."""

    def sequence(self) -> PagedSequence:
        """An empty text of this model."""
        ...

    def step(self, reads: Sequence[Read]) -> list[Tensor]:
        """Read in one pass over the layers; gives, per read, final hidden states [outputs, hidden].

        The final norm is applied. Room is reserved, keys are stored, sequences advance. No sequence
        may appear twice. Raises :class:`OutOfBlocks`, with nothing read, if there is no room for all.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [rows, vocab] of hidden states [rows, hidden]."""
        ...
