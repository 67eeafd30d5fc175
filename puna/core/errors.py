"""One error type for users' mistakes, told in one message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PunaError(Exception):
    """A mistake in the input, not in puna: the command line prints it without a traceback.

    ``where`` names the file, line or key; ``found`` and ``expected`` what stood there and what
    should have; ``fix`` what to do. Every part is optional but the message.
    """

    def __init__(
        self,
        message: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.message = message
        self.where = where
        self.found = found
        self.expected = expected
        self.fix = fix
        parts = [f"{where}: {message}" if where is not None else message]
        if found is not None:
            parts.append(f"  found:    {found}")
        if expected is not None:
            parts.append(f"  expected: {expected}")
        if fix is not None:
            parts.append(f"  to do:    {fix}")
        super().__init__("\n".join(parts))


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that is spelt most like ``name``, or None if none is close."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return close[0] if close else None


def unknown_name(kind: str, name: str, choices: Iterable[str], *, where: object = None) -> PunaError:
    """The error for a name that is not among ``choices``; it suggests the nearest one."""
    known = sorted(choices)
    close = nearest(name, known)
    return PunaError(
        f"unknown {kind} {name!r}",
        where=where,
        expected=f"one of {', '.join(known)}" if known else f"no {kind} is known here",
        fix=f"did you mean {close!r}?" if close else None,
    )
