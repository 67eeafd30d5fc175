"""Plain text out of bytes: the plainest extractor, and the example of one."""

from __future__ import annotations

from puna.core.stage import Parameters
from puna.data.curate.operator import BadDocument, extractor


class PlainSettings(Parameters):
    """How bytes are read as text."""

    encoding: str = "utf-8"
    """Name of the encoding, as Python knows it."""


@extractor("plain.text", media="plain", settings=PlainSettings, source="RFC 3629")
def plain(content: bytes, settings: PlainSettings) -> str:
    """The bytes as text; bytes that are none are a bad document."""
    try:
        return content.decode(settings.encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise BadDocument(f"not {settings.encoding}: {error}") from None
