"""Every rejection verifier against its own law, exactly; the lossless ones against the target's.

A verifier that comes to the code must come to ``VERIFIERS``, or a test here fails; if it calls itself
lossless it faces the distribution tests without further ado.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.seeds import torch_generator
from puna.decode.goodness import chi_square
from puna.decode.heads import Head, HeadSpec
from puna.decode.protocols import Draft
from puna.decode.sampling import Law, Sampling, make_law
from puna.decode.verifiers import (
    ExactVerifier,
    RejectionVerifier,
    ShiftedVerifier,
    TopVerifier,
    UnionVerifier,
    emitted,
)

VERIFIERS: dict[str, Callable[[], RejectionVerifier]] = {
    "exact": ExactVerifier,
    "shifted by nothing": lambda: ShiftedVerifier(eta=0.0),
    "shifted by nothing, released residual": lambda: ShiftedVerifier(eta=0.0, residual_mode="released"),
    "shifted": lambda: ShiftedVerifier(eta=10.0),
    "shifted, released residual": lambda: ShiftedVerifier(eta=10.0, residual_mode="released"),
    "a judge that is never asked": lambda: UnionVerifier(Head(HeadSpec(4)), threshold=1.0),
    "a judge": lambda: UnionVerifier(Head(HeadSpec(4)), threshold=0.5),
    "among the likeliest": lambda: TopVerifier(2),
}
LOSSLESS = [name for name, make in VERIFIERS.items() if make().lossless]
VOCABULARY = 7
DRAWS = 4000


def kinds(base: type[RejectionVerifier] = RejectionVerifier) -> Iterator[type[RejectionVerifier]]:
    for kind in base.__subclasses__():
        yield kind
        yield from kinds(kind)


def test_no_verifier_is_left_out() -> None:
    assert {type(make()) for make in VERIFIERS.values()} == set(kinds())
    assert LOSSLESS == [
        "exact",
        "shifted by nothing",
        "shifted by nothing, released residual",
        "a judge that is never asked",
    ]


def law(logits: list[float]) -> Law:
    return make_law(torch.tensor(logits), Sampling(temperature=1.0))


logits = st.lists(
    st.one_of(st.floats(-8, 8, width=32), st.just(-200.0)), min_size=VOCABULARY, max_size=VOCABULARY
)


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=60, deadline=None)
@given(wanted=logits, given_=logits)
def test_a_lossless_verifier_emits_the_law_of_the_target(
    name: str, wanted: list[float], given_: list[float]
) -> None:
    target, draft = law(wanted), law(given_)
    found = emitted(VERIFIERS[name](), target, draft)
    assert float((found - target.probabilities).abs().max()) < 1e-9


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize(("wanted", "given_"), [(3, 3), (3, 5)])
def test_a_lossless_verifier_emits_what_a_greedy_target_would(name: str, wanted: int, given_: int) -> None:
    target, draft = Law.certain(wanted, VOCABULARY), Law.certain(given_, VOCABULARY)
    assert emitted(VERIFIERS[name](), target, draft).argmax() == wanted
    assert float(emitted(VERIFIERS[name](), target, draft)[wanted]) == 1.0


@settings(max_examples=60, deadline=None)
@given(wanted=logits, given_=logits, eta=st.floats(0, 50))
def test_the_exact_residual_of_a_shift_emits_the_shifted_law(
    wanted: list[float], given_: list[float], eta: float
) -> None:
    verifier = ShiftedVerifier(eta=eta)
    target, draft = law(wanted), law(given_)
    found = emitted(verifier, target, draft)
    assert float((found - verifier.shifted(target, draft)).abs().max()) < 1e-9


def test_the_released_residual_of_a_shift_emits_neither_law() -> None:
    generator = torch_generator(0, "laws")
    apart = []
    for _ in range(50):
        target, draft = (law(torch.randn(VOCABULARY, generator=generator).tolist()) for _ in range(2))
        verifier = ShiftedVerifier(eta=10.0, residual_mode="released")
        found = emitted(verifier, target, draft)
        others = (target.probabilities, verifier.shifted(target, draft))
        apart.append([float((found - other).abs().sum() / 2) for other in others])
    to_target, to_shifted = torch.tensor(apart).mean(0).tolist()
    assert to_target > 0.1 and to_shifted > 0.1


@dataclass
class Text:
    """What a verifier looks at of a request."""

    random: torch.Generator
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0))
    ids: list[int] = field(default_factory=list)
    stop_ids: frozenset[int] = frozenset()

    def law(self, logits: torch.Tensor, ids: Any = None) -> Law:
        return make_law(logits, self.sampling)


@dataclass
class Read:
    """What reading a draft of one token gave."""

    logits: torch.Tensor
    hidden: torch.Tensor


@pytest.mark.parametrize("name", VERIFIERS)
def test_what_is_drawn_follows_the_law_that_is_told(name: str) -> None:
    """``verify`` itself, a draft of one token: what it emits first, and what follows where that stands."""
    if name in ("a judge", "among the likeliest"):
        pytest.skip("what stands without chance is in no law")
    generator = torch_generator(1, name)
    verifier = VERIFIERS[name]()
    rows = torch.randn(2, VOCABULARY, generator=generator)
    target, after = (make_law(row, Sampling(temperature=1.0)) for row in rows)
    draft_law = law((0.5 * rows[0] + torch.randn(VOCABULARY, generator=generator)).tolist())
    request: Any = Text(generator)
    read: Any = Read(rows, torch.zeros(2, 4))
    first, second = torch.zeros(VOCABULARY), torch.zeros(VOCABULARY)
    for _ in range(DRAWS):
        token = draft_law.draw(generator)
        verdict = verifier.verify(request, Draft([token], [draft_law]), read)
        first[token if verdict.kept else verdict.next_token] += 1
        if verdict.kept:
            second[verdict.next_token] += 1
    assert chi_square(first, emitted(verifier, target, draft_law))[1] > 0.001
    assert chi_square(second, after.probabilities)[1] > 0.001


def test_a_judge_keeps_what_it_finds_right_and_is_not_asked_about_the_end() -> None:
    judge = Head(HeadSpec(4))
    with torch.no_grad():
        judge.last.weight.zero_()
        judge.last.bias.fill_(2.0)
    request: Any = Text(torch_generator(0, "x"), Sampling(), stop_ids=frozenset({2}))
    logits = torch.zeros(3, VOCABULARY)
    logits[:, 6] = 5.0  # the target would say 6 throughout
    read: Any = Read(logits, torch.zeros(3, 4))
    certain = [Law.certain(token, VOCABULARY) for token in range(VOCABULARY)]

    def kept(verifier: RejectionVerifier, *tokens: int) -> int:
        return verifier.verify(request, Draft(list(tokens), [certain[token] for token in tokens]), read).kept

    assert kept(UnionVerifier(judge, 0.5), 1, 4) == 2
    assert kept(UnionVerifier(judge, 0.95), 1, 4) == 0
    assert kept(UnionVerifier(judge, 0.0), 1, 2) == 1  # the text does not end because a judge likes it
    assert kept(UnionVerifier(judge, 1.0), 6, 4) == 1
    assert kept(TopVerifier(1), 6, 4) == 1
    logits[0, 1] = 4.0
    logits[1, 3] = 4.0
    assert kept(TopVerifier(2), 1, 4) == 1
