"""Mixtures, curricula and segments through the stage ``train``: shares, ledger, resume, mistakes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import little_trainings
import pytest
import torch
from little_trainings import weights, write_model

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.caps import Cap
from puna.data.corpus import write_corpus
from puna.text import pretrained
from puna.text.encode import encode_document
from puna.train.metrics import read_metrics
from puna.train.settings import Feedback, Mixture, Phase, ScheduleSegment
from puna.train.stages import Train
from puna.train.train_plan import plan_train

SMALL = {key: value for key, value in little_trainings.SMALL.items() if key != "max_steps"}
WORDS = ["the", "cat", "sat", "on", "that", "mat", "went", "again"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Path]:
    """A model, two corpora whose documents differ in length, and held-out text of both."""
    root = tmp_path_factory.mktemp("mixture-stage")
    write_model(root / "model", tiny_tokenizer)
    generator = numpy_generator(0, "mixture stage")
    for name, words, count, length in (
        ("long", WORDS[:4], 40, 30),
        ("short", WORDS[4:], 120, 3),
        ("held_long", WORDS[:4], 5, 12),
        ("held_short", WORDS[4:], 5, 12),
    ):
        rows = (
            {
                "id": f"{name}{n}",
                "text": " ".join(generator.choice(words, length + n % 5)),
                "source": f"{name}-task{n % 4}",
                "language": "en",
            }
            for n in range(count)
        )
        provenance = [{"source": "test", "licence": "CC0"}]
        write_corpus(root / name, "documents", rows, provenance=provenance, ledger={})
    names = ("model", "long", "short", "held_long", "held_short")
    return {name: root / name for name in names}


def train(places: Mapping[str, Path], out: Path, **parameters: Any) -> tuple[Outcome, Context]:
    inputs: dict[str, Any] = {
        "model": str(places["model"]),
        "corpus": {"long": places["long"], "short": places["short"]},
        "held_out": {"long": places["held_long"], "short": places["held_short"]},
    }
    stage = get_stage("train")
    context = Context("train", out, inputs, dtype="float32")
    return stage.function(context, validate(stage.parameters, {**SMALL, **parameters}, where="test")), context


def lines(out: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(out / "metrics.jsonl") if line["kind"] == kind]


EQUAL = {"weights": {"long": 1, "short": 1}}


def test_shares_are_realised_counted_and_reported(places: dict[str, Path], tmp_path: Path) -> None:
    mixture = {"weights": {"long": 3, "short": 1}}
    outcome, context = train(places, tmp_path, mixture=mixture, max_tokens=1500)
    metrics = outcome.metrics
    assert 1500 <= metrics["tokens"] < 1532
    assert metrics["ledger.long.share"] == pytest.approx(0.75, abs=32 / 1500)
    assert metrics["ledger.long.trained"] + metrics["ledger.short.trained"] == metrics["tokens"]
    assert metrics["ledger.long.most"] == metrics["ledger.short.most"] == 1
    last = lines(tmp_path, "train")[-1]
    assert last["tokens.long"] == metrics["ledger.long.trained"]
    assert last["tokens.long"] + last["tokens.short"] == last["tokens"]
    table = next(table for table in context.report["tables"] if table["title"] == "Token ledger")
    assert [row[0] for row in table["rows"]] == ["long", "short"]
    curve = next(curve for curve in context.report["curves"] if curve["title"] == "Tokens by source")
    assert {series["name"] for series in curve["series"]} == {"long", "short"}
    json.dumps(context.report)


def test_without_a_mixture_the_ledger_is_of_all_rows(places: dict[str, Path], tmp_path: Path) -> None:
    outcome, _ = train(places, tmp_path, epochs=2)
    assert outcome.metrics["ledger.all.most"] == 2 and outcome.metrics["ledger.all.unused"] == 0
    assert not any(key.startswith("tokens.") for key in lines(tmp_path, "train")[0])


def test_sources_may_be_what_the_rows_say(places: dict[str, Path], tmp_path: Path) -> None:
    names = [f"{name}-task{n}" for name in ("long", "short") for n in range(4)]
    mixture = {"by": "source", "weights": dict.fromkeys(names, 1), "when_short": "stop"}
    outcome, _ = train(places, tmp_path, mixture=mixture)
    trained = [outcome.metrics[f"ledger.{name}.trained"] for name in names]
    assert max(trained) - min(trained) <= 3 * 32 < min(trained)


def test_caps_alone_leave_out_rows_and_keep_whole_epochs(places: dict[str, Path], tmp_path: Path) -> None:
    mixture = {"caps": {"short": {"task_rows": 5}, "long": {"tokens": 300}}}
    outcome, _ = train(places, tmp_path, mixture=mixture, epochs=2)
    metrics = outcome.metrics
    assert 0 < metrics["ledger.long.used"] <= 300 and metrics["ledger.long.capped"] > 0
    assert metrics["ledger.short.most"] == 2 and metrics["ledger.short.unused"] == 0


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_feedback_goes_on_exactly_after_a_kill(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Weights change before steps 5 and 9; the run dies in the middle of a stretch, or right at its end."""
    from puna.train.loop import Loop

    settings = {
        "mixture": {**EQUAL, "feedback": {"every_steps": 4, "strength": 0.9}},
        "max_steps": 11,
        "save_steps": 3,
        "lora": {"r": 2, "dropout": 0.2},
    }
    whole, _ = train(places, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        plain = Loop._step

        def dying(self: Loop, step: Any) -> Any:
            if self.state.step == stop:
                raise _KilledError
            return plain(self, step)

        patch.setattr(Loop, "_step", dying)
        with pytest.raises(_KilledError):
            train(places, tmp_path / "run", **settings)
    resumed, _ = train(places, tmp_path / "run", **settings)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    found = [lines(tmp_path / name, "mixture") for name in ("whole", "run")]
    assert found[0] == found[1] and [line["step"] for line in found[0]] == [0, 4, 8]
    first, second = found[0][0], found[0][1]
    assert first["weight.long"] == 0.5 and second["weight.long"] != 0.5
    assert sum(value for key, value in second.items() if key.startswith("weight.")) == pytest.approx(1)
    moved = [line["tokens.long"] for line in lines(tmp_path / "run", "train")]
    assert moved == [line["tokens.long"] for line in lines(tmp_path / "whole", "train")]


def test_a_mixture_resumes_in_the_middle_of_a_phase(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puna.train.loop import Loop

    phases = [
        {"tokens": 400, "weights": {"long": 1}},
        {"tokens": 400, "weights": {"long": 1, "short": 1}},
    ]
    settings = {"mixture": {"phases": phases}, "save_steps": 2, "schedule": "constant"}
    whole, _ = train(places, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        plain = Loop._step

        def dying(self: Loop, step: Any) -> Any:
            if self.state.epoch == 1 and self.state.epoch_step == 3:
                raise _KilledError
            return plain(self, step)

        patch.setattr(Loop, "_step", dying)
        with pytest.raises(_KilledError):
            train(places, tmp_path / "run", **settings)
    resumed, _ = train(places, tmp_path / "run", **settings)
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())
    found = lines(tmp_path / "run", "train")
    assert all(line.get("tokens.short", 0) == 0 for line in found if line["tokens"] <= 400)
    assert found[-1]["tokens.short"] > 150


# ---- curricula -----------------------------------------------------------------------------------------


def row_lengths(places: dict[str, Path], out: Path, **parameters: Any) -> list[int]:
    """Tokens of the rows of a run with packing off, in the order in which they are fed."""
    from puna.train import job

    fed: list[int] = []
    plain = job.Feed.steps

    def noted(self: Any, epoch: int) -> Any:
        steps = plain(self, epoch)
        fed[:] = [self.rows[int(row)].tokens for step in steps for row in step.rows]
        return steps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job.Feed, "steps", noted)
        train(places, out, packing="off", epochs=1, **parameters)
    return fed


def test_sorted_by_length_feeds_the_shortest_documents_first(places: dict[str, Path], tmp_path: Path) -> None:
    up = row_lengths(places, tmp_path / "up", order="sorted")
    down = row_lengths(places, tmp_path / "down", order="sorted", descending=True)
    assert up == sorted(up) and down == sorted(down, reverse=True) and len(set(up)) > 3


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("packing", ["off", "wrap"])
def test_an_order_arrives_in_the_steps_as_it_was_made(
    places: dict[str, Path], tmp_path: Path, packing: str, descending: bool
) -> None:
    mixture = {"weights": {"long": 1, "short": 1}, "repeat": 3}
    common = {"order": "sorted", "sort_by": "loss", "descending": descending, "packing": packing}
    outcome, _ = train(places, tmp_path / "run", mixture=mixture, max_tokens=1500, **common)
    found = outcome.metrics
    assert found["curriculum.breaks"] == 0 < found["curriculum.rows"]
    plain, _ = train(places, tmp_path / "plain", epochs=1, **common)
    first, last = plain.metrics["curriculum.first"], plain.metrics["curriculum.last"]
    assert first > last if descending else first < last


def test_an_order_that_is_shuffled_behind_it_is_told(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puna.train import loader

    plain = loader.Feed._order
    monkeypatch.setattr(loader.Feed, "_order", lambda self, epoch: plain(self, epoch)[::-1])
    outcome, _ = train(places, tmp_path / "run", order="sorted", packing="off", epochs=1)
    assert outcome.metrics["curriculum.breaks"] > 10


def test_sorted_by_loss_feeds_what_the_model_finds_easy_first_and_keeps_its_order(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puna.train import prepare

    trained, _ = train(
        places, tmp_path / "short", mixture={"weights": {"short": 1, "long": 0}}, max_tokens=600
    )
    of = {**places, "model": trained.outputs["model"]}
    settings = {"order": "sorted", "sort_by": "loss", "epochs": 1}
    train(of, tmp_path / "run", **settings)
    stored = json.loads((tmp_path / "run" / "order.json").read_text())["losses"]["all"]
    assert len(stored) == 160
    assert sum(stored[40:]) / 120 < sum(stored[:40]) / 40 - 0.3, "the model was trained on the second corpus"
    model = pretrained.load(of["model"], dtype="float32")
    assert model.tokenizer is not None
    ids = torch.tensor([encode_document(model.tokenizer, _text(places["short"], 0)).ids])
    with torch.no_grad():
        logits = model(ids).float().log_softmax(-1)[0, :-1]
    expected = -logits.gather(1, ids[0, 1:, None]).mean()
    assert stored[40] == pytest.approx(float(expected), rel=1e-4)
    monkeypatch.setattr(
        prepare, "document_losses", lambda *_, **__: pytest.fail("losses were measured again")
    )
    train(of, tmp_path / "run", **settings)


def _text(corpus: Path, number: int) -> str:
    from puna.data.corpus import Corpus

    return next(row["text"] for place, row in enumerate(Corpus.open(corpus).rows()) if place == number)


# ---- every option, every mistake ---------------------------------------------------------------------------


MIXTURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "by": ({}, {"by": "source"}),
    "weights": ({**EQUAL, "epoch_tokens": 300}, {"weights": {"long": 2, "short": 1}}),
    "phases": (
        {"phases": [{"tokens": 300, "weights": {"long": 1, "short": 1}}]},
        {"phases": [{"tokens": 300, "weights": {"long": 1, "short": 3}}]},
    ),
    "epoch_tokens": ({"epoch_tokens": 300}, {"epoch_tokens": 400}),
    "draw": ({"epoch_tokens": 300}, {"draw": "anew"}),
    "repeat": ({**EQUAL, "when_short": "stop"}, {"repeat": 2}),
    "when_short": ({**EQUAL, "epoch_tokens": 300}, {"epoch_tokens": None, "when_short": "stop"}),
    "caps": ({}, {"caps": {"long": {"rows": 9}}}),
    "feedback": ({**EQUAL}, {"feedback": {"every_steps": 2}}),
}


def test_no_option_of_a_mixture_is_left_out() -> None:
    assert set(MIXTURES) == set(Mixture.model_fields)
    assert set(Cap.model_fields) == {"tokens", "rows", "task_tokens", "task_rows"}  # in test_sources.py
    assert set(Phase.model_fields) == {"weights", "tokens", "share"}  # in test_mixture.py
    assert set(Feedback.model_fields) == {"every_steps", "strength", "importance"}  # in test_mixture.py


@pytest.mark.parametrize("name", MIXTURES)
def test_flipping_an_option_of_a_mixture_changes_what_is_trained_on(
    places: dict[str, Path], tmp_path: Path, name: str
) -> None:
    besides, flip = MIXTURES[name]
    limits: dict[str, Any] = {"epochs": 2} if besides.get("epoch_tokens") and name != "when_short" else {}
    limits = {"max_steps": 6} if name == "feedback" else limits
    found = [
        weights(train(places, tmp_path / str(n), mixture={**besides, **changes}, **limits)[0])
        for n, changes in enumerate(({}, flip))
    ]
    assert any(not torch.equal(tensor, found[1][key]) for key, tensor in found[0].items())


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"mixture": EQUAL}, "needs to know how many tokens"),
        ({"mixture": EQUAL, "epochs": 2}, "needs to know how many tokens"),
        ({"mixture": {**EQUAL, "when_short": "stop"}, "epochs": 2}, "need mixture.epoch_tokens"),
        ({"mixture": {"phases": [{"tokens": 9, "weights": {"long": 1}}]}, "max_steps": 2}, "one limit"),
        ({"mixture": {"phases": [{"share": 1.0, "weights": {"long": 1}}]}}, "need max_tokens"),
        ({"mixture": {"feedback": {"every_steps": 2}}, "max_tokens": 99}, "feedback needs max_steps"),
        ({"mixture": {"weights": {"lang": 1}}, "max_tokens": 99}, "did you mean 'long'"),
        ({"mixture": {**EQUAL, "when_shrt": "stop"}}, "when_short"),
        ({"mixture": EQUAL, "max_tokens": 10**6}, "has no row left"),
        ({"order": "sorted", "packing": "fit"}, "'fit' puts long and short"),
        ({"sort_by": "loss"}, "means nothing with order 'shuffled'"),
        ({"order": "sorted", "mixture": {"epoch_tokens": 9, "draw": "anew"}}, "draws at random"),
        ({"schedule": [{"warmup": 2, "linear": 3}]}, "one shape"),
        ({"schedule": []}, "at least one segment"),
        ({"schedule": [{"constant": "rest"}, {"linear": 3}]}, "only the last"),
        ({"schedule": [{"constant": 0.7}, {"linear": 0.7}]}, "1.4 of the run"),
        ({"schedule": [{"constant": 3, "to": 0.5}]}, "to means nothing"),
        ({"schedule": [{"linear": "rest"}], "warmup_steps": 2}, "warmup_steps means nothing"),
        ({"schedule": [{"linear": 2}], "max_steps": 4}, "do not cover the run"),
        ({"schedule": "cosin"}, "schedule"),
    ],
)
def test_mistakes_are_told(
    places: dict[str, Path], tmp_path: Path, parameters: dict[str, Any], words: str
) -> None:
    with pytest.raises(PunaError) as error:
        train(places, tmp_path, **parameters)
    assert words in str(error.value)


def test_feedback_without_held_out_text_of_every_source_is_refused(
    places: dict[str, Path], tmp_path: Path
) -> None:
    inputs = {"model": str(places["model"]), "corpus": {"long": places["long"], "short": places["short"]}}
    inputs["held_out"] = {"long": places["held_long"]}  # type: ignore[assignment]
    parameters = {**SMALL, "mixture": {"feedback": {"every_steps": 2}}, "max_steps": 4}
    with pytest.raises(PunaError, match="'short' has no held-out text"):
        get_stage("train").function(Context("train", tmp_path, inputs), Train(**parameters))


# ---- segments ------------------------------------------------------------------------------------------


def test_segments_move_the_rate_as_they_say(places: dict[str, Path], tmp_path: Path) -> None:
    schedule = [{"warmup": 2}, {"constant": 0.25}, {"linear": 2, "to": 0.5}, {"decay": "rest"}]
    train(places, tmp_path, max_steps=8, schedule=schedule)
    rates = [line["learning_rate"] / 1e-2 for line in lines(tmp_path, "train")]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.5 * (1 - 0.5**0.5)])


@pytest.mark.parametrize(
    ("besides", "flip"),
    [
        ({"linear": "rest"}, {"start": 0.5}),
        ({"linear": "rest"}, {"to": 0.5}),
        ({"inverse_sqrt": "rest"}, {"timescale": 2}),
        ({"step": "rest", "step_size": 2}, {"step_size": 3}),
        ({"step": "rest", "step_size": 2}, {"gamma": 0.9}),
        ({"cosine": 1.0}, {"cosine": None, "decay": 1.0}),
    ],
)
def test_every_option_of_a_segment_is_read(besides: dict[str, Any], flip: dict[str, Any]) -> None:
    from puna.train.schedule import compose, factor

    def factors(segment: dict[str, Any]) -> list[float]:
        schedule = compose([ScheduleSegment(**segment).part()], 6)
        return [factor(step, schedule) for step in range(6)]

    assert factors(besides) != factors({**besides, **flip})


# ---- plans ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "tokens"),
    [
        ({"mixture": {**EQUAL, "when_short": "stop"}}, 800),
        ({"mixture": {**EQUAL, "when_short": "stop", "repeat": 2}}, 1600),
        ({"mixture": {"epoch_tokens": 300}, "epochs": 3}, 900),
        ({"mixture": {"phases": [{"tokens": 70, "weights": {"long": 1, "short": 1}}] * 2}}, 140),
        ({"mixture": EQUAL, "max_tokens": 500}, 500),
        ({"mixture": {"caps": {"long": {"tokens": 100}}}, "epochs": 2}, 1000),
    ],
)
def test_plans_know_the_tokens_of_a_mixture(parameters: dict[str, Any], tokens: float) -> None:
    class Shapes:
        spec = None
        corpora: Mapping[str, float] = {"corpus.long": 1000.0, "corpus.short": 400.0}

        def tokens_of(self, name: str) -> float:
            return sum(self.corpora.values())

    assert plan_train(Train(**{**SMALL, **parameters}), Shapes()).tokens == tokens
