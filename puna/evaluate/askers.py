"""Who is asked about tables: puna's engine, or any server of the OpenAI interface for chats.

Both write answers and score choices. A server tells log probabilities of the likeliest first tokens
alone, so there a choice is scored by the likeliest listed token that it begins with, and one question
at a time; a choice that is not listed gets the least probability that is, and where no choice is listed
there is no answer.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from puna.core.errors import PunaError
from puna.core.progress import Track
from puna.data.tables.prompts import Messages
from puna.decode.sampling import Sampling
from puna.evaluate import choices
from puna.evaluate.choices import Slot

if TYPE_CHECKING:
    import httpx

    from puna.decode.engine import Engine

_RETRIES = 4
_LISTED = 20  # alternatives that servers list at most
_AGAIN = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Said:
    """What was said to one prompt: its text, or the scores of each slot's choices and which was taken."""

    prompt_tokens: int
    text: str = ""
    scores: tuple[tuple[float, ...], ...] = ()
    taken: tuple[int, ...] = ()
    choice_tokens: int = 0
    """Tokens of the choices that were scored, and of the leads of slots that stand alone; 0 of a server."""


class Asker(Protocol):
    """A model that can be asked."""

    @property
    def scores_batches(self) -> bool:
        """Whether a prompt may have several slots."""
        ...

    def write(
        self, prompts: Sequence[Messages], max_tokens: Sequence[int], stop: tuple[str, ...] = ()
    ) -> list[Said]:
        """The answer to each prompt, greedily."""
        ...

    def score(self, prompts: Sequence[Messages], slots: Sequence[Sequence[Slot]]) -> list[Said]:
        """The slots of each prompt scored and filled."""
        ...


class EngineAsker:
    """puna's own engine."""

    scores_batches = True

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def write(
        self, prompts: Sequence[Messages], max_tokens: Sequence[int], stop: tuple[str, ...] = ()
    ) -> list[Said]:
        """The answer to each prompt, greedily; all are in the engine at once."""
        tickets = [
            self.engine.submit(prompt, Sampling(max_tokens=tokens, stop=stop))
            for prompt, tokens in zip(prompts, max_tokens, strict=True)
        ]
        found = []
        with Track("asking", len(prompts), "prompts") as track:
            for ticket in tickets:
                for _ in ticket.events():
                    pass
                found.append(Said(ticket.completion.prompt_tokens, ticket.completion.text.strip()))
                track.advance()
        return found

    def score(self, prompts: Sequence[Messages], slots: Sequence[Sequence[Slot]]) -> list[Said]:
        """The slots of each prompt scored and filled."""
        return [
            Said(tokens, "", tuple(map(tuple, method.scores)), tuple(method.said), method.tokens)
            for tokens, method in choices.score(self.engine, prompts, slots)
        ]


class EndpointAsker:
    """A server at ``url`` (with its ``/v1``) that has a ``model``.

    ``key`` names the environment variable that holds the key, if one is needed. ``parallel`` requests go out
    at once. A request that fails for a passing reason is sent again, up to four times. ``client`` stands in
    for the connection, for tests.
    """

    scores_batches = False

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        parallel: int = 4,
        seconds: float = 120.0,
        client: httpx.Client | None = None,
    ) -> None:
        self.model, self.parallel = model, parallel
        self.client = client or _connect(url, key, seconds)

    def write(
        self, prompts: Sequence[Messages], max_tokens: Sequence[int], stop: tuple[str, ...] = ()
    ) -> list[Said]:
        """The answer to each prompt, at temperature 0."""
        more: dict[str, Any] = {"stop": list(stop)} if stop else {}
        bodies = [
            {"messages": prompt, "max_tokens": tokens, **more}
            for prompt, tokens in zip(prompts, max_tokens, strict=True)
        ]
        return [Said(tokens, text.strip()) for tokens, text, _ in self._all(bodies)]

    def score(self, prompts: Sequence[Messages], slots: Sequence[Sequence[Slot]]) -> list[Said]:
        """The choices of each prompt's only slot, by their first tokens."""
        if any(len(each) != 1 or each[0].lead for each in slots):
            raise PunaError(
                "a server scores one question at a time",
                found="several in a prompt, or a reason before the answer",
                fix="batch: 1 without reasons, or answer: written",
            )
        bodies = [
            {"messages": prompt, "max_tokens": 1, "logprobs": True, "top_logprobs": _LISTED}
            for prompt in prompts
        ]
        found = []
        for (tokens, _, listed), (slot,) in zip(self._all(bodies), slots, strict=True):
            scores = _by_first_tokens(listed, slot.choices)
            if scores is None:
                found.append(Said(tokens))
                continue
            offsets = slot.offsets or (0.0,) * len(scores)
            best = max(range(len(scores)), key=lambda index: scores[index] - offsets[index])
            found.append(Said(tokens, "", (tuple(scores),), (best,)))
        return found

    def _all(self, bodies: Sequence[dict[str, Any]]) -> list[tuple[int, str, dict[str, float]]]:
        with (
            ThreadPoolExecutor(self.parallel) as pool,
            Track("asking", len(bodies), "prompts") as track,
        ):
            found = []
            for answer in pool.map(self._one, bodies):
                found.append(answer)
                track.advance()
        return found

    def _one(self, body: dict[str, Any]) -> tuple[int, str, dict[str, float]]:
        answer = self._post({"model": self.model, "temperature": 0, **body})
        try:
            choice = answer["choices"][0]
            tokens, text = int(answer["usage"]["prompt_tokens"]), choice["message"]["content"] or ""
            listed = {}
            if body.get("logprobs"):
                first = choice["logprobs"]["content"][0]
                listed = {str(each["token"]): float(each["logprob"]) for each in first["top_logprobs"]}
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise PunaError(
                "the server's answer lacks a part",
                where=self.client.base_url,
                found=f"{type(error).__name__}: {error}",
                expected="choices with a message, its log probabilities where asked for, and the usage",
                fix="use a server that gives them" + (", or answer: written" if "logprobs" in body else ""),
            ) from None
        return tokens, text, listed

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        import httpx

        said: object = None
        for attempt in range(_RETRIES + 1):
            if attempt:
                time.sleep(min(8.0, 0.5 * 2**attempt))
            try:
                answer = self.client.post("chat/completions", json=body)
            except httpx.HTTPError as error:
                said = f"{type(error).__name__}: {error}"
                continue
            if answer.status_code == 200:
                try:
                    found = answer.json()
                except ValueError:
                    found = None
                if isinstance(found, dict):
                    return found
                said = f"not JSON: {answer.text[:200]!r}"
                break
            said = f"status {answer.status_code}: {answer.text[:300]}"
            if answer.status_code not in _AGAIN:
                break
        raise PunaError("the server did not answer", where=self.client.base_url, found=said)


def _connect(url: str, key: str | None, seconds: float) -> httpx.Client:
    try:
        import httpx
    except ModuleNotFoundError:
        raise PunaError("asking a server needs the package httpx", fix="pip install 'puna[curate]'") from None

    headers = {}
    if key is not None:
        if key not in os.environ:
            raise PunaError(f"the environment holds no {key}", where="endpoint.key", fix=f"export {key}=...")
        headers["Authorization"] = f"Bearer {os.environ[key]}"
    return httpx.Client(base_url=url.rstrip("/") + "/", headers=headers, timeout=seconds)


def _by_first_tokens(listed: dict[str, float], wanted: Sequence[str]) -> list[float] | None:
    """For each choice the log probability of the likeliest listed token that it begins with.

    None if no choice begins with a listed token: then nothing is known of any. Raises where two choices
    begin with one token, which tells nothing about them.
    """
    least = min(listed.values(), default=-math.inf)
    scores, tokens = [], []
    for choice in wanted:
        begins = [token for token in listed if token.strip() and choice.startswith(token.strip())]
        tokens.append(max(begins, key=lambda token: listed[token], default=None))
        scores.append(least if tokens[-1] is None else listed[str(tokens[-1])])
    taken = [token for token in tokens if token is not None]
    if len(set(taken)) < len(taken):
        raise PunaError(
            "two choices begin with one token, so the server's log probabilities do not tell them apart",
            found=", ".join(wanted),
            fix="answer: written, or choices that begin differently",
        )
    return scores if taken else None
