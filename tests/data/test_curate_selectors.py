"""Data-Juicer's selectors and its quality classifier with both rules of keeping."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest

from puna.core.errors import PunaError
from puna.core.stage import validate
from puna.data.curate.hashed_classifier import HashedClassifier, train
from puna.data.curate.operator import apply_score, get_operator
from puna.data.curate.scores.data_juicer_quality import draws
from puna.data.curate.texts import Texts


class Sketched:
    """A sketch in memory."""

    def __init__(self, count: int, columns: Any) -> None:
        self.count = count
        self.columns = columns

    def ids(self) -> Sequence[str]:
        return [str(place) for place in range(self.count)]

    def read(self, name: str) -> Any:
        return self.columns[name]

    def ragged(self, name: str) -> Any:
        return self.columns[name]


def selected(name: str, shards: list[list[Any]], **values: Any) -> list[int]:
    operator = get_operator("global", f"data_juicer.{name}")
    made = validate(operator.settings, values, where="test")
    sketches = []
    for rows in shards:
        texts = Texts(["x"] * len(rows), metas=[json.dumps(r) for r in rows])
        sketches.append(Sketched(texts.count, operator.function.sketch(texts, made)))
    resolved = list(operator.function.resolve(sketches, made, Path()))
    assert [len(one.signals["selected"]) for one in resolved] == [len(rows) for rows in shards]
    return [int(value) for one in resolved for value in one.signals["selected"]]


STARS = [[{"n": 3}, {"n": 1}, {"n": 2.5}], [{"m": 1}, {"n": "9"}, {"n": 3}]]


def test_top_selects_the_largest_over_all_shards():
    assert selected("top", STARS, field="n", number=2) == [1, 0, 0, 0, 1, 0]
    assert selected("top", STARS, field="n", share=0.5) == [1, 0, 0, 0, 1, 1]
    assert selected("top", STARS, field="n", share=0.5, number=1) == [0, 0, 0, 0, 1, 0]
    assert selected("top", STARS, field="n", number=2, largest=False) == [0, 1, 1, 0, 0, 0]
    assert selected("top", STARS, field="n", number=6) == [1, 1, 1, 0, 1, 1]  # No number, no place.


def test_ranges_are_between_bounds():
    assert selected("range", STARS, field="n", lower_share=0.2, upper_share=0.8) == [1, 0, 1, 0, 0, 1]
    assert selected("range", STARS, field="n", lower_rank=1, upper_rank=2) == [0, 0, 1, 0, 0, 0]
    assert selected("range", STARS, field="n", lower_rank=5, upper_rank=2) == [0] * 6
    with pytest.raises(PunaError, match="no upper bound"):
        selected("range", STARS, field="n", lower_rank=1)


def test_frequency_counts_values():
    shards = [[{"s": "a"}, {"s": "b"}, {"s": "a"}], [{"s": "c"}, {"s": "b"}, {"s": "a"}]]
    assert selected("frequency", shards, field="s", number=1) == [1, 0, 1, 0, 0, 1]
    assert selected("frequency", shards, field="s", number=1, largest=False) == [0, 0, 0, 1, 0, 0]
    assert selected("frequency", shards, field="s", share=0.7) == [1, 1, 1, 0, 1, 1]


def test_tags_tell_kinds_of_values_apart():
    shards = [[{"t": 1}, {"t": "1"}, {"t": True}, {"t": 1.0}, {}]]
    assert selected("tags", shards, field="t", tags=["1"]) == [0, 1, 0, 0, 0]
    assert selected("tags", shards, field="t", tags=[1]) == [1, 0, 0, 1, 0]


def test_random_draws_exactly_so_many():
    shards = [[{}] * 60, [{}] * 40]
    one = selected("random", shards, share=0.3)
    assert sum(one) == 30
    assert one == selected("random", shards, share=0.3)
    assert one != selected("random", shards, share=0.3, seed=1)
    assert sum(selected("random", shards, share=0.3, number=7)) == 7


def test_no_shard_selects_nothing():
    for name, values in {"top": {"field": "n", "number": 1}, "random": {"number": 1}}.items():
        assert selected(name, [], **values) == []


GOOD = [f"the report of the committee number {i} explains what was found" for i in range(60)]
BAD = [f"click here buy cheap {i} now free offer click" for i in range(60)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quality") / "model.safetensors"
    train(GOOD[:40], BAD[:40], size=4096, iterations=30).save(path)
    return path


def test_a_classifier_tells_texts_it_never_saw(model):
    operator = get_operator("score", "data_juicer.quality")
    texts = Texts([*GOOD[40:], *BAD[40:], ""])
    scores = apply_score(operator, texts, operator.settings(model=str(model)))["score"]
    assert (scores[:20] > 0.5).all()
    assert (scores[20:40] < 0.5).all()


def test_training_reaches_the_minimum_of_its_loss():
    # One feature, good once and bad once in three: the probability is the share.
    made = train(["a"], ["a", "a", "a"], size=8, iterations=100)
    assert made.probabilities(Texts(["a"]))[0] == pytest.approx(0.25, abs=1e-3)


def test_the_paretos_rule_keeps_with_its_probability():
    texts = Texts([str(i) for i in range(40_000)])
    drawn = draws(texts, 9.0, 0)
    for score in (0.0, 0.5, 0.9, 1.0):
        expected = (2 - score) ** -9
        kept = (score > 1 - drawn).mean()
        assert abs(kept - expected) <= 4 * numpy.sqrt(expected * (1 - expected) / texts.count) + 1e-9
    assert (draws(texts, 9.0, 1) != drawn).mean() > 0.99
    assert draws(Texts(["7", "x"]), 9.0, 0)[0] == drawn[7]


def test_a_classifier_comes_back_from_its_file(model, tmp_path):
    loaded = HashedClassifier.load(model)
    loaded.save(tmp_path / "again.safetensors")
    texts = Texts(GOOD[:5])
    again = HashedClassifier.load(tmp_path / "again.safetensors").probabilities(texts)
    assert again.tolist() == loaded.probabilities(texts).tolist()


@pytest.mark.parametrize(("content", "message"), [(None, "no such"), (b"abc", "not a classifier")])
def test_a_bad_file_is_told(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    operator = get_operator("score", "data_juicer.quality")
    with pytest.raises(PunaError, match=message):
        apply_score(operator, Texts(["a"]), operator.settings(model=str(path)))
