"""Every question about a table gets an answer of its own, or is counted as failed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.stage import Context, get_stage, validate
from puna.data.tables.prompts import Messages
from puna.data.tables.questions import NO, YES, Question, write
from puna.decode.engine import Engine
from puna.evaluate import table_scores
from puna.evaluate.askers import EndpointAsker, EngineAsker, Said
from puna.evaluate.choices import Slot
from puna.evaluate.preprocessing import preprocess
from puna.evaluate.preprocessing_stage import AskTables, Way
from tests.serve.little_server import live, tiny_catalog, tiny_model


def questions(count: int, role: Any = "asked") -> list[Question]:
    """Questions whose right answer is Yes for even numbers; the rows hold the number."""
    return [
        Question(
            "error_detection",
            ({"number": f"n{number}", "other": "x"},),
            "number",
            answer=NO if number % 2 else YES,
            reason=f"{number} is so.",
            role=role,
        )
        for number in range(count)
    ]


class Scripted:
    """Answers by a function of the numbers asked about; notes every prompt."""

    scores_batches = True

    def __init__(self, answer: Callable[[list[int], str], str]) -> None:
        self.answer, self.prompts = answer, list[Messages]()

    def write(
        self, prompts: Sequence[Messages], max_tokens: Sequence[int], stop: tuple[str, ...] = ()
    ) -> list[Said]:
        self.prompts += prompts
        return [Said(10, self.answer(numbers(prompt), prompt[-1]["content"])) for prompt in prompts]

    def score(self, prompts: Sequence[Messages], slots: Sequence[Sequence[Slot]]) -> list[Said]:
        """Likes Yes by 2 nats always, and by 1 less for odd numbers."""
        self.prompts += prompts
        found = []
        for prompt, each in zip(prompts, slots, strict=True):
            asked = numbers(prompt) or [0] * len(each)
            scores = [(0.0, -1.0 if number % 2 else -2.0) for number in asked]
            taken = []
            for one, slot in zip(scores, each, strict=True):
                offsets = slot.offsets or (0.0, 0.0)
                taken.append(0 if one[0] - offsets[0] > one[1] - offsets[1] else 1)
            found.append(Said(10, "", tuple(scores), tuple(taken)))
        return found


def numbers(prompt: Messages) -> list[int]:
    return [int(found) for found in re.findall(r'number: "n(\d+)", other', prompt[-1]["content"])]


def right(number: int) -> str:
    return NO if number % 2 else YES


@pytest.mark.parametrize("grouping", ["random", "clusters"])
@pytest.mark.parametrize("batch", [1, 4, 10])
def test_answers_come_back_to_their_questions_in_any_batch(batch: int, grouping: Any) -> None:
    def answer(asked: list[int], content: str) -> str:
        if batch == 1:
            return right(asked[0])
        return "\n".join(f"{place}. {right(number)}" for place, number in enumerate(asked, 1))

    asker = Scripted(answer)
    found = preprocess(asker, questions(23), [], Way(batch=batch, grouping=grouping, answer="written"), 0)
    assert found.answers == [right(number) for number in range(23)]
    assert found.counts()["answered"] == 23 and found.prompts == -(-23 // batch)


def test_what_is_missing_is_asked_again_alone_with_a_reminder_and_then_failed() -> None:
    def answer(asked: list[int], content: str) -> str:
        if len(asked) > 1:  # number 3 of each batch is skipped
            lines = [f"{place}. {right(number)}" for place, number in enumerate(asked, 1) if place != 3]
            return "\n".join(lines)
        return right(asked[0]) if asked[0] < 6 else "I do not know"

    asker = Scripted(answer)
    found = preprocess(asker, questions(12), [], Way(batch=4, answer="written", attempts=3), 0)
    counts = found.counts()
    assert counts["answered"] + counts["answered_again"] + counts["failed"] == counts["asked"] == 12
    assert counts["answered"] == 9
    for place, answer_found in enumerate(found.answers):
        assert answer_found in (right(place), None)
        assert (answer_found is None) == (place in found.problems)
        assert answer_found is not None or found.attempts[place] == 3
    again = [prompt for prompt in asker.prompts if len(numbers(prompt)) == 1]
    assert all("no answer with number 3" in p[-1]["content"] or "none of" in p[-1]["content"] for p in again)


def test_prompt_tokens_are_those_of_every_prompt_asked_again_too() -> None:
    found = preprocess(Scripted(lambda asked, content: "?"), questions(4), [], Way(answer="written"), 0)
    assert found.prompts == 8 and found.counts()["tokens"] == 20.0


def test_examples_are_the_first_labelled_ones_and_columns_are_left_out_everywhere() -> None:
    asker = Scripted(lambda asked, content: YES)
    labelled = questions(6, "example")
    preprocess(asker, questions(1), labelled, Way(examples=2, answer="written", columns=("number",)), 0)
    contents = [message["content"] for message in asker.prompts[0]]
    assert len(contents) == 6 and contents[2] == YES and contents[4] == NO
    assert not any("other" in content for content in contents)
    with pytest.raises(PunaError, match="fewer examples"):
        preprocess(asker, questions(1), labelled, Way(examples=7), 0)
    with pytest.raises(PunaError, match="no column 'colour'"):
        preprocess(asker, questions(1), labelled, Way(columns=("colour",)), 0)


@pytest.mark.parametrize("batch", [1, 3])
def test_calibration_takes_off_what_is_said_of_nothing_or_in_the_mean(batch: int) -> None:
    def answers(calibration: Any) -> list[str | None]:
        return preprocess(
            Scripted(lambda asked, content: ""),
            questions(6),
            [],
            Way(batch=batch, calibration=calibration),
            0,
        ).answers

    assert answers("none") == [YES] * 6
    # Nothing scores as an even number does, by 2 nats: an odd one is then 1 nat on the side of No.
    assert answers("empty_row")[1::2] == [NO] * 3
    assert answers("mean") == [YES, NO] * 3


@given(st.lists(st.tuples(st.sampled_from([YES, NO, None]), st.sampled_from([YES, NO])), min_size=1))
@settings(deadline=None)
def test_f1_is_that_of_precision_and_recall(pairs: list[tuple[str | None, str]]) -> None:
    said = [(NO if truth == YES else YES) if answer is None else answer for answer, truth in pairs]
    truths = [truth for _, truth in pairs]
    hits = sum(one == YES == other for one, other in zip(said, truths, strict=True))
    expected = 0.0
    if hits:
        precision, recall = hits / said.count(YES), hits / truths.count(YES)
        expected = 2 * precision * recall / (precision + recall)
    assert table_scores.f1([answer for answer, _ in pairs], truths) == pytest.approx(expected)


def test_baselines_by_their_formulas() -> None:
    asked = questions(40)
    found = table_scores.baselines(asked, [], 0)
    assert found["always_yes"] == {"accuracy": 0.5, "f1": pytest.approx(2 / 3)}
    assert found["random"]["accuracy"] == pytest.approx(0.5, abs=0.02)
    assert found["random"]["f1"] == pytest.approx(0.5, abs=0.03)
    labelled = [question for question in questions(9, "example") if question.answer == NO]
    assert table_scores.baselines(asked, labelled, 0)["majority"] == {"accuracy": 0.5, "f1": 0.0}


def test_ranking_is_the_share_of_pairs_in_order() -> None:
    assert table_scores.ranking([3, 1, 2, 0], [YES, NO, YES, NO]) == 1.0
    assert table_scores.ranking([1, 1], [YES, NO]) == 0.5
    assert table_scores.agreement([YES, None, NO], [YES, None, YES]) == pytest.approx(1 / 3)


# ---- the engine, a server, the stage --------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Any) -> Any:
    return tiny_model(tiny_tokenizer)


@pytest.mark.parametrize("way", [Way(), Way(batch=5, calibration="empty_row"), Way(examples=2, reasons=True)])
def test_the_engine_answers_every_scored_question(model: Any, way: Way) -> None:
    found = preprocess(EngineAsker(Engine(model)), questions(12), questions(4, "example"), way, 0)
    assert found.counts()["answered"] == 12
    assert all(scores is not None and len(scores) == 2 for scores in found.scores)


def test_a_server_answers_and_scores_as_the_engine_does(tiny_tokenizer: Any) -> None:
    asked = questions(6)
    with live(tiny_catalog(tiny_tokenizer)) as server:
        engine = EngineAsker(server.house.catalog["tiny"].engine)
        endpoint = EndpointAsker(f"{server.url}/v1", "tiny", parallel=2)
        for way in (Way(answer="written", attempts=1), Way(answer="written", batch=3, attempts=1)):
            there, here = (preprocess(asker, asked, [], way, 0) for asker in (endpoint, engine))
            assert there.answers == here.answers and there.problems == here.problems
            assert there.prompt_tokens == here.prompt_tokens > 0
        found = preprocess(endpoint, asked, [], Way(), 0)
        assert found.attempts == [1] * 6
        with pytest.raises(PunaError, match="one question at a time"):
            preprocess(endpoint, asked, [], Way(batch=2), 0)
        with pytest.raises(PunaError, match="tini"):
            preprocess(EndpointAsker(f"{server.url}/v1", "tini"), asked, [], Way(), 0)
        endpoint.client.close()


def server_of(answers: list[Any]) -> EndpointAsker:
    """A server that says these one after another."""
    replies = iter(answers)

    def handle(request: httpx.Request) -> httpx.Response:
        reply = next(replies)
        return (
            httpx.Response(reply[0], json=reply[1])
            if isinstance(reply, tuple)
            else httpx.Response(200, json=reply)
        )

    client = httpx.Client(base_url="http://server/v1/", transport=httpx.MockTransport(handle))
    return EndpointAsker("", "m", client=client, parallel=1)


def chat(text: str, **listed: float) -> dict[str, Any]:
    top = [{"token": token.replace("_", " "), "logprob": value} for token, value in listed.items()]
    choice = {"message": {"content": text}, "logprobs": {"content": [{"top_logprobs": top}]}}
    return {"choices": [choice], "usage": {"prompt_tokens": 7}}


def test_choices_are_scored_by_their_listed_first_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    asker = server_of(
        [chat("", Y=-3.0, _Yes=-2.0, No=-1.0, Maybe=-9.0), chat("", Yes=-1.0, x=-6.0), chat("", x=-1.0)]
    )
    found = preprocess(asker, questions(3), [], Way(), 0)
    assert sorted(scores for scores in found.scores if scores) == [(-2.0, -1.0), (-1.0, -6.0)]
    assert found.counts()["failed"] == 1.0  # neither was listed: nothing is known
    with pytest.raises(PunaError, match="begin with one token"):
        server_of([chat("", A=-1.0)]).score([[]], [[Slot("", ("Amber", "Apple"))]])


def test_passing_failures_are_tried_again_and_others_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.evaluate.askers.time.sleep", lambda seconds: None)
    asker = server_of([(503, {}), (429, {}), chat("No")])
    assert asker.write([[]], [4])[0].text == "No"
    with pytest.raises(PunaError, match="status 401"):
        server_of([(401, {})]).write([[]], [4])
    with pytest.raises(PunaError, match="status 503"):
        server_of([(503, {})] * 5).write([[]], [4])
    with pytest.raises(PunaError, match="lacks a part"):
        server_of([{"choices": []}]).write([[]], [4])
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(PunaError, match="NO_SUCH_KEY"):
        EndpointAsker("http://x/v1", "m", key="NO_SUCH_KEY")


def test_the_stage_scores_ways_beside_baselines(tmp_path: Path, model: Any) -> None:
    import puna

    puna.save(model, tmp_path / "model")
    write([*questions(2, "example"), *questions(9)], tmp_path / "q.jsonl")
    write(questions(2), tmp_path / "more.jsonl")
    parameters = AskTables(
        ways={
            "one": Way(),
            "five": Way(batch=5),
            "said": Way(answer="written", attempts=1),
            "elsewhere": Way(questions=("more",)),
        },
        compare=(("one", "five"),),
    )
    inputs = {"model": str(tmp_path / "model"), "questions": {"little": tmp_path / "q.jsonl"}}
    inputs["questions"]["more"] = tmp_path / "more.jsonl"  # type: ignore[index]
    context = Context("ask", tmp_path, inputs, dtype="float32")
    outcome = get_stage("ask_tables").function(context, parameters)
    metrics = outcome.metrics
    for way in ("one", "five", "said"):
        counts = [
            metrics[f"{way}.little.{name}"] for name in ("answered", "answered_again", "failed", "asked")
        ]
        assert sum(counts[:3]) == counts[3] == 9
    assert metrics["five.little.tokens"] < metrics["one.little.tokens"]
    assert 0 <= metrics["agree.one.five.little"] <= 1
    assert {"majority.little.f1", "random.little.f1", "always_yes.little.f1"} <= set(metrics)
    assert outcome.outputs["answers"].read_text().count("\n") == 11
    assert "elsewhere.little.f1" not in metrics and metrics["elsewhere.more.asked"] == 2
    assert context.report["tables"][0]["rows"][0][0] == "one"


def test_a_way_of_no_file_is_refused(tmp_path: Path, model: Any) -> None:
    import puna

    puna.save(model, tmp_path / "model")
    write(questions(1), tmp_path / "q.jsonl")
    inputs = {"model": str(tmp_path / "model"), "questions": {"q": tmp_path / "q.jsonl"}}
    parameters = AskTables(ways={"a": Way(questions=("p",))})
    with pytest.raises(PunaError, match="no questions 'p'"):
        get_stage("ask_tables").function(Context("ask", tmp_path, inputs, dtype="float32"), parameters)


def test_who_is_asked_must_be_told(tmp_path: Path) -> None:
    write(questions(1), tmp_path / "q.jsonl")
    context = Context("ask", tmp_path, {"questions": {"q": tmp_path / "q.jsonl"}})
    with pytest.raises(PunaError, match="nobody is asked"):
        get_stage("ask_tables").function(context, AskTables(ways={"a": Way()}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ways": {}}, "ways"),
        ({"ways": {"a": {"reasons": True, "batch": 2}}}, "one by one"),
        ({"ways": {"a": {"answer": "written", "calibration": "mean"}}}, "means nothing"),
        ({"ways": {"a": {"answer": "channel", "calibration": "empty_row"}}}, "neither reasons nor"),
        ({"ways": {"a": {}}, "compare": [["a", "b"]]}, "none of the ways"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(PunaError, match=said):
        validate(AskTables, values, where="test")


class Written:
    """Finds data the likelier, the more of them its prompt shows in examples; notes prompts and slots."""

    scores_batches = True

    def __init__(self) -> None:
        self.asked: list[tuple[Messages, Sequence[Slot]]] = []

    def write(
        self, prompts: Sequence[Messages], max_tokens: Sequence[int], stop: tuple[str, ...] = ()
    ) -> list[Said]:
        raise AssertionError("nothing is written")

    def score(self, prompts: Sequence[Messages], slots: Sequence[Sequence[Slot]]) -> list[Said]:
        self.asked += zip(prompts, slots, strict=True)
        found = []
        for prompt, each in zip(prompts, slots, strict=True):
            shown = [message["content"] for message in prompt if message["role"] == "assistant"]
            scores = tuple((float("\n".join(shown).count(slot.choices[0])),) for slot in each)
            found.append(Said(10, "", scores, (0,) * len(each), 3 * len(each)))
        return found


def pairs(count: int, role: Any = "asked") -> list[Question]:
    """Pairs of rows; of even numbers the second row is always the same."""
    return [
        Question(
            "entity_matching",
            ({"name": f"a{number}"}, {"name": f"odd{number % 4}" if number % 2 else "even"}),
            answer=NO if number % 2 else YES,
            role=role,
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("batch", [1, 4])
def test_data_are_scored_behind_the_examples_of_each_answer(batch: int) -> None:
    asker = Written()
    way = Way(examples=6, batch=batch, answer="channel")
    found = preprocess(asker, pairs(8), pairs(6, "example"), way, 0)
    assert found.answers == [right(number) for number in range(8)]
    assert found.scores[0] == (3.0, 0.0) and found.scores[1] == (0.0, 2.0)
    assert found.counts()["tokens"] == 2 * (10 / batch + 3)
    for prompt, slots in asker.asked:
        contents = "\n".join(message["content"] for message in prompt)
        behind_yes = 'name: "even"' in contents
        assert behind_yes != ('name: "odd' in contents)  # no example has the other answer
        given = prompt[-1]["content"].split("\n")
        assert [slot.lead for slot in slots] == ([""] if batch == 1 else [f"{line} " for line in given])
        assert all(slot.alone for slot in slots)
        assert all(slot.choices[0] not in prompt[-1]["content"] for slot in slots)


def test_the_engine_scores_data_of_a_batch_each_on_its_own(model: Any) -> None:
    asker = EngineAsker(Engine(model))
    prompt: Messages = [{"role": "user", "content": "the cat and the mat"}]
    slots = [Slot("1. ", ("in the end",), alone=True), Slot("2. ", ("that cat", "it went"), alone=True)]
    together, reversed_, first, second = asker.score([prompt] * 4, [slots, slots[::-1], slots[:1], slots[1:]])
    own = [*first.scores[0], *second.scores[0]]
    assert [score for each in together.scores for score in each] == pytest.approx(own, abs=1e-4)
    assert [score for each in reversed_.scores[::-1] for score in each] == pytest.approx(own, abs=1e-4)
    assert together.choice_tokens == first.choice_tokens + second.choice_tokens > 0


def test_gaps_cannot_be_asked_the_other_way_round() -> None:
    gap = Question("imputation", ({"name": "a", "town": None},), "town", choices=("x", "y"))
    with pytest.raises(PunaError, match="only questions of yes or no"):
        preprocess(Written(), [gap], [], Way(answer="channel"), 0)
