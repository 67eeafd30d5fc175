"""Cut whole blocks out of a decoder; what is kept stays as it is.

Every block adds to the stream of hidden states, so a decoder runs without some of them, though worse;
a brief distillation from the whole model makes a small sibling of what is left (as in the layer removal
of ShortGPT, 2403.03853, and the drafts of LayerSkip, 2404.16710). Which blocks to keep is given here,
not searched for.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from puna.core.errors import PunaError
from puna.model.llama import Llama
from puna.model.slicing import sliced
from puna.model.units import Kept


def shorten(model: Llama, kept: Sequence[int]) -> Llama:
    """A decoder of the blocks ``kept``, counted from 0, in their order; all else is the model's.

    The two share their weights. A block that is not there, or a list that does not rise, is an error.
    """
    count = len(model.spec.blocks)
    beyond = [block for block in kept if not 0 <= block < count]
    if not kept or beyond:
        raise PunaError(
            "a block to keep is not one of the model's" if kept else "no block is kept",
            where="blocks",
            found=beyond or "an empty list",
            expected=f"numbers from 0 to {count - 1}",
        )
    if any(later <= earlier for earlier, later in itertools.pairwise(kept)):
        raise PunaError(
            "blocks to keep stand in the model's order, each once", where="blocks", found=list(kept)
        )
    return sliced(model, dataclasses.replace(Kept.everything(model.spec), blocks=tuple(kept)))
