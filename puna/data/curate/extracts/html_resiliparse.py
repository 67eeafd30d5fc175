"""Text out of HTML pages with resiliparse."""

from __future__ import annotations

from typing import Any

from puna.core.stage import Parameters
from puna.data.curate.operator import BadDocument, extractor


class ResiliparseSettings(Parameters):
    """What of a page is text."""

    main_content: bool = True
    """Leave out what surrounds the page's own content: navigation, footers, forms."""
    links: bool = False
    """Write the targets of links behind their text."""
    list_bullets: bool = True
    """Write bullets and numbers of lists."""
    alt_texts: bool = True
    """Write the descriptions of images."""
    comments: bool = True
    """Keep readers' comments, where ``main_content`` is asked for."""


@extractor(
    "html.resiliparse",
    media="html",
    settings=ResiliparseSettings,
    source="Resiliparse (Bevendorff et al., ECIR 2018), as DataComp-LM uses it, arXiv:2406.11794",
)
def resiliparse(content: bytes, settings: ResiliparseSettings) -> str:
    """The visible text of a page, in the encoding that the page's bytes suggest."""
    html2text, html, encoding = _modules()
    if not content.strip():
        raise BadDocument("an empty page")
    tree = html.HTMLTree.parse_from_bytes(content, encoding.detect_encoding(content, html5_compatible=True))
    text = html2text.extract_plain_text(
        tree,
        main_content=settings.main_content,
        links=settings.links,
        list_bullets=settings.list_bullets,
        alt_texts=settings.alt_texts,
        comments=settings.comments,
    )
    return str(text)


def _modules() -> tuple[Any, Any, Any]:
    try:
        from resiliparse.extract import html2text
        from resiliparse.parse import encoding, html
    except ImportError:
        from puna.data.curate.pages import missing

        raise missing("resiliparse") from None
    return html2text, html, encoding
