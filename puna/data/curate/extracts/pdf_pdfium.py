"""Text out of PDF files with PDFium."""

from __future__ import annotations

import pydantic

from puna.core.stage import Parameters
from puna.data.curate.operator import BadDocument, extractor


class PdfiumSettings(Parameters):
    """How much of a file is read."""

    pages: pydantic.PositiveInt = 2000
    """Most pages that are read; a longer file is a bad document."""


@extractor("pdf.pdfium", media="pdf", settings=PdfiumSettings, source="PDFium, by pypdfium2")
def pdfium(content: bytes, settings: PdfiumSettings) -> str:
    """The text layer of all pages, an empty line between pages; a file without one is a bad document."""
    try:
        import pypdfium2
    except ImportError:
        from puna.data.curate.pages import missing

        raise missing("pypdfium2") from None
    try:
        document = pypdfium2.PdfDocument(content)
    except pypdfium2.PdfiumError as error:
        raise BadDocument(f"not a readable PDF file: {error}") from None
    try:
        if len(document) > settings.pages:
            raise BadDocument(f"{len(document)} pages, more than {settings.pages}")
        texts = [page.get_textpage().get_text_bounded().replace("\r\n", "\n") for page in document]
    except pypdfium2.PdfiumError as error:
        raise BadDocument(f"a page cannot be read: {error}") from None
    finally:
        document.close()
    text = "\n\n".join(texts)
    if not text.strip():
        raise BadDocument("no text layer")
    return text
