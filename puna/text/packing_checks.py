"""Whether packing loses nothing: each row's targets are its own tokens, one place on, and each token is
in one row.

System S65 (arXiv:2408.03506) cuts its text into windows of the context's length and one token more, so that
as many targets as the context is long stand in each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from puna.text.encode import IGNORED, Encoded
from puna.text.packing import Mode, Packed, collate, pack

_ROWS_AT_ONCE = 256


def check(encoded: Sequence[Encoded], length: int, mode: Mode = "wrap") -> dict[str, float]:
    """Pack documents as training does and count what is wrong in the rows.

    ``shifted`` are targets that are not the next token of their row; ``missing`` the places whose next token
    is the same document's and is no target; ``lost`` and ``doubled`` tokens of the documents that the rows
    hold too few or too many times. ``cuts`` are tokens at a row's beginning, which nothing predicts.
    """
    packed = pack(list(encoded), length, mode=mode)
    shifted = missing = targets = 0
    for first in range(0, len(packed), _ROWS_AT_ONCE):
        batch = collate(packed[first : first + _ROWS_AT_ONCE], length=length)
        ids, labels = batch.input_ids[:, 1:], batch.labels[:, :-1]
        learnt = labels != IGNORED
        same = (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, 1:] >= 0)
        shifted += int((learnt & (labels != ids)).sum()) + int((learnt & ~same).sum())
        shifted += int((batch.labels[:, -1] != IGNORED).sum())  # nothing follows the last place
        missing += int((same & ~learnt).sum())
        targets += int(learnt.sum())
    lost, doubled = _held(encoded, packed)
    return {
        "rows": float(len(packed)),
        "tokens": float(packed.report.tokens),
        "targets": float(targets),
        "targets_of_a_full_row": float(max(row.targets for row in packed)),
        "shifted": float(shifted),
        "missing": float(missing),
        "lost": float(lost),
        "doubled": float(doubled),
        "cuts": float(packed.report.cuts),
    }


def _held(encoded: Sequence[Encoded], packed: Packed) -> tuple[int, int]:
    """Tokens of the documents that no row holds, and those that more than one place holds."""
    held = {id(document): numpy.zeros(len(document), dtype=numpy.int64) for document in encoded}
    for row in packed:
        for piece in row.slices:
            held[id(piece.document)][piece.start : piece.stop] += 1
    return (
        sum(int((counts == 0).sum()) for counts in held.values()),
        sum(int((counts > 1).sum()) for counts in held.values()),
    )
