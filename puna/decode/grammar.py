"""Output that has to fit a JSON schema or a regular expression, through llguidance.

llguidance (microsoft's library, extra ``serve``) follows the grammar byte by byte and says at each
place which tokens may come; here it is only asked, and kept in step with the text.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch

from puna.core.errors import PunaError

if TYPE_CHECKING:
    from torch import Tensor

    from puna.text.tokenizer import Tokenizer

# A small model that may write any white space writes it to the end.
_JSON_OPTIONS = {"whitespace_pattern": r"[ \n]{1,12}"}
_tokenizers: weakref.WeakKeyDictionary[Tokenizer, dict[tuple[int, tuple[int, ...]], Any]] = (
    weakref.WeakKeyDictionary()
)


class Constraint:
    """What may follow the tokens of one text. ``vocab`` is the number of logits of the model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab: int,
        *,
        json_schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
    ) -> None:
        library = _library()
        setting = "json_schema" if regex is None else "regex"
        self._vocab = vocab
        self._stops = list(tokenizer.stop_ids)
        self._taken: list[int] = []
        try:
            if regex is not None:
                grammar = library.LLMatcher.grammar_from_regex(regex)
            else:
                schema = json_schema if isinstance(json_schema, str) else json.dumps(json_schema)
                grammar = library.LLMatcher.grammar_from_json_schema(schema, defaults=_JSON_OPTIONS)
        except ValueError as error:
            raise _refused(setting, error) from None
        words = _words(library, tokenizer, vocab)
        self._matcher = library.LLMatcher(words, grammar, log_level=0)
        if self._matcher.is_error():
            raise _refused(setting, self._matcher.get_error())

    def mask(self, ids: Sequence[int]) -> Tensor | None:
        """Which tokens may follow ``ids``, [vocab] bool, some of them always true.

        None where ``ids`` themselves do not fit: behind a proposal that will be refused.
        """
        common = 0
        for ours, theirs in zip(self._taken, ids, strict=False):
            if ours != theirs:
                break
            common += 1
        if common < len(self._taken):
            self._matcher.rollback(len(self._taken) - common)
            del self._taken[common:]
        new = list(ids[common:])
        if new:
            taken = self._matcher.try_consume_tokens(new)
            self._taken += new[:taken]
            if taken < len(new):
                return None
        allowed = torch.zeros(self._vocab, dtype=torch.bool)
        if self._matcher.is_stopped():
            allowed[self._stops] = True
            return allowed
        packed = numpy.frombuffer(self._matcher.compute_bitmask(), dtype=numpy.uint8)
        bits = torch.from_numpy(numpy.unpackbits(packed, bitorder="little")[: self._vocab])
        allowed[: len(bits)] = bits.bool()
        if self._matcher.is_error():
            raise PunaError("the constraint is too complex to follow", found=self._matcher.get_error())
        return allowed


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise PunaError(
            "constrained output needs the package llguidance", fix="pip install 'puna[serve]'"
        ) from None
    return llguidance


def _words(library: Any, tokenizer: Tokenizer, vocab: int) -> Any:
    """llguidance's view of the vocabulary; making one takes a third of a second for 50,000 tokens."""
    known = _tokenizers.setdefault(tokenizer, {})
    key = (vocab, tokenizer.stop_ids)
    if key not in known:
        known[key] = library.LLTokenizer(
            tokenizer.to_json(), n_vocab=vocab, eos_token=list(tokenizer.stop_ids)
        )
    return known[key]


def _refused(setting: str, reason: object) -> PunaError:
    lines = str(reason).strip().splitlines()
    return PunaError(f"sampling setting {setting!r} cannot be followed", found=lines[0] if lines else reason)
