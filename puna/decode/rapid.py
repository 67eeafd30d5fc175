"""S28 RAPID (arXiv 2502.20330): a drafter that reads retrieved parts in place of a long document.

The prompt holds the document between two marks, ``<Context>`` and ``</Context>`` as in the paper's own
prompts, and the question behind them. The drafter, the target itself or another model, gets the same
prompt with the best chunks alone between the marks, in the order of the document; it has its own
lane, so two prompts, two caches and two counts of positions. The target judges by a law moved towards
the drafter's, which blends in what retrieval found (``verifiers.ShiftedVerifier``).

Simplified: chunks are ranked by BM25 (the released code takes BGE-M3's cosine and BM25 together), so
there is no cut-off by similarity; the drafter's prompt differs in the chunks alone, not in its wording.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.decode.pieces import TextPieces
from puna.decode.request import TARGET
from puna.decode.retrieval import rank, split_tokens
from puna.decode.speculative import DraftSettings, Speculative
from puna.decode.strategy import strategy
from puna.decode.verifiers import ShiftedVerifier

if TYPE_CHECKING:
    from puna.decode.request import Running
    from puna.text.tokenizer import Tokenizer

Retriever = Literal["bm25", "random"]


@dataclass(frozen=True)
class Retrieval:
    """Chunks of at most ``chunk_tokens``, the best ones while they fit into ``budget`` tokens."""

    chunk_tokens: int = 128
    budget: int = 512
    by: Retriever = "bm25"
    begin: str = "<Context>"
    end: str = "</Context>"
    seed: int = 0


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; of a character spread over several, the last one has it."""
    pieces = TextPieces(lambda part: tokenizer.decode(part, skip_special=False))
    found = [pieces.push(token) for token in ids]
    if found:
        found[-1] += pieces.finish()
    return found


def short_prompt(ids: Sequence[int], tokenizer: Tokenizer, settings: Retrieval) -> list[int]:
    """The prompt ``ids`` with retrieved chunks alone between its marks.

    The question is what follows the end mark in the same message. A prompt without the marks is an error.
    """
    texts = token_texts(tokenizer, ids)
    first, last = _between(texts, settings)
    question = _question(ids, texts, tokenizer, last, settings.end)
    chunks = split_tokens(texts[first:last], settings.chunk_tokens)
    if settings.by == "bm25":
        shown = ["".join(texts[first + chunk.start : first + chunk.stop]) for chunk in chunks]
        ordered = [number for _, number in rank(shown, question)]
    else:
        ordered = numpy_generator(settings.seed, "chunks").permutation(len(chunks)).tolist()
    chosen: list[int] = []
    left = settings.budget
    for number in ordered:
        if len(chunks[number]) <= left:
            chosen.append(number)
            left -= len(chunks[number])
        elif settings.by == "bm25":
            break  # a worse chunk does not take the place of a better one
    kept = [first + place for number in sorted(chosen) for place in chunks[number]]
    return [*ids[:first], *(ids[place] for place in kept), *ids[last:]]


def _between(texts: Sequence[str], settings: Retrieval) -> tuple[int, int]:
    """The first token behind the begin mark and the first one that belongs to the end mark."""
    starts: list[int] = []  # in the text, of every token
    length = 0
    for text in texts:
        starts.append(length)
        length += len(text)
    whole = "".join(texts)
    begin = whole.find(settings.begin)
    end = whole.find(settings.end, begin + len(settings.begin)) if begin >= 0 else -1
    if end < 0:
        raise PunaError(
            "the prompt does not say where its long document stands",
            where="strategy 'rapid'",
            expected=f"{settings.begin} before the document and {settings.end} behind it, then the question",
        )
    content = begin + len(settings.begin)
    first = next(place for place, start in enumerate(starts) if start >= content)
    reaching = (place for place, start in enumerate(starts) if start + len(texts[place]) > end)
    return first, max(first, next(reaching))


def _question(ids: Sequence[int], texts: Sequence[str], tokenizer: Tokenizer, last: int, mark: str) -> str:
    """What follows the end mark up to the next special token."""
    special = tokenizer.special_ids
    stop = next((place for place in range(last, len(ids)) if ids[place] in special), len(ids))
    return "".join(texts[last:stop]).partition(mark)[2]


@strategy("rapid")
class RapidSettings(DraftSettings):
    """S28: drafts from retrieved parts of a long document. Lossy unless eta is 0: the law is moved."""

    draft: str = TARGET
    """Name of the model that drafts; "target" drafts for itself, on the short prompt."""
    draft_tokens: int = pydantic.Field(10, ge=1)
    """Tokens of a draft at most."""
    eta: float = pydantic.Field(10.0, ge=0)
    """How far the target's law is moved towards the drafter's; 0 is exact speculative sampling."""
    cutoff: float = pydantic.Field(0.1, ge=0, le=1)
    """Only tokens of at least this share of the drafter's largest probability are moved."""
    residual: Literal["exact", "released"] = "exact"
    """What a rejection draws from: exact follows the moved law, released is the published code's."""
    chunk_tokens: int = pydantic.Field(128, ge=1)
    """Tokens of a chunk at most."""
    budget: int = pydantic.Field(512, ge=1)
    """Tokens of all chunks of the short prompt at most."""
    retriever: Retriever = "bm25"
    """How chunks are chosen; random is the baseline."""
    begin: str = pydantic.Field("<Context>", min_length=1)
    """Stands before the document."""
    end: str = pydantic.Field("</Context>", min_length=1)
    """Stands behind the document."""

    def build(self) -> Speculative:
        """The strategy with these settings."""
        verifier = ShiftedVerifier(self.eta, self.cutoff, self.residual)
        chosen = Retrieval(self.chunk_tokens, self.budget, self.retriever, self.begin, self.end)

        def prompt_for(request: Running) -> list[int]:
            tokenizer: Any = request.tokenizer
            return short_prompt(request.prompt, tokenizer, chosen)

        return Speculative("rapid", self.drafter(prompt_for=prompt_for), verifier, self.draft_tokens)
