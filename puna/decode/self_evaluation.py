"""A model's judgement of its own answer: would starting over be better?

System S25, capability-aware self-evaluation (Manvi and others 2024, arXiv:2410.02725). Behind a whole
answer or a part of one stands a fixed question of the user's; the score is the probability of "no" among
those of "no" and "yes", of the token that the model would answer with. A model learns to answer it
from its own samples: an answer wins or ties against another of the same prompt, or it does not.

The score comes from a forked lane: the question is read beside the answer, which can go on as if it
had never been asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from puna.core.errors import PunaError
from puna.text.encode import encode_prompt

if TYPE_CHECKING:
    from torch import Tensor

    from puna.decode.lane import Lane, Steps
    from puna.model.llama import Llama

QUESTION = "Would starting over give a better answer?"
BETTER, NOT_BETTER = "Yes", "No"
_PROBE = "x"


def suffix_of(model: Llama, question: str = QUESTION) -> tuple[int, ...]:
    """The tokens that stand between an answer, whole or not, and the verdict on it.

    They end the assistant's turn, ask ``question`` and begin the next turn, as the chat template has it.
    """
    if model.tokenizer is None or model.template is None:
        raise PunaError("self-evaluation needs a chat template", where=model.source)
    opening = [{"role": "user", "content": _PROBE}]
    turns = [{"role": "assistant", "content": _PROBE}, {"role": "user", "content": question}]
    before = [
        *encode_prompt(model.tokenizer, model.template, opening),
        *model.tokenizer.encode_continuation(_PROBE),
    ]
    whole = encode_prompt(model.tokenizer, model.template, opening + turns)
    if whole[: len(before)] != before:
        raise PunaError(
            "the chat template writes an answer otherwise once another turn follows, so it cannot be judged",
            where=model.source,
        )
    return tuple(whole[len(before) :])


def verdict_ids(model: Llama) -> tuple[int, int]:
    """The first tokens of "Yes" and of "No", as the assistant's turn begins with them."""
    assert model.tokenizer is not None
    yes, no = (model.tokenizer.encode_continuation(word)[0] for word in (BETTER, NOT_BETTER))
    if yes == no:
        raise PunaError("the tokenizer begins Yes and No with the same token", where=model.source, found=yes)
    return yes, no


def score_of(logits: Tensor, yes: int, no: int) -> float:
    """P(no) / (P(no) + P(yes)) of raw ``logits`` [vocab], whatever else the model might say."""
    return float(torch.sigmoid(logits[no].double() - logits[yes].double()))


@dataclass(frozen=True)
class SelfEvaluation:
    """Scores what a lane has read: 1 where the model would not start over."""

    suffix: tuple[int, ...]
    yes: int
    no: int

    @classmethod
    def of(cls, model: Llama, question: str = QUESTION) -> SelfEvaluation:
        """The scorer for a model, by its tokenizer and chat template."""
        return cls(suffix_of(model, question), *verdict_ids(model))

    def score(self, lane: Lane, ids: Sequence[int]) -> Steps[float]:
        """Score the text ``ids``; reads, on a fork, what the lane lacks of it and the question."""
        fork = lane.fork()
        result = yield from fork.catch_up([*ids, *self.suffix])
        fork.free()
        return score_of(result.logits[-1], self.yes, self.no)


def wins_or_ties(reward: float, other: float, epsilon: float = 0.0) -> bool:
    """Whether an answer is as good as another of its prompt; ties count, or easy prompts look hard."""
    return reward >= other - epsilon


def judged(messages: Sequence[Mapping[str, Any]], answer: str, better: bool) -> list[dict[str, str]]:
    """A conversation to learn from: prompt, (partial) answer, the question, and the right verdict."""
    return [
        *({"role": str(m["role"]), "content": str(m["content"])} for m in messages),
        {"role": "assistant", "content": answer},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": BETTER if better else NOT_BETTER},
    ]
