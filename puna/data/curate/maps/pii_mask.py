"""Personal data is masked: each address or number becomes a mark that names its kind."""

from __future__ import annotations

import numpy
import pydantic

from puna.core.stage import Parameters
from puna.data.curate.operator import Mapped, mapper
from puna.data.curate.pii import KINDS, Kind, find
from puna.data.curate.texts import Texts


class MaskSettings(Parameters):
    """What is masked, and how."""

    kinds: list[Kind] = list(KINDS)  # noqa: RUF012  (pydantic copies defaults)
    """email, iban, card, ip, phone, mac, key."""
    mark: str = pydantic.Field("<{kind}>", pattern=r"^[^@:+\d]*$")
    """What is put there; {kind} becomes the kind. Without @ : + and digits, so that it is none itself."""


@mapper(
    "pii.mask",
    settings=MaskSettings,
    signals={"masked": "addresses and numbers masked"},
    version=2,
    source="ISO 13616 and ISO 7064 (accounts), ISO/IEC 7812 (cards)",
)
def mask(texts: Texts, settings: MaskSettings) -> Mapped:
    """Puts marks in the places of addresses (e-mail, IP, MAC), account, card and telephone numbers, keys."""
    kinds = tuple(settings.kinds)
    changed: list[str | None] = [None] * texts.count
    counts = numpy.zeros(texts.count)
    for place, text in enumerate(texts.texts):
        # What overlapped something masked may show only then.
        while found := find(text, kinds):
            text = _masked(text, found, settings.mark)
            changed[place] = text
            counts[place] += len(found)
    return Mapped(changed, {"masked": counts})


def _masked(text: str, found: list[tuple[int, int, Kind]], mark: str) -> str:
    parts, done = [], 0
    for start, end, kind in found:
        parts += [text[done:start], mark.replace("{kind}", kind)]
        done = end
    return "".join([*parts, text[done:]])
