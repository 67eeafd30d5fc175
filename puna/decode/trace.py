"""What each produced token cost and where it came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One produced token.

    ``source`` says who chose it: "target", "draft", "small", "large", "base", "nudge". ``entropy``
    is that of the raw logits in bits, if it was asked for or the method needed it. ``accepted``
    says of a proposed token that its verifier took it (True), or of a token that it stands in the
    place of a refused one (False). ``cost`` counts the tokens that all models read since the token
    before, the prompt aside, each weighted by its model's parameters over the target's; None lets
    the engine fill it in.
    """

    token: int
    source: str = "target"
    entropy: float | None = None
    accepted: bool | None = None
    cost: float | None = None
