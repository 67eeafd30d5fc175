"""Greedy samples of several models on the same prompts, to be read side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from puna.decode.engine import Engine, Prompt
from puna.decode.sampling import Sampling

if TYPE_CHECKING:
    from puna.model.llama import Llama

NO_TEMPLATE = "(this model has no chat template)"


def sample(model: Llama, prompts: Sequence[Prompt], max_tokens: int) -> list[str]:
    """Greedy continuations of ``prompts`` in their order; a string is continued, messages are answered.

    Where the model has no chat template, the place of an answer says so.
    """
    texts = [NO_TEMPLATE] * len(prompts)
    possible = [
        index for index, prompt in enumerate(prompts) if isinstance(prompt, str) or model.template is not None
    ]
    completions = Engine(model).generate(
        [prompts[index] for index in possible], Sampling(max_tokens=max_tokens)
    )
    for index, completion in zip(possible, completions, strict=True):
        texts[index] = completion.text
    return texts


def prompt_text(prompt: Prompt) -> str:
    """A prompt as a person reads it: the string, or one ``role: content`` line a message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)  # type: ignore[index]
