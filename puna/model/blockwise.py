"""A decoder read block by block: the hidden states of many rows between two blocks, and one block at a time.

What calibration needs: a block's inputs are kept, the block is changed, and its outputs are made anew.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from puna.model.attention import lay_out

if TYPE_CHECKING:
    from puna.model.llama import Llama


class _ReachedError(Exception):
    """The module that was waited for got its inputs."""


class Blockwise:
    """Rows of token ids [rows, time] on their way through the blocks, a few at a time.

    ``hidden`` [rows, time, hidden] are the inputs of the block ``layer``, that which comes next, in the
    dtype of the model. With ``dtype`` bfloat16 its products run in that.
    """

    def __init__(
        self, model: Llama, ids: Tensor, *, rows_at_once: int = 4, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model, self.ids, self.rows_at_once = model, ids, rows_at_once
        self.layer = 0
        self.dtype = dtype
        with torch.no_grad():
            self.hidden: Tensor = model.model.embed_tokens(ids)
        time = ids.shape[1]
        self._layout = lay_out(min(rows_at_once, len(ids)), time, ids.device, None, None, None)
        self._rotations = model._rotations(self._layout.positions[:1], self.hidden.dtype)

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """What the next block makes of its inputs; hooks on its modules see them pass."""
        return torch.cat([self._run(part) for part in torch.split(self.hidden, self.rows_at_once)])

    @torch.no_grad()
    def watch(self, last: nn.Module) -> None:
        """Run the next block up to the inputs of its module ``last``, for the hooks that see them pass."""

        def stop(_module: nn.Module, _arguments: tuple[Tensor, ...]) -> None:
            raise _ReachedError

        handle = last.register_forward_pre_hook(stop)
        try:
            for part in torch.split(self.hidden, self.rows_at_once):
                with contextlib.suppress(_ReachedError):
                    self._run(part)
        finally:
            handle.remove()

    def _run(self, part: Tensor) -> Tensor:
        block = self.model.model.layers[self.layer]
        layout = self._layout
        if len(part) != layout.batch:
            layout = lay_out(len(part), part.shape[1], part.device, None, None, None)
        with torch.autocast(part.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return cast(Tensor, block(part, self._rotations, layout, None))

    def advance(self) -> None:
        """Run the next block and go on to the one behind it."""
        self.hidden = self.outputs()
        self.layer += 1
