"""A run under ``torchrun``: the first process keeps the books, the others join in where a stage wants them.

Processes talk through the store that ``torchrun`` keeps; a run folder must be visible to all of them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Literal

Word = Literal["join", "done"]
_LONGEST_STAGE = timedelta(days=90)
# Runs of this process so far. Every process counts alike: no run takes the words of another for its own.
_runs = itertools.count()


def is_first() -> bool:
    """Whether this process keeps the books: it is alone, or the first of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes of a run, joined for the length of the block: stages find the group ready."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(None)
        return
    import torch.distributed

    from puna.train.distributed import world

    with world(device):
        store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=is_first() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            multi_tenant=True,
            wait_for_workers=False,
            timeout=_LONGEST_STAGE,
        )
        start = f"puna/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_runs)}"
        yield Processes(torch.distributed.PrefixStore(start, store))  # type: ignore[attr-defined]


class Processes:
    """Tells the other processes what happens to a stage, and hears it; alone it does nothing."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._joined: set[str] = set()

    def tell(self, stage: str, word: Word) -> None:
        """Tell the others, as the first process: ``join`` the stage now, or it is ``done``."""
        if self._store is None:
            return
        if word == "join":
            self._joined.add(stage)
        if word == "join" or stage not in self._joined:
            self._store.set(f"{stage}/first", word)
        if word == "done":
            self._store.set(f"{stage}/done", word)

    def hear(self, stage: str) -> Word:
        """Wait for the first word about a stage."""
        word = self._store.get(f"{stage}/first").decode()
        return "join" if word == "join" else "done"

    def wait(self, stage: str) -> None:
        """Wait until a stage is done."""
        self._store.wait([f"{stage}/done"], _LONGEST_STAGE)
