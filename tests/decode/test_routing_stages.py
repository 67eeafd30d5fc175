"""The stages of routing, nudging, self-evaluation and skipping on tiny models, and their arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import puna
from puna.core.errors import PunaError
from puna.core.files import read_json
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import Corpus, write_corpus
from puna.decode.checked_tasks import make_tasks
from puna.decode.feed_forward_skipping import read_plan
from puna.decode.nudging_measures import broken_round_trips
from puna.decode.self_evaluation_measures import Answers, adaptive, area, fixed, gains
from puna.decode.switching_measures import at_share
from puna.text.template import CHATML, Template
from puna.text.tokenizer import Tokenizer
from tests.decode.decoding_models import speaking
from tests.text.text_samples import CONFIG, train_core

SAID = ["the cat sat on that mat", "in the end it went in again", "and then the other cat", "on the mat"]


@pytest.fixture
def folders(tmp_path: Path, tiny_llama: Callable[..., Any]) -> dict[str, str]:
    """Models ``large`` of six layers and ``small`` of one, and a corpus of ``chats``."""
    tokenizer = Tokenizer(train_core(), CONFIG)
    for name, layers, seed in (("large", 6, 0), ("small", 1, 1)):
        model = speaking(
            tiny_llama, tokenizer, seed, num_hidden_layers=layers, vocab_size=tokenizer.vocab_size
        )
        model.template = Template(CHATML, tokenizer.template_strings)
        puna.save(model, tmp_path / name)
    rows = [
        {
            "id": f"c{number}",
            "messages": [
                {"role": "user", "content": f"{said}?"},
                {"role": "assistant", "content": " ".join(SAID[number:] + SAID[:number])},
            ],
            "source": "s",
            "language": "en",
        }
        for number, said in enumerate(SAID)
    ]
    write_corpus(
        tmp_path / "chats", "messages", rows, provenance=[{"source": "s", "licence": "CC0"}], ledger={}
    )
    return {name: str(tmp_path / name) for name in ("large", "small", "chats")}


def run(tmp_path: Path, name: str, inputs: dict[str, Any], **settings: Any) -> Outcome:
    stage = get_stage(name)
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    context = Context(name, out, inputs, dtype="float32", seed=3)
    outcome = stage.function(context, validate(stage.parameters, settings, where="test"))
    for table in context.report.get("tables", []):
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    return outcome


def test_entropy_switching_ends_at_each_model_and_compares_both_rules(
    tmp_path: Path, folders: dict[str, str]
) -> None:
    inputs = {"large": folders["large"], "small": folders["small"], "corpus": folders["chats"]}
    found = run(
        tmp_path,
        "entropy_switching",
        inputs,
        rows=3,
        max_tokens=16,
        thresholds=[3.0, 5.0],
        shares=[0.5],
        minimum_stay=2,
    ).metrics
    assert found["same.small"] == found["same.large"] == 1
    assert found["share.small"] == 0 and found["share.large"] == 1
    assert found["closed.small"] == 0 and found["closed.large"] == 1
    assert found["catch_up_difference"] < 1e-5
    assert found["cost.random_0.5"] > found["cost_without_catching_up.random_0.5"]
    assert found["share.entropy_3"] >= found["share.entropy_5"]
    with pytest.raises(PunaError, match="too few conversations"):
        run(tmp_path, "entropy_switching", inputs, rows=30)


def test_a_curve_is_read_between_its_points() -> None:
    assert at_share([(0.5, 0.8)], 0.25) == pytest.approx(0.4)
    assert at_share([(0.5, 0.8)], 0.75) == pytest.approx(0.9)
    assert at_share([(0.8, 0.9), (0.2, 0.1)], 0.5) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="share"):
        at_share([(0.5, 0.8)], 1.5)


def test_nudging_counts_shares_and_stops_and_keeps_its_invariants(
    tmp_path: Path, folders: dict[str, str], tiny_tokenizer: Any
) -> None:
    tiny_tokenizer.save(tmp_path / "other")
    inputs = {
        "base": folders["small"],
        "nudger": folders["large"],
        "corpus": folders["chats"],
        "tokenizer": str(tmp_path / "other"),
    }
    found = run(tmp_path, "nudging", inputs, rows=3, max_tokens=24, confidences=[0.1, 0.3, 0.9]).metrics
    assert found["forced_then_greedy"] == 1
    assert found["nudgers_own"] == 1
    assert found["broken_round_trips"] == 0 and found["round_trips"] == 8
    assert found["share.0.1"] <= found["share.0.9"]
    assert found["share"] == found["share.0.3"]
    easy = {"rows": 3, "max_tokens": 24, "confidences": [0.001], "judged_at": 0.001}
    shares = [
        run(tmp_path, "nudging", inputs, **easy, **changed).metrics["share"]
        for changed in ({}, {"instruction": "in the end it went in again"}, {"nudge_tokens": 3})
    ]
    assert len(set(shares)) == 3
    with pytest.raises(PunaError, match="is none of the confidences"):
        run(tmp_path, "nudging", inputs, judged_at=0.2)


def test_a_tokenizer_that_loses_text_breaks_round_trips(tiny_tokenizer: Any) -> None:
    class Losing:
        def encode_continuation(self, text: str) -> list[int]:
            ids: list[int] = tiny_tokenizer.encode_continuation(text.replace("é", "e"))
            return ids

        def decode(self, ids: list[int]) -> str:
            text: str = tiny_tokenizer.decode(ids)
            return text

    texts = ["the café", "the cat"]
    assert broken_round_trips(texts, [tiny_tokenizer], 0) == 0
    assert broken_round_trips(texts, [tiny_tokenizer, Losing()], 0) == 1  # type: ignore[list-item]


def test_self_evaluation_makes_rows_and_measures_what_they_teach(
    tmp_path: Path, folders: dict[str, str]
) -> None:
    asking = {"questions": 3, "samples": 4, "max_tokens": 8}
    made = run(
        tmp_path,
        "self_evaluation_data",
        {"model": folders["large"]},
        rows_per_question=3,
        kept_share=0.0,
        **asking,
    )
    rows = list(Corpus.open(made.outputs["corpus"]).rows())
    assert made.metrics["rows"] == len(rows) <= 9
    for row in rows:
        *_, answer, question, verdict = row["messages"]
        assert (answer["role"], question["role"], verdict["role"]) == ("assistant", "user", "assistant")
        assert verdict["content"] in ("Yes", "No")


def test_balanced_verdicts_are_as_many_of_each_kind(
    tmp_path: Path, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from puna.decode import checked_tasks

    monkeypatch.setattr(checked_tasks, "list_reward", lambda text, count: float(len(text) % 2))
    asking = {"questions": 6, "samples": 4, "max_tokens": 8, "tasks": ["list"]}
    found = {}
    for balanced in (False, True):
        made = run(tmp_path, "self_evaluation_data", {"model": folders["large"]}, balanced=balanced, **asking)
        corpus = Corpus.open(made.outputs["corpus"])
        last = [row["messages"][-1]["content"] for row in corpus.rows() if row["id"].startswith("judged")]
        found[balanced] = (last.count("Yes"), last.count("No"))
        assert made.metrics["start_over"] == pytest.approx(found[False][0] / sum(found[False]))
    (yes, no), rare = found[False], min(found[False])
    assert yes != no
    assert found[True] == (rare, rare)


def test_self_evaluation_checks_the_strategy_on_the_way(
    tmp_path: Path, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from puna.decode import checked_tasks

    # What a tiny model says is worth nothing; its length is something it does differ in.
    monkeypatch.setattr(checked_tasks, "list_reward", lambda text, count: float(len(text) % 2))
    inputs = {"model": folders["large"], "untrained": folders["small"]}
    asking = {"questions": 3, "samples": 4, "max_tokens": 8, "tasks": ["list"], "low": 1.0, "prune_at": 2}
    said, greedy = {}, set()
    for anneal in (True, False):
        outcome = run(tmp_path, "self_evaluation", inputs, anneal=anneal, **asking)
        found = outcome.metrics
        assert found["samples.threshold_0"] == 1
        assert found["samples.threshold_above_1"] == 4
        assert found["undisturbed"] == 1
        assert found["scored_midway"] > 0
        assert found["excess_tokens"] == 0
        assert 0 <= found["area"] <= 1
        assert found["reward.fixed_1"] == found["reward.first"] <= found["reward.any"]
        greedy.add(found["reward.greedy"])
        said[anneal] = [each["texts"] for each in read_json(Path(outcome.outputs["answers"]))]
        if anneal:
            assert found["reward.greedy"] == found["reward.first"]
    assert len(greedy) == 1
    assert said[True] != said[False]


def answers(scores: list[float], rewards: list[float]) -> Answers:
    (task,) = make_tasks(("larger",), 1, 0, held_out=True)
    return Answers(task, scores=scores, half_scores=scores[::-1], rewards=rewards)


def test_scores_that_follow_the_rewards_have_an_area_of_1_and_their_reverse_0() -> None:
    each = answers([0.1, 0.9], [0.0, 1.0])
    assert area([each], half=False) == 1
    assert area([each], half=True) == 0


def test_adaptive_drawing_stops_where_a_score_suffices_and_is_compared_at_equal_means() -> None:
    easy, hard = answers([0.9, 0.1, 0.1], [1.0, 0.0, 0.0]), answers([0.2, 0.3, 0.8], [0.0, 0.0, 1.0])
    assert fixed([easy, hard]) == [0.5, 0.5, 1.0]
    assert adaptive([easy, hard], 0.7) == (2.0, 1.0)
    assert adaptive([easy, hard], 0.0) == (1.0, 0.5)
    assert adaptive([easy, hard], 1.1) == (3.0, 1.0)
    found = gains([easy, hard], 1.5, 2.5)
    assert (2.0, 1.0, 0.5) in found
    assert all(1.5 <= samples <= 2.5 for samples, _, _ in found)


def test_a_plan_comes_out_of_calibration_and_is_compared_on_other_answers(
    tmp_path: Path, folders: dict[str, str]
) -> None:
    inputs = {"model": folders["large"], "corpus": folders["chats"]}
    settings = {
        "rows": 4,
        "calibration_rows": 2,
        "cold_ends": [[1, 1], [2, 1]],
        "saturated": -1.0,
        "percentiles": [75.0, 25.0],
        "warm_up": 3,
        "timed_tokens": 4,
        "timed_rounds": 1,
    }
    outcome = run(tmp_path, "feed_forward_skip", inputs, tolerance=100.0, **settings)
    found = outcome.metrics
    assert found["nothing_to_skip"] == 0
    assert found["neutral_difference"] == found["cache_difference"] == found["operations_error"] == 0
    assert found["share.layers"] <= found["share"] == pytest.approx(0.25, abs=0.1)
    assert found["share.random"] == pytest.approx(found["share"], abs=0.15)
    assert read_plan(outcome.outputs["plan"]) is not None
    careful = run(tmp_path, "feed_forward_skip", inputs, tolerance=0.0, **settings)
    if careful.metrics["calibration_rise"] > 0:
        assert careful.metrics["nothing_to_skip"] == 1
        assert read_plan(careful.outputs["plan"]) is None
    cold = run(tmp_path, "feed_forward_skip", inputs, **{**settings, "saturated": 1.0})
    assert cold.metrics["nothing_to_skip"] == 1
    assert "rise.skip" not in cold.metrics
    with pytest.raises(PunaError, match="no row is left"):
        run(tmp_path, "feed_forward_skip", inputs, rows=2, calibration_rows=2)
