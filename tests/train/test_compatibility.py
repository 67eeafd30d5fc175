"""Distillation that keeps what an earlier version had right, and adapters that are gone on with (S58)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from little_trainings import LORA, SMALL, weights, write_places

from puna.core.errors import PunaError
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.text import pretrained
from puna.text.encode import encode_rows
from puna.text.packing import IGNORED, Batch, collate, pack
from puna.train.compatibility import Compatible
from puna.train.distillation import kl
from puna.train.loader import MicroBatch
from puna.train.settings import Compatible as Settings
from puna.train.teacher import Distill, DistillSettings

Train = Callable[..., Outcome]
WHOLE = {"max_steps": 1, "batch_tokens": 4096, "micro_batch_tokens": 4096}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Path]:
    """A model, an older and a newer version, tuned on the conversations for more and more steps; corpora."""
    root = tmp_path_factory.mktemp("compatible")
    found = write_places(root, tiny_tokenizer)
    stage = get_stage("train")
    for name, steps in (("older", 30), ("model", 60), ("newer", 90)):
        settings = {**SMALL, "objective": "sft", "max_steps": steps}
        inputs = {"model": str(root / "model"), "corpus": {"main": found["messages"]}}
        context = Context(name, root / name, inputs)
        outcome = stage.function(context, validate(stage.parameters, settings, where="test"))
        found[name] = outcome.outputs["model"]
    return found


@pytest.fixture
def train(models: dict[str, Path]) -> Train:
    """``train(out, teacher=..., older=..., **parameters)`` distils on conversations by default."""

    def run(out: Path, *, inputs: dict[str, str] | None = None, **parameters: Any) -> Outcome:
        given = {"model": "model", "teacher": "newer", "older": "older"} if inputs is None else inputs
        stage = get_stage("train")
        chosen = {**SMALL, "objective": "distill_sft", "compatible": {}, **parameters}
        chosen = {key: value for key, value in chosen.items() if value is not ...}
        context = Context(
            "compatible",
            out,
            {
                "corpus": {"main": models["documents" if chosen["objective"] == "clm" else "messages"]},
                **{name: str(models.get(place, place)) for name, place in given.items()},
            },
        )
        return stage.function(context, validate(stage.parameters, chosen, where="test"))

    return run


def batch_of(models: dict[str, Path]) -> Batch:
    """All conversations in one batch, a row each."""
    from puna.data.corpus import Corpus

    model = pretrained.load(models["model"])
    rows = encode_rows(Corpus.open(models["messages"]).rows(), "messages", model.tokenizer, model.template)
    return collate(pack(rows, 64, mode="off"))


def opened(models: dict[str, Path], *names: str) -> list[Any]:
    return [pretrained.load(models[name]).eval() for name in names]


def objective_of(newer: Any, older: Any, where: Any = "student_wrong", **settings: Any) -> Compatible:
    said = DistillSettings(**settings)
    return Compatible(Distill(said, live=newer), Distill(said, live=older), where)


@pytest.mark.parametrize("where", ["student_wrong", "older_right", "everywhere"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_the_papers_formula(models: dict[str, Path], where: Any, temperature: float) -> None:
    """KL(teacher || student) at one temperature, of the older version where m is 1; prompts do not count."""
    student, newer, older = opened(models, "model", "newer", "older")
    batch = batch_of(models)
    learnt = batch.labels != IGNORED
    assert 0 < int(learnt.sum()) < learnt.numel() / 2  # prompts are left out
    found = objective_of(newer, older, where, temperature=temperature)(
        student, MicroBatch(batch, numpy.arange(len(batch.labels)))
    )
    with torch.no_grad():
        ours, new, old = (
            model(batch.input_ids, batch.positions, batch.segments)[learnt]
            for model in (student, newer, older)
        )
    gold = batch.labels[learnt]
    m = {
        "student_wrong": ours.argmax(-1) != gold,
        "older_right": old.argmax(-1) == gold,
        "everywhere": torch.ones_like(gold, dtype=torch.bool),
    }[where]
    assert where == "everywhere" or 0 < int(m.sum()) < len(m)
    from_older, from_newer = (kl(ours, one, "forward", temperature=temperature) for one in (old, new))
    expected = torch.where(m, from_older, from_newer)
    assert torch.allclose(found.tokens, expected, atol=1e-5)
    assert float(found.total.detach()) == pytest.approx(float(expected.sum()), rel=1e-5)
    assert int(found.figures["from_older"]) == int(m.sum())


def test_no_gradient_goes_through_the_mask(models: dict[str, Path]) -> None:
    student, newer, older = opened(models, "model", "newer", "older")
    batch = batch_of(models)
    learnt = batch.labels != IGNORED
    objective_of(newer, older)(student, MicroBatch(batch, numpy.arange(len(batch.labels)))).total.backward()
    found = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad()
    ours = student(batch.input_ids, batch.positions, batch.segments)[learnt]
    with torch.no_grad():
        new, old = (
            model(batch.input_ids, batch.positions, batch.segments)[learnt] for model in (newer, older)
        )
    m = (ours.detach().argmax(-1) != batch.labels[learnt]).float()
    (m * kl(ours, old, "forward") + (1 - m) * kl(ours, new, "forward")).sum().backward()
    for name, parameter in student.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-4), name


def test_equal_versions_have_no_loss_and_no_gradient(
    models: dict[str, Path], train: Train, tmp_path: Path
) -> None:
    student, same, again = opened(models, "model", "model", "model")
    batch = batch_of(models)
    for where in ("student_wrong", "older_right", "everywhere"):
        loss = objective_of(same, again, where)(student, MicroBatch(batch, numpy.arange(len(batch.labels))))
        loss.total.backward()
        assert float(loss.total.detach()) == 0.0
        assert all(float(parameter.grad.abs().max()) == 0.0 for parameter in student.parameters())
    outcome = train(tmp_path, inputs={"model": "model", "teacher": "model", "older": "model"})
    before = pretrained.load(models["model"]).state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(outcome).items())


def test_the_older_version_everywhere_is_plain_distillation_from_it(train: Train, tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", inputs={"model": "model", "teacher": "older"}, compatible=...)
    both = train(tmp_path / "both", compatible={"where": "everywhere"})
    found, expected = weights(both), weights(plain)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert both.metrics["loss.last"] == plain.metrics["loss.last"]


def test_the_mask_follows_the_student(models: dict[str, Path], train: Train, tmp_path: Path) -> None:
    """What the student has learnt by a later step is no longer taken from the older version."""
    taught = train(
        tmp_path / "taught", inputs={"model": "model"}, objective="sft", compatible=..., max_steps=40
    )
    student, newer, older = opened(models, "model", "newer", "older")
    learned = pretrained.load(taught.outputs["model"]).eval()
    batch = batch_of(models)
    shares = []
    for one in (student, learned):
        with torch.no_grad():
            said = one(batch.input_ids, batch.positions, batch.segments).argmax(-1)
        learnt = batch.labels != IGNORED
        loss = objective_of(newer, older)(one, MicroBatch(batch, numpy.arange(len(batch.labels))))
        assert int(loss.figures["from_older"]) == int((said != batch.labels)[learnt].sum())
        shares.append(int(loss.figures["from_older"]))
    assert shares[1] < shares[0]


def test_stored_teachers_give_the_bits_of_live_ones(train: Train, tmp_path: Path) -> None:
    settings = {"top_k": 320, "packing": "off", "micro_batch_tokens": 32, "max_steps": 20}  # over an epoch
    live = train(tmp_path / "live", **settings)
    stored = train(tmp_path / "stored", store_teacher=True, **settings)
    found, expected = weights(stored), weights(live)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for name in ("teacher", "older"):
        assert (tmp_path / "stored" / name / "teacher.json").is_file()


def test_cross_entropy_is_added_by_its_weight(models: dict[str, Path], train: Train, tmp_path: Path) -> None:
    sft = train(tmp_path / "sft", inputs={"model": "model"}, objective="sft", compatible=..., **WHOLE)
    plain, heavier = (
        train(tmp_path / str(weight), compatible={"cross_entropy": weight}, **WHOLE) for weight in (0.0, 0.5)
    )
    added = heavier.metrics["loss.first"] - plain.metrics["loss.first"]
    assert added == pytest.approx(0.5 * sft.metrics["loss.first"], rel=1e-4)


FLIPS: dict[str, Any] = {"where": "older_right", "cross_entropy": 0.5}


@pytest.mark.parametrize("name", FLIPS)
def test_flipping_an_option_changes_the_weights(train: Train, tmp_path: Path, name: str) -> None:
    assert set(FLIPS) == set(Settings.model_fields)
    before = weights(train(tmp_path / "before"))
    after = weights(train(tmp_path / "after", compatible={name: FLIPS[name]}))
    assert any(not torch.equal(tensor, after[key]) for key, tensor in before.items())


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"inputs": {"model": "model", "teacher": "newer"}}, "no earlier version to learn from"),
        ({"compatible": ...}, "nothing is learnt from the earlier version"),
        ({"inputs": {"model": "model"}, "objective": "sft"}, "compatible means nothing"),
        ({"hidden_cosine": 0.5}, "hidden_cosine does not go with compatible"),
        ({"compatible": {"where": "elsewhere"}}, "student_wrong"),
    ],
)
def test_what_means_nothing_is_refused(
    train: Train, tmp_path: Path, parameters: dict[str, Any], said: str
) -> None:
    with pytest.raises(PunaError) as error:
        train(tmp_path, **parameters)
    assert said in str(error.value)


def test_an_older_version_with_other_words_is_refused(
    models: dict[str, Path], train: Train, tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    other = tiny_llama(vocab_size=352)
    other.tokenizer = tiny_tokenizer
    pretrained.save(other, tmp_path / "other")
    with pytest.raises(PunaError, match="share one vocabulary") as error:
        train(
            tmp_path / "run", inputs={"model": "model", "teacher": "newer", "older": str(tmp_path / "other")}
        )
    assert str(tmp_path / "other") in str(error.value)


def test_the_plan_counts_both_teachers(models: dict[str, Path]) -> None:
    from puna.run.planner import plan

    def planned(**inputs: str) -> Any:
        given = {name: str(models[place]) for name, place in inputs.items()}
        stage = {
            "use": "train",
            "in": {"model": str(models["model"]), "corpus": str(models["messages"]), **given},
            **SMALL,
            "objective": "distill_sft",
            **({"compatible": {}} if "older" in inputs else {}),
        }
        recipe = {"name": "x", "title": "x", "device": "cpu", "stages": {"student": stage}}
        return plan(recipe, device="cpu:laptop").stages[0]

    one, two = planned(teacher="newer"), planned(teacher="newer", older="older")
    held = 4 * pretrained.load(models["older"]).spec.parameter_count()
    assert two.memory - one.memory == pytest.approx(held)
    assert two.cost.flops > 1.1 * one.cost.flops


@pytest.fixture(scope="module")
def tuned(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A LoRA of a few steps on the conversations, and the model with it."""
    stage = get_stage("train")
    settings = {**SMALL, "objective": "sft", "lora": LORA, "max_steps": 20}
    inputs = {"model": str(models["model"]), "corpus": {"main": models["messages"]}}
    context = Context("tuned", tmp_path_factory.mktemp("tuned"), inputs)
    return stage.function(context, validate(stage.parameters, settings, where="test"))


def test_an_adapter_is_gone_on_with(
    models: dict[str, Path], train: Train, tmp_path: Path, tuned: Outcome
) -> None:
    plain = {"objective": "sft", "compatible": ..., **WHOLE}
    merged = train(tmp_path / "merged", inputs={"model": str(tuned.outputs["model"])}, **plain)
    inputs = {"model": "model", "adapter": str(tuned.outputs["adapter"])}
    gone_on = train(tmp_path / "on", inputs=inputs, lora=LORA, **plain)
    afresh = train(tmp_path / "afresh", inputs={"model": "model"}, lora=LORA, **plain)
    assert gone_on.metrics["loss.first"] == pytest.approx(merged.metrics["loss.first"], rel=1e-5)
    assert gone_on.metrics["loss.first"] < 0.99 * afresh.metrics["loss.first"]
    from safetensors.torch import load_file

    files = [load_file(one.outputs["adapter"] / "adapter_model.safetensors") for one in (tuned, gone_on)]
    assert {name: tensor.shape for name, tensor in files[0].items()} == {
        name: tensor.shape for name, tensor in files[1].items()
    }


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        ("model", {"lora": {**LORA, "r": 4}}, "another form than lora says"),
        ("model", {"lora": {**LORA, "alpha": 4.0}}, "alpha"),
        ("model", {"lora": {**LORA, "target": ["q_proj"]}}, "another form than lora says"),
        ("newer", {"lora": LORA}, "trained on another model"),
        ("model", {}, "needs lora"),
        ("model", {"lora": LORA, "keep_zeros": True}, "needs lora"),
    ],
)
def test_an_adapter_of_another_form_or_base_is_refused(
    train: Train, tmp_path: Path, tuned: Outcome, model: str, settings: dict[str, Any], said: str
) -> None:
    inputs = {"model": model, "adapter": str(tuned.outputs["adapter"])}
    with pytest.raises(PunaError) as error:
        train(tmp_path, inputs=inputs, objective="sft", compatible=..., **settings)
    assert said in str(error.value)


def test_a_whole_model_is_no_adapter(train: Train, tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="not a LoRA to go on with"):
        train(
            tmp_path,
            inputs={"model": "model", "adapter": "newer"},
            objective="sft",
            compatible=...,
            lora=LORA,
        )
