"""How the next token is chosen: settings, and the law that they make of a model's logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator

_FIRST_CANDIDATES = 256  # so many of the likeliest are looked at first; the rest only where they matter


@dataclass(frozen=True)
class Sampling:
    """Settings of one generation; the names are those of OpenAI's and vLLM's interfaces.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 switch the filters off.
    ``repetition_penalty`` divides (or, below zero, multiplies) the logits of every token of prompt and
    text; ``presence_penalty`` is taken off those of tokens in the text, ``frequency_penalty`` as often
    as they stand there. ``stop`` are strings (or one string) at which the text is cut, ``stop_ids``
    tokens at which it ends; ``ignore_eos`` runs past the tokenizer's stop tokens to ``max_tokens``.
    With ``logprobs`` each produced token's natural-log probability under the unchanged distribution
    at temperature 1 is kept, and those of so many likeliest tokens where it is a number. ``entropy``
    notes the entropy of the raw logits in the trace. ``n`` texts are made of each prompt.
    ``json_schema`` (a mapping or its JSON) or ``regex`` admits only tokens that keep the text on the
    way to fitting it, and ends it there.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    logprobs: bool | int = False
    entropy: bool = False
    ignore_eos: bool = False
    n: int = 1
    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(
            0 <= self.temperature < math.inf,
            "temperature",
            self.temperature,
            "0 (greedy) or a positive number",
        )
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0 and at most 1 (1 keeps every token)")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (every token) or a positive number of tokens")
        _require(0 <= self.min_p < 1, "min_p", self.min_p, "at least 0 (every token) and below 1")
        _require(
            0 < self.repetition_penalty < math.inf,
            "repetition_penalty",
            self.repetition_penalty,
            "a positive number (1 changes nothing)",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(math.isfinite(value), name, value, "a number (0 changes nothing)")
        _require(all(self.stop), "stop", self.stop, "strings of at least one character")
        _require(all(token >= 0 for token in self.stop_ids), "stop_ids", self.stop_ids, "token ids")
        _require(self.logprobs >= 0, "logprobs", self.logprobs, "true, false or how many alternatives")
        _require(self.n >= 1, "n", self.n, "at least 1")
        _require(
            self.json_schema is None or self.regex is None, "regex", self.regex, "None beside a json_schema"
        )
        _require(
            not (self.constrained and self.ignore_eos), "ignore_eos", True, "False where the text must fit"
        )

    def generator(self, index: int, choice: int = 0) -> torch.Generator:
        """The generator of a request: its draws depend on seed, index and choice alone."""
        purpose = (index,) if choice == 0 else (index, choice)
        return torch_generator(self.seed, "sampling", *purpose)

    @property
    def constrained(self) -> bool:
        """Whether the text has to fit something."""
        return self.json_schema is not None or self.regex is not None

    @property
    def penalised(self) -> bool:
        """Whether the law depends on the tokens before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _require(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise PunaError(f"sampling setting {name!r} is out of range", found=repr(found), expected=expected)


class Law:
    """A distribution over the vocabulary.

    ``kept`` are probabilities (float64, on the CPU) of the tokens ``ids``, or of all tokens in the
    order of their ids where that is None. A greedy law is certain of one token.
    """

    __slots__ = ("_certain", "_dense", "ids", "kept", "vocab")

    def __init__(
        self, vocab: int, kept: Tensor | None, ids: Tensor | None, certain: int | None = None
    ) -> None:
        self.vocab = vocab
        self._certain = certain
        self._dense: Tensor | None = None
        self.kept = torch.ones(1, dtype=torch.float64) if kept is None else kept
        self.ids = ids

    @classmethod
    def certain(cls, token: int, vocab: int) -> Law:
        """All probability on one token."""
        return cls(vocab, None, torch.tensor([token]), token)

    @property
    def probabilities(self) -> Tensor:
        """Float64 [vocab], sum 1."""
        if self.ids is None:
            return self.kept
        if self._dense is None:
            self._dense = torch.zeros(self.vocab, dtype=torch.float64).index_copy_(0, self.ids, self.kept)
        return self._dense

    def draw(self, generator: torch.Generator) -> int:
        """One token, by one uniform number, whatever the vocabulary; none is drawn if the law is certain."""
        if self._certain is not None:
            return self._certain
        place = draw_from(self.kept, generator)
        return place if self.ids is None else int(self.ids[place])


def draw_from(weights: Tensor, generator: torch.Generator) -> int:
    """A place drawn in proportion to ``weights`` (float64, not negative, any sum above 0)."""
    cumulative = weights.cumsum(0)
    uniform = torch.rand((), dtype=torch.float64, generator=generator)
    place = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    return min(place, len(weights) - 1)


def make_law(logits: Tensor, sampling: Sampling) -> Law:
    """The law of raw or :func:`penalised` logits [vocab] (float32) under ``sampling``.

    A token whose logit is minus infinity has no probability; some token must have one.
    Temperature first; then top-k keeps the k likeliest, top-p the shortest run of likeliest tokens
    whose probability reaches it, min-p those of at least that share of the likeliest's probability.
    Ties keep the lower id. What a filter leaves is in falling order of probability.
    """
    if sampling.temperature == 0:
        return Law.certain(int(logits.argmax()), len(logits))
    scaled = logits.cpu().double() / sampling.temperature
    vocab = len(scaled)
    if sampling.top_p == 1 and sampling.min_p == 0 and not 0 < sampling.top_k < vocab:
        return Law(vocab, scaled.softmax(0), None)
    if 0 < sampling.top_k < vocab:
        ordered, ids = _likeliest(scaled, sampling.top_k)
        ordered, ids = ordered[: sampling.top_k], ids[: sampling.top_k]
        probabilities = ordered.softmax(0)
        kept = _run_length(probabilities, sampling)
    else:
        total, count = scaled.logsumexp(0), _FIRST_CANDIDATES
        while True:
            ordered, ids = _likeliest(scaled, min(count, vocab))
            probabilities = (ordered - total).exp()
            kept = _run_length(probabilities, sampling)
            if kept < len(ids) or len(ids) < count:
                break
            count *= 8
    probabilities, ids = probabilities[:kept], ids[:kept]
    return Law(vocab, probabilities / probabilities.sum(), ids)


def _likeliest(scaled: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """At least the ``count`` largest with their ids, in falling order; of equal ones the lower id first."""
    least = scaled.topk(count, sorted=False).values.min()
    ids = (scaled >= least if least > -math.inf else scaled > -math.inf).nonzero()[:, 0]
    ordered, places = scaled[ids].sort(descending=True, stable=True)
    return ordered, ids[places]


def _run_length(probabilities: Tensor, sampling: Sampling) -> int:
    """How many of the falling ``probabilities`` top-p and min-p keep."""
    kept = len(probabilities)
    if sampling.top_p < 1:
        before = probabilities.cumsum(0) - probabilities
        kept = int((before < sampling.top_p).sum())
    if sampling.min_p:
        kept = min(kept, int((probabilities >= sampling.min_p * probabilities[0]).sum()))
    return max(kept, 1)


def penalised(logits: Tensor, sampling: Sampling, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """Logits [vocab] with the penalties for tokens of ``prompt`` and of the text so far, ``ids``."""
    changed = logits.clone()
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *ids}), device=logits.device)
        found = changed[seen]
        factor = sampling.repetition_penalty
        changed[seen] = torch.where(found > 0, found / factor, found * factor)
    if ids and (sampling.presence_penalty or sampling.frequency_penalty):
        tokens, counts = torch.unique(torch.tensor(ids), return_counts=True)
        off = sampling.presence_penalty + sampling.frequency_penalty * counts
        changed[tokens.to(logits.device)] -= off.to(changed.dtype).to(logits.device)
    return changed


def entropy_bits(logits: Tensor) -> float:
    """Entropy in bits of the distribution of raw logits [vocab]."""
    # entr(p) = -p log p, and 0 where p is 0: a grammar leaves tokens at minus infinity.
    return float(torch.special.entr(logits.float().softmax(0)).sum()) / math.log(2)
