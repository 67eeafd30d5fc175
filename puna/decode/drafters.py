"""Who proposes: a model that drafts token by token, by its own prompt if it has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from puna.core.errors import PunaError
from puna.decode.protocols import Draft

if TYPE_CHECKING:
    from puna.decode.lane import Lane, Steps
    from puna.decode.protocols import Stopper
    from puna.decode.request import Running
    from puna.decode.short_head import ShortHead
    from puna.model.llama import Llama


class ModelDrafter:
    """Drafts with a lane of its own; one for each request.

    Each token is drawn from the law that the request's sampling makes of the drafter's logits, as the
    target's is. ``prompt`` is what the drafter has read before the text (None: the request's prompt);
    ``stopper`` may end a draft before its limit; ``head`` proposes some tokens alone. A token that ends
    the text ends the draft.
    """

    def __init__(
        self,
        lane: Lane,
        *,
        prompt: Sequence[int] | None = None,
        stopper: Stopper | None = None,
        head: ShortHead | None = None,
    ) -> None:
        self.lane = lane
        self.stopper = stopper
        self.head = head
        self._prompt = prompt

    def propose(self, request: Running, limit: int) -> Steps[Draft]:
        """At most ``limit`` tokens behind what was produced; none where the drafter's context is full."""
        draft = Draft()
        before = [*(request.prompt if self._prompt is None else self._prompt), *request.ids]
        limit = min(limit, self.lane.stepper.spec.max_positions - len(before))
        if limit < 1:
            return draft
        result = yield from self.lane.catch_up(before)
        while True:
            logits = result.logits[-1] if self.head is None else self.head.logits(result.hidden[-1:])[0]
            law = request.law(logits, [*request.ids, *draft.tokens])
            token = law.draw(request.random)
            draft.tokens.append(token)
            draft.laws.append(law)
            if len(draft.tokens) >= limit or token in request.stop_ids:
                return draft
            if self.stopper is not None and self.stopper.stop(draft):
                return draft
            result = yield from self.lane.read((token,))
            draft.hidden.append(result.hidden[-1])


def require_same_words(target: Llama, draft: Llama, name: str) -> None:
    """Refuse a drafter whose ids stand for other words than the target's."""
    words = [None if model.tokenizer is None else model.tokenizer.fingerprint for model in (target, draft)]
    if words[0] != words[1] or target.spec.vocab_size != draft.spec.vocab_size:
        raise PunaError(
            "a drafter must share the target's tokenizer",
            where=f"model {name!r}",
            found=f"{draft.spec.vocab_size:,} tokens, tokenizer {words[1]}",
            expected=f"{target.spec.vocab_size:,} tokens, tokenizer {words[0]}",
            fix="cut one out of the target: puna run smollm2-draft shows how",
        )
