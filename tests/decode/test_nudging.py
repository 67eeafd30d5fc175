"""Nudging by scripted voices, exactly; then with models of two vocabularies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.decode.engine import Completion, Engine
from puna.decode.nudging import NudgingSettings, converse, plain_prompt, without_trailing_repeats
from puna.decode.request import Running
from puna.decode.sampling import Sampling
from puna.decode.trace import TraceRow
from puna.decode.voices import LaneVoice, Piece, Written
from puna.text.encode import encode_prompt
from puna.text.template import CHATML, Template
from puna.text.tokenizer import Tokenizer
from tests.decode.decoding_models import speaking
from tests.text.text_samples import CONFIG, train_core

Policy = Callable[[str], tuple[str | None, float]]
"""What follows a text, None to stop, and how likely it is."""


class Scripted:
    """A voice that follows a policy over strings; it never reads anything, so it never yields."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.asked: list[str] = []

    def next(self, text: str) -> Any:
        self.asked.append(text)
        said, probability = self.policy(text)
        return Piece(None if said is None else 0, said or "", probability)
        yield

    def write(self, text: str, tokens: int, *, confidence: float = 0.0, first: Piece | None = None) -> Any:
        pieces: list[Piece] = []
        while True:
            piece = first if first is not None and not pieces else (yield from self.next(text))
            if piece.token is None:
                return Written(pieces, "stop")
            if piece.probability < confidence and piece is not first:
                return Written(pieces, "unsure")
            pieces.append(piece)
            text += piece.text
            if len(pieces) == tokens:
                return Written(pieces, "full")


def recite(said: Sequence[str], probability: float = 1.0, stops: bool = True) -> Policy:
    """Say the pieces one after the other, whoever said those before; then stop."""

    def policy(text: str) -> tuple[str | None, float]:
        place = 0
        while text and place < len(said) and text.startswith(said[place]):
            text = text[len(said[place]) :]
            place += 1
        if place == len(said):
            return (None if stops else " more"), probability
        return said[place][len(text) :] if said[place].startswith(text) else said[place], probability

    return policy


def answer(base: Policy, nudger: Policy, limit: int = 200, **settings: Any) -> list[tuple[str, str]]:
    """Who wrote what; the last row says whether the nudger stopped."""
    written: list[tuple[str, str]] = []

    def write(source: str, pieces: Sequence[Piece]) -> bool:
        written.append((source, "".join(piece.text for piece in pieces)))
        return sum(len(text) for _, text in written) >= limit

    steps = converse(Scripted(base), Scripted(nudger), NudgingSettings(**settings), write)
    with pytest.raises(StopIteration) as end:
        next(steps)
    written.append(("end", str(end.value.value)))
    return written


def text_of(written: list[tuple[str, str]]) -> str:
    return "".join(text for _, text in written[:-1])


NUDGER = recite(["The", " cap", "ital", " of", " France", " is", " Paris", "."])


def test_at_confidence_0_the_first_word_is_forced_and_the_base_does_the_rest() -> None:
    base = recite(["The", " town", " is", " big", ".", "\n"], probability=0.01, stops=False)
    written = answer(base, recite(["The", " cat", *[" x"] * 20]), limit=40, confidence=0.0)
    assert written[0] == ("nudge", "The")
    assert {source for source, _ in written[1:-1]} == {"base"}
    assert text_of(written).startswith("The town is big.\n more more")


def test_above_confidence_1_without_the_prefix_rule_the_text_is_the_nudgers_own() -> None:
    words = ["One", " two", ",", " th", "ree", " four", ".", "\nFi", "ve", " six"] * 5
    written = answer(
        recite(["One", " two", " three"]),
        recite(words),
        confidence=1.1,
        prefix_rule=False,
        limit=10_000,
    )
    assert text_of(written) == "".join(words)
    assert {source for source, _ in written[:-1]} == {"nudge"}
    assert written[-1] == ("end", "True")


@given(
    st.lists(st.sampled_from(["a", " b", "c", " ", "  d", "\n", " e."]), min_size=1, max_size=40),
    st.integers(1, 20),
)
def test_however_long_a_nudge_is_the_nudgers_text_comes_out_whole(words: list[str], tokens: int) -> None:
    def base(text: str) -> tuple[str | None, float]:
        return "z", 0.5

    def nudger(text: str) -> tuple[str | None, float]:
        place = 0
        while text:
            text = text[len(words[place]) :]
            place += 1
        return (words[place], 1.0) if place < len(words) else (None, 1.0)

    written = answer(
        base, nudger, 10_000, confidence=1.1, prefix_rule=False, nudge_tokens=tokens, same_nudges=50
    )
    assert text_of(written) == "".join(words)
    assert written[-1] == ("end", "True")


def test_the_base_resumes_where_its_next_token_begins_the_nudgers_next_word() -> None:
    def base(text: str) -> tuple[str | None, float]:
        if text == "The capital of":
            return " Fr", 0.05  # hardly likely, yet how " France" begins
        return {"The capital of Fr": ("ance!", 0.9)}.get(text, (" what", 0.1))

    written = answer(base, NUDGER, limit=25, nudge_tokens=7)
    assert written[:2] == [("nudge", "The capital of"), ("base", " France!")]
    unruled = answer(base, NUDGER, prefix_rule=False, limit=25, nudge_tokens=7)
    assert ("base", " France!") not in unruled


def test_the_base_resumes_where_it_is_confident_of_another_word() -> None:
    def base(text: str) -> tuple[str | None, float]:
        return {"The capital": (" city", 0.3), "The capital city": (" is", 0.29)}.get(text, (" what", 0.1))

    written = answer(base, NUDGER, limit=12, confidence=0.3, nudge_tokens=7)
    assert written[:2] == [("nudge", "The capital"), ("base", " city")]


def test_if_the_base_never_qualifies_all_words_but_the_last_are_taken() -> None:
    def base(text: str) -> tuple[str | None, float]:
        return " what", 0.1

    written = answer(base, NUDGER, nudge_tokens=4, limit=10_000)
    assert written[:2] == [("nudge", "The capital"), ("nudge", " of France is")]
    assert text_of(written) == "The capital of France is Paris."


def test_a_nudge_of_one_word_is_taken_whole() -> None:
    written = answer(recite(["q"], 0.1), recite(["Super", "cali", "fragi", "listic", " yes"]), nudge_tokens=3)
    assert written[0] == ("nudge", "Supercalifragi")


def test_the_nudger_ends_the_answer_and_the_base_cannot() -> None:
    base = recite(["The"], probability=0.99)  # sure that the answer ends after the first word
    written = answer(base, NUDGER, nudge_tokens=4, limit=10_000)
    assert text_of(written) == "The capital of France is Paris."
    assert written[-1] == ("end", "True")
    assert {source for source, _ in written[:-1]} == {"nudge"}


def test_a_burst_is_cut_at_the_first_token_that_is_not_likely_enough() -> None:
    def base(text: str) -> tuple[str | None, float]:
        likely = {"The": 0.9, "The town": 0.8, "The town is": 0.2}
        said = {"The": " town", "The town": " is", "The town is": " odd"}
        return said.get(text, "?"), likely.get(text, 0.0)

    assert answer(base, NUDGER, limit=12, nudge_tokens=7)[1] == ("base", " town is")


def test_a_base_that_goes_in_circles_hands_back() -> None:
    def base(text: str) -> tuple[str | None, float]:
        return " na", 1.0

    written = answer(base, recite(["Oh", *[f" w{i}" for i in range(30)]]), limit=400, burst_tokens=4)
    assert [source for source, _ in written[:4]] == ["nudge", "base", "nudge", "base"]


def test_without_the_repeat_rule_it_goes_on_in_circles() -> None:
    def base(text: str) -> tuple[str | None, float]:
        return " na", 1.0

    written = answer(
        base, recite(["Oh", *[f" w{i}" for i in range(30)]]), limit=400, burst_tokens=4, repeat_rule=False
    )
    assert {source for source, _ in written[1:-1]} == {"base"}


def test_the_same_nudge_again_and_again_ends_the_answer() -> None:
    def stuck(text: str) -> tuple[str | None, float]:
        return " so", 1.0

    written = answer(lambda text: (" no", 0.0), stuck, nudge_tokens=1, limit=10_000)
    assert written == [("nudge", " so")] * 3 + [("end", "False")]


def test_rounds_and_the_caller_end_the_answer() -> None:
    many = recite([f" w{i}" for i in range(500)])
    assert len(answer(lambda text: (" no", 0.0), many, rounds=7, limit=10_000)) == 7 + 1
    assert len(answer(lambda text: (" no", 0.0), many, limit=1)) == 1 + 1


def test_the_base_is_asked_before_each_later_word_and_never_before_the_first() -> None:
    base = Scripted(lambda text: (" no", 0.0))
    nudger = Scripted(recite(["A", " b", "c", " d", " e"]))
    settings = NudgingSettings(rounds=1, nudge_tokens=5)
    steps = converse(base, nudger, settings, lambda source, pieces: False)
    with pytest.raises(StopIteration):
        next(steps)
    assert base.asked == ["A", "A bc", "A bc d"]


def test_trailing_repeats_of_thirty_characters_are_cut_off() -> None:
    run = "this is a line of thirty chars"
    assert len(run) == 30
    assert without_trailing_repeats("Well, " + run * 4) == "Well, " + run
    assert without_trailing_repeats("Well, " + run * 2 + "!") == "Well, " + run * 2 + "!"
    assert without_trailing_repeats("Well, " + run[1:] * 2) == "Well, " + run[1:] * 2
    assert without_trailing_repeats("") == ""


# ---- models of two vocabularies ------------------------------------------------------------------

QUESTION = [{"role": "user", "content": "the cat and the mat"}]


def sober(model: Any) -> Any:
    """The model with every token that is no ASCII text, and every special one, made unlikely."""
    tokenizer = model.tokenizer
    for token in range(model.spec.vocab_size):
        text = tokenizer.decode([token])
        if not text or not text.isascii() or token in tokenizer.special_ids:
            model.lm_head.weight.data[token] = 0.0
    return model


@pytest.fixture
def base(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Any:
    return sober(speaking(tiny_llama, tiny_tokenizer))


@pytest.fixture
def nudger(tiny_llama: Callable[..., Any]) -> Any:
    tokenizer = Tokenizer(train_core(), CONFIG)
    model = sober(speaking(tiny_llama, tokenizer, 5, vocab_size=tokenizer.vocab_size))
    model.template = Template(CHATML, tokenizer.template_strings)
    return model


def nudged(base: Any, nudger: Any, tokens: int = 60, **settings: Any) -> tuple[Completion, Engine]:
    engine = Engine(base, models={"nudge": nudger}, kernels="plain")
    base.template = nudger.template  # so that the engine takes messages; the base never sees it
    (completion,) = engine.generate([QUESTION], Sampling(max_tokens=tokens), {"name": "nudging", **settings})
    return completion, engine


def test_two_vocabularies_write_one_text_by_turns(base: Any, nudger: Any) -> None:
    completion, engine = nudged(base, nudger, confidence=0.5)
    assert engine.tokenizer.decode(completion.ids) == completion.text
    assert {row.source for row in completion.trace} == {"base", "nudge"}
    assert not completion.lossless
    # What a source wrote in one go, a word of it at least, is the greedy continuation of its own view.
    first = "".join(
        engine.tokenizer.decode([row.token]) for row in completion.trace[: _run(completion.trace)]
    )
    asked = encode_prompt(nudger.tokenizer, nudger.template, QUESTION)
    (own,) = Engine(nudger, kernels="plain").generate([asked], Sampling(max_tokens=100))
    assert own.text.startswith(first)


def _run(trace: Sequence[TraceRow]) -> int:
    """How many rows from the beginning have one source."""
    return next((place for place, row in enumerate(trace) if row.source != trace[0].source), len(trace))


def test_at_confidence_0_the_base_writes_its_own_greedy_tokens(base: Any, nudger: Any) -> None:
    completion, engine = nudged(base, nudger, confidence=0.0)
    forced = _run(completion.trace)
    assert {row.source for row in completion.trace[forced:]} == {"base"}
    prompt = engine.encode(plain_prompt(QUESTION, NudgingSettings().base_prompt))
    (own,) = engine.generate(
        [[*prompt, *completion.ids[:forced]]], Sampling(max_tokens=60 - forced, ignore_eos=True)
    )
    assert own.ids == completion.ids[forced:]


def test_above_confidence_1_the_nudger_writes_its_own_greedy_text(base: Any, nudger: Any) -> None:
    completion, _ = nudged(base, nudger, tokens=120, confidence=1.1, prefix_rule=False, same_nudges=100)
    (own,) = Engine(nudger, kernels="plain").generate([QUESTION], Sampling(max_tokens=120))
    assert len(completion.text) > 40
    assert own.text.startswith(completion.text) or completion.text.startswith(own.text)


def test_lanes_catch_up_and_never_read_the_text_anew(base: Any, nudger: Any) -> None:
    completion, engine = nudged(base, nudger, tokens=100, confidence=0.15)
    rounds = sum(
        before.source != after.source and after.source == "nudge"
        for before, after in itertools.pairwise(completion.trace)
    )
    anew = rounds * len(completion.ids)  # of one of the two, were it to begin each round with the prompt
    assert rounds > 3
    assert engine.statistics.tokens_read < anew


class Twice:
    """Writes eight pieces, takes over three of them, and writes eight behind these."""

    name: ClassVar[str] = "twice"
    lossless: ClassVar[bool] = False
    pieces: tuple[list[Piece], list[Piece]]

    def run(self, request: Running) -> Any:
        voice = LaneVoice(request.lane, request.prompt, request.tokenizer)
        first = yield from voice.write("", 8)
        second = yield from voice.write("".join(piece.text for piece in first.pieces[:3]), 8)
        self.pieces = first.pieces, second.pieces


def test_what_a_model_wrote_is_not_written_anew_where_its_beginning_was_taken_over(base: Any) -> None:
    engine, twice = Engine(base, kernels="plain"), Twice()
    prompt = engine.encode("the cat and the mat")
    engine.generate([prompt], Sampling(max_tokens=30), twice)
    first, second = twice.pieces
    assert len(first) == len(second) == 8
    assert second[:5] == first[3:]
    assert engine.statistics.tokens_read == len(prompt) + 7 + 3


def test_prompts_that_are_no_conversation_are_the_bases_as_they_are(base: Any, nudger: Any) -> None:
    engine = Engine(base, models={"nudge": nudger}, kernels="plain")
    text = "the cat sat"
    found = engine.generate([text, engine.encode(text)], Sampling(max_tokens=12), "nudging")
    assert found[0].prompt_tokens == found[1].prompt_tokens == len(engine.encode(text))
    assert found[0].ids == found[1].ids


def test_a_conversation_is_plain_text_to_the_base() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why {so}?"},
        {"role": "assistant", "content": "Because."},
        {"role": "user", "content": "And?"},
    ]
    assert (
        plain_prompt(messages, "Q: {question}\nA: ")
        == "Be brief.\n\nQ: Why {so}?\nA: Because.\n\nQ: And?\nA: "
    )


@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        (Sampling(temperature=0.5), "temperature"),
        (Sampling(presence_penalty=0.5), "penalties"),
        (Sampling(logprobs=True), "logprobs"),
        (Sampling(ignore_eos=True), "ignore_eos"),
    ],
)
def test_sampling_that_it_cannot_follow_is_refused(
    base: Any, nudger: Any, sampling: Sampling, told: str
) -> None:
    engine = Engine(base, models={"nudge": nudger}, kernels="plain")
    with pytest.raises(PunaError, match=told):
        engine.generate(["the cat"], sampling, "nudging")


def test_a_nudger_without_a_template_and_a_prompt_without_its_place_are_refused(
    base: Any, nudger: Any
) -> None:
    with pytest.raises(PunaError, match="chat template"):
        Engine(base, models={"nudge": base}, kernels="plain").generate(["a"], None, "nudging")
    with pytest.raises(PunaError, match="one place"):
        Engine(base, kernels="plain").generate(["a"], None, {"name": "nudging", "base_prompt": "Q:"})
    nudger.spec = nudger.spec.replace(max_positions=20)
    with pytest.raises(PunaError, match="does not fit"):
        Engine(base, models={"nudge": nudger}, kernels="plain").generate(["a" * 50], None, "nudging")


def test_the_answer_ends_where_a_context_does(base: Any, nudger: Any) -> None:
    nudger.spec = nudger.spec.replace(max_positions=100)
    completion, _ = nudged(base, nudger, tokens=500, confidence=0.0)
    assert completion.finish_reason == "length"
    assert len(completion.ids) < 120
