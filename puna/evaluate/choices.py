"""Choosing among given answers by their likelihood, in place of reading what a model writes.

System S71 (arXiv:2308.16361) reads written answers, which small models often get wrong in form. Here each
choice is scored as what the assistant would say next: the sum of the log probabilities of its tokens.
Choices of several tokens are read side by side on forks of what has been read. Prompts that begin alike,
such as those with the same examples, share what is stored of their beginning.

A slot is a place for one answer. A prompt with several questions has a slot for each: what stands before
it (its number) is read, its choices are scored, the best one is taken as said, and the next one follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from puna.core.progress import Track
from puna.decode.lane import together
from puna.decode.sampling import Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from puna.decode.engine import Engine, Prompt
    from puna.decode.lane import Lane, Steps
    from puna.decode.request import Running


@dataclass(frozen=True)
class Slot:
    """A place for an answer: the text before it, the choices, and what is taken off each one's score.

    ``offsets`` are in nats, none for no calibration. One that stands ``alone`` is read as if nothing had been
    said in the slots before it.
    """

    lead: str
    choices: tuple[str, ...]
    offsets: tuple[float, ...] = ()
    alone: bool = False


class ChoiceScoring:
    """A decoding method that produces no text: ``scores`` are those of each slot's choices.

    Log probabilities of whole choices in nats, before the offsets; ``said`` is the best of each slot after
    them.
    """

    name: ClassVar[str] = "choices"
    lossless: ClassVar[bool] = True

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = list(slots)
        self.scores: list[list[float]] = []
        self.said: list[int] = []
        self.tokens = 0  # of the choices, and of what stands before those alone

    def run(self, request: Running) -> Steps[None]:
        """Read the prompt, then score and fill slot after slot."""
        for place, slot in enumerate(self.slots):
            before = self._so_far(place)
            read = [*request.prompt, *_encode(request, before)]
            result = yield from request.lane.catch_up(read)
            logs = result.logits[-1].float().log_softmax(-1)  # [vocab], of the token after what was read
            wholes = [[*request.prompt, *_encode(request, before + choice)] for choice in slot.choices]
            scores = yield from together(*[_score(request.lane, read, whole, logs) for whole in wholes])
            offsets = slot.offsets or (0.0,) * len(scores)
            self.tokens += sum(len(whole) - len(read) for whole in wholes)
            self.tokens += len(read) - len(request.prompt) if slot.alone else 0
            self.scores.append(scores)
            self.said.append(max(range(len(scores)), key=lambda index: scores[index] - offsets[index]))
        request.end()

    def _so_far(self, place: int) -> str:
        """What the assistant has said before the answer of slot ``place``."""
        if self.slots[place].alone:
            return self.slots[place].lead
        lines = [slot.lead + slot.choices[said] for slot, said in zip(self.slots, self.said, strict=False)]
        return "\n".join([*lines, self.slots[place].lead])


def _encode(request: Running, text: str) -> list[int]:
    return list(request.tokenizer.encode_continuation(text)) if text else []


def _score(lane: Lane, read: Sequence[int], whole: Sequence[int], logs: Tensor) -> Steps[float]:
    """The log probability of what ``whole`` has beyond ``read``; ``logs`` [vocab] are those behind ``read``.

    Where a choice's first letters join the last token before it, that token is part of the choice.
    """
    import torch

    shared = next(
        (place for place, (one, other) in enumerate(zip(read, whole, strict=False)) if one != other),
        len(read),
    )
    tail = whole[shared:]
    total = 0.0
    if shared == len(read):
        total, tail = float(logs[tail[0]]), tail[1:]
    if tail:
        fork = lane.fork()
        result = yield from fork.catch_up(whole[:-1], outputs=len(tail))
        behind = result.logits.float().log_softmax(-1)  # [tail, vocab]
        total += float(behind.gather(1, torch.tensor(tail, device=behind.device)[:, None]).sum())
        fork.free()
    return total


def score(
    engine: Engine, prompts: Sequence[Prompt], slots: Sequence[Sequence[Slot]]
) -> list[tuple[int, ChoiceScoring]]:
    """For each prompt its length in tokens, and its slots scored and filled; prompts are read together."""
    methods = [ChoiceScoring(each) for each in slots]
    tickets = [
        engine.submit(prompt, Sampling(max_tokens=1), method)
        for prompt, method in zip(prompts, methods, strict=True)
    ]
    found = []
    with Track("scoring choices", len(prompts), "prompts") as track:
        for ticket, method in zip(tickets, methods, strict=True):
            for _ in ticket.events():
                pass
            found.append((ticket.completion.prompt_tokens, method))
            track.advance()
    return found
