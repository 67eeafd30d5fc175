"""The decode engine: batches of prompts through one model with a key-value cache.

Small and exact. Prompts of similar length run together, left-padded, each row attending to its own
tokens only, so a text is the same alone and in any batch. What changes the result of a request is
its prompt, the settings, and its index among the prompts (the index picks its generator).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.progress import Track
from puna.decode.pieces import TextPieces
from puna.decode.sampling import Sampling, choose
from puna.model.cache import KeyValueCache
from puna.model.rope import depends_on_length
from puna.text.encode import encode_prompt

if TYPE_CHECKING:
    from puna.model.llama import Llama

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt.

    ``ids`` are all produced tokens, the stop token included; ``text`` is without stop token and cut
    before a stop string. ``logprobs`` (natural logarithms, one per id) only if they were asked for.
    """

    text: str
    ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: list[float] | None = None


class Engine:
    """Generates text with a model that has a tokenizer.

    ``max_batch_tokens`` bounds rows x (longest prompt + tokens to come) of a group of prompts and
    with it the cache's memory; a single longer prompt still runs, alone. The model is put into
    evaluation mode.
    """

    def __init__(self, model: Llama, *, max_batch_tokens: int = 8192) -> None:
        if model.tokenizer is None:
            raise PunaError("the model has no tokenizer", where=model.source, fix="open it with puna.load")
        if max_batch_tokens < 1:
            raise PunaError("max_batch_tokens is out of range", found=max_batch_tokens, expected="at least 1")
        self.model = model.eval()
        self.tokenizer = model.tokenizer
        self.max_batch_tokens = max_batch_tokens

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        A string gets the tokenizer's start token where the tokenizer adds one; messages are rendered
        by the chat template up to where the assistant answers; a list of ids is taken as it is.
        """
        if isinstance(prompt, str):
            start = [self.tokenizer.bos_id] if self.tokenizer.adds_bos else []
            ids = [*start, *self.tokenizer.encode(prompt)]
        elif prompt and isinstance(prompt[0], Mapping):
            ids = self._encode_messages(prompt)  # type: ignore[arg-type]
        else:
            ids = [int(token) for token in prompt]  # type: ignore[arg-type]
            wrong = [token for token in ids if not 0 <= token < self.model.spec.vocab_size]
            if wrong:
                raise PunaError(
                    "a prompt has ids outside the vocabulary",
                    found=wrong[:5],
                    expected=f"0 to {self.model.spec.vocab_size - 1}",
                )
        if not ids:
            raise PunaError(
                "an empty prompt has no token to continue from", fix="give at least one character"
            )
        return ids

    def _encode_messages(self, messages: Sequence[Message]) -> list[int]:
        if self.model.template is None:
            raise PunaError(
                "the model has no chat template, so messages cannot be rendered",
                where=self.model.source,
                fix="give a string, or a model with a chat template",
            )
        return encode_prompt(self.tokenizer, self.model.template, messages)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling | None = None) -> list[Completion]:
        """Complete each prompt; the results are in the order of the prompts.

        Raises :class:`PunaError` for a prompt that is empty or does not fit the context. Where
        prompt and ``max_tokens`` together do not fit, generation ends at the context with "length".
        """
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], Mapping | int)):
            raise PunaError("generate takes a list of prompts", found="one prompt", fix="put it into a list")
        requests = [
            self._request(index, prompt, sampling or Sampling()) for index, prompt in enumerate(prompts)
        ]
        groups = self._groups(requests)
        with Track("generating", len(requests), "prompts") as track:
            for group in groups:
                for _ in self._steps(group):
                    pass
                track.advance(len(group))
        return [request.completion() for request in requests]

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[str]:
        """Yield the completion's text piece by piece; joined, the pieces are ``generate``'s text."""
        for pieces in self._steps([self._request(0, prompt, sampling or Sampling())]):
            if pieces[0]:
                yield pieces[0]

    def _request(self, index: int, prompt: Prompt, sampling: Sampling) -> _Request:
        ids = self.encode(prompt)
        room = self.model.spec.max_positions - len(ids)
        if room < 1:
            raise PunaError(
                "the prompt does not fit the model's context",
                where=f"prompt {index}",
                found=f"{len(ids)} tokens",
                expected=f"at most {self.model.spec.max_positions - 1}, so that one can follow",
                fix="shorten the prompt or use a model with a longer context",
            )
        return _Request(index, ids, min(sampling.max_tokens, room), sampling, self.tokenizer)

    def _groups(self, requests: list[_Request]) -> list[list[_Request]]:
        """Requests of similar size together, each group within ``max_batch_tokens``, the largest first."""
        if any(depends_on_length(block.rope) for block in self.model.spec.blocks):
            return [[request] for request in requests]  # such rotations follow the longest row of a batch
        groups: list[list[_Request]] = []
        for request in sorted(
            requests, key=lambda request: (-len(request.prompt), -request.limit, request.index)
        ):
            group = [*groups[-1], request] if groups else []
            if group and len(group) * _extent(group) <= self.max_batch_tokens:
                groups[-1] = group
            else:
                groups.append([request])
        return groups

    @torch.inference_mode()
    def _steps(self, group: list[_Request]) -> Iterator[list[str]]:
        """Run a group to its end; yields each step's new text of every request."""
        model = self.model
        cache = KeyValueCache(model.spec, len(group), _extent(group), dtype=model.dtype, device=model.device)
        input_ids, segments = _left_padded(group, model.device)
        hidden = model.hidden(input_ids, segments=segments, cache=cache)
        while True:
            logits = model.logits(hidden[:, -1:])[:, 0]  # [rows, vocab]
            yield [request.take(row) for request, row in zip(group, logits, strict=True)]
            if all(request.finish_reason for request in group):
                return
            # A finished row runs along with its last token; nobody reads what it produces.
            last = torch.tensor([request.ids[-1:] for request in group], device=model.device)
            hidden = model.hidden(last, cache=cache)


class _Request:
    """One prompt on its way: what was produced so far and why it ended."""

    def __init__(self, index: int, prompt: list[int], limit: int, sampling: Sampling, tokenizer: Any) -> None:
        self.index = index
        self.prompt = prompt
        self.limit = limit
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._sampling = sampling
        self._generator = sampling.generator(index)
        self._stop_ids = () if sampling.ignore_eos else tokenizer.stop_ids
        self._pieces = TextPieces(tokenizer.decode, sampling.stop)
        self._text: list[str] = []
        self._logprobs: list[float] = []

    def take(self, logits: Tensor) -> str:
        """Choose the next token from ``logits`` ``[vocab]``; returns the text that became certain."""
        if self.finish_reason:
            return ""
        token = choose(logits, self._sampling, self._generator)
        self.ids.append(token)
        if self._sampling.logprobs:
            self._logprobs.append(float(logits[token] - logits.logsumexp(0)))
        text = ""
        if token in self._stop_ids:
            self.finish_reason = "stop"
        else:
            text = self._pieces.push(token)
            if not self._pieces.stopped and len(self.ids) == self.limit:
                self.finish_reason = "length"
        if self.finish_reason:
            text += self._pieces.finish()
        if self._pieces.stopped:
            self.finish_reason = "stop"
        self._text.append(text)
        return text

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        return Completion(
            text="".join(self._text),
            ids=self.ids,
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.prompt),
            logprobs=self._logprobs if self._sampling.logprobs else None,
        )


def _extent(group: list[_Request]) -> int:
    """Positions a row of the group's cache needs at most."""
    return max(len(request.prompt) for request in group) + max(request.limit for request in group)


def _left_padded(group: list[_Request], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ids and segments ``[rows, longest prompt]``, -1 at padding; no segments where nothing is padded."""
    longest = max(len(request.prompt) for request in group)
    input_ids = torch.zeros(len(group), longest, dtype=torch.int64)
    segments = torch.full_like(input_ids, -1)
    for row, request in enumerate(group):
        start = longest - len(request.prompt)
        input_ids[row, start:] = torch.tensor(request.prompt)
        segments[row, start:] = 0
    return input_ids.to(device), segments.to(device) if bool((segments < 0).any()) else None
