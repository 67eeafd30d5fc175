"""One signal of a global operator over shards in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from puna.data.curate.duplicates.in_memory import over_batches
from puna.data.curate.texts import Texts


def signal(name: str, shards: Sequence[Sequence[str]], of: str, **settings: Any) -> NDArray[numpy.float64]:
    """One signal of all documents of all shards."""
    told = over_batches(name, (Texts(shard) for shard in shards), **settings)
    values = [resolved.signals[of] for resolved in told]
    return numpy.concatenate([numpy.asarray(value) for value in values])
