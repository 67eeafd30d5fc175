"""One kind of line end: the plainest mapper, and the example of one."""

from __future__ import annotations

from puna.data.curate.operator import Mapped, NoSettings, mapper
from puna.data.curate.texts import Texts


@mapper(
    "text.newlines",
    signals={"replaced": "line ends that were written otherwise"},
    source="Unicode Standard, section 5.8",
)
def newlines(texts: Texts, settings: NoSettings) -> Mapped:
    r"""Line ends written ``\r\n`` or ``\r`` become ``\n``."""
    replaced = [text.count("\r") for text in texts.texts]
    changed = [
        text.replace("\r\n", "\n").replace("\r", "\n") if count else None
        for text, count in zip(texts.texts, replaced, strict=True)
    ]
    return Mapped(changed, {"replaced": replaced})
