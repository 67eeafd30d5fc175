import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.text.vocabulary.builders import identity
from puna.text.vocabulary.operator import Draw, Origin, VocabularyMap

OLD = 9


@st.composite
def rows(draw: st.DrawFn) -> list[tuple[Origin, dict[int, float]]]:
    """Rows of all origins whose weights sum to 1."""
    made: list[tuple[Origin, dict[int, float]]] = []
    for _ in range(draw(st.integers(1, 8))):
        origin: Origin = draw(st.sampled_from(["copied", "pieces", "aligned", "mean", "random"]))
        weights: dict[int, float] = {}
        if origin not in ("mean", "random"):
            counted = draw(st.dictionaries(st.integers(0, OLD - 1), st.integers(1, 99), min_size=1))
            weights = {column: count / sum(counted.values()) for column, count in counted.items()}
        made.append((origin, weights))
    return made


@given(made=rows())
def test_rows_come_back_as_they_were_given(made: list[tuple[Origin, dict[int, float]]]) -> None:
    mapping = VocabularyMap.from_rows(made, old_size=OLD, draw=Draw("fixed", 1))
    assert mapping.new_size == len(made)
    assert [(mapping.origin(index), mapping.row(index)) for index in range(len(made))] == made
    assert mapping.row_sums() == pytest.approx(numpy.ones(len(made)), abs=1e-6)


@given(made=rows())
def test_a_saved_map_is_read_back(tmp_path_factory: pytest.TempPathFactory, made: Any) -> None:
    folder = tmp_path_factory.mktemp("map")
    mapping = VocabularyMap.from_rows(made, old_size=OLD, draw=Draw("matched", 3), about={"builder": "x"})
    mapping.save(folder)
    read = VocabularyMap.load(folder)
    for name in ("starts", "columns", "weights", "origins"):
        assert (getattr(read, name) == getattr(mapping, name)).all()
    assert (read.old_size, read.draw, read.about) == (OLD, Draw("matched", 3), {"builder": "x"})


@pytest.mark.parametrize("weights", [{0: 0.5, 1: 0.49}, {0: 1.00001}, {0: float("nan")}])
def test_a_row_that_does_not_sum_to_one_is_refused(weights: dict[int, float]) -> None:
    with pytest.raises(PunaError, match=r"row 1: the weights of a row of the map do not sum to 1"):
        VocabularyMap.from_rows([("copied", {0: 1.0}), ("pieces", weights)], old_size=OLD)


def test_a_row_within_the_tolerance_is_accepted() -> None:
    VocabularyMap.from_rows([("pieces", {0: 0.5, 1: 0.5 + 9e-7})], old_size=OLD)


@pytest.mark.parametrize("column", [-1, OLD])
def test_a_token_outside_the_old_vocabulary_is_refused(column: int) -> None:
    with pytest.raises(PunaError, match="tokens that the old vocabulary does not have"):
        VocabularyMap.from_rows([("copied", {column: 1.0})], old_size=OLD)


@pytest.mark.parametrize(
    ("origin", "weights", "message"),
    [
        ("pieces", {}, "rows without entries"),
        ("mean", {0: 1.0}, "rows without entries"),
        ("random", {}, "must say how they are drawn"),
    ],
)
def test_rows_that_do_not_fit_their_origin_are_refused(
    origin: Origin, weights: dict[int, float], message: str
) -> None:
    with pytest.raises(PunaError, match=message):
        VocabularyMap.from_rows([(origin, weights)], old_size=OLD)


def test_metrics_count_every_row_once() -> None:
    made: list[tuple[Origin, dict[int, float]]] = [
        ("copied", {0: 1.0}),
        ("pieces", {0: 0.25, 1: 0.75}),
        ("mean", {}),
        ("mean", {}),
    ]
    metrics = VocabularyMap.from_rows(made, old_size=OLD).metrics()
    assert (metrics["rows.copied"], metrics["rows.pieces"], metrics["rows.mean"]) == (1, 1, 2)
    assert sum(value for name, value in metrics.items() if name.startswith("rows.")) == 4
    assert metrics["entries_per_row"] == pytest.approx(3 / 4)
    assert metrics["row_sum_error"] == 0


@pytest.mark.parametrize("damage", ["truncate", "origins", "json", "gone"])
def test_a_damaged_map_is_refused_with_its_file(tmp_path: Path, damage: str) -> None:
    identity(5).save(tmp_path)
    tensors, meta = tmp_path / "mapping.safetensors", tmp_path / "mapping.json"
    if damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-8])
    elif damage == "gone":
        tensors.unlink()
    elif damage == "json":
        meta.write_text("{")
    else:
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"origins": ["copied"]}))
    with pytest.raises(PunaError, match=r"mapping\.(safetensors|json)"):
        VocabularyMap.load(tmp_path)
