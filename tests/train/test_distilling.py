"""The objective ``distill`` of the stage ``train``: learning from another model, live or stored."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from little_preferences import sentence
from safetensors.torch import load_file

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import write_corpus
from puna.model.attention import lay_out
from puna.text import pretrained
from puna.text.packing import IGNORED, Batch
from puna.text.template import Template
from puna.train.distillation import kl
from puna.train.loader import MicroBatch
from puna.train.loop import Loop
from puna.train.metrics import read_metrics
from puna.train.teacher import Distill, DistillSettings

CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SMALL: dict[str, Any] = {
    "objective": "distill",
    "batch_tokens": 64,
    "micro_batch_tokens": 64,
    "max_length": 32,
    "learning_rate": 1e-2,
    "dtype": "float32",
    "save_dtype": "float32",
    "max_steps": 6,
}
Train = Callable[..., Outcome]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Path]:
    """A teacher, a student of half its blocks, and corpora of documents and conversations."""
    from puna.edit.shorten import shorten
    from puna.model.llama import Llama
    from puna.model.slicing import sliced
    from puna.model.spec import BlockSpec, LlamaSpec
    from puna.model.units import Kept, Unit

    root = tmp_path_factory.mktemp("distilling")
    block = BlockSpec(heads=4, kv_heads=2, head_dim=8, width=48)
    spec = LlamaSpec(vocab_size=320, hidden_size=32, blocks=(block,) * 4, tied=True, max_positions=64)
    teacher = Llama(spec)
    with torch.no_grad():
        for parameter in teacher.parameters():  # lively logits: a fresh model knows next to nothing
            if parameter.dim() == 2:
                parameter.mul_(6.0)
    teacher.tokenizer = tiny_tokenizer
    teacher.template = Template(CHAT, tiny_tokenizer.template_strings)
    pretrained.save(teacher, root / "teacher")
    pretrained.save(shorten(teacher, (0, 3)), root / "student")
    channels = [Unit("channel", layer, number) for layer in range(4) for number in range(30)]
    pretrained.save(sliced(teacher, Kept.everything(spec).without(channels)), root / "thin")
    generator = numpy_generator(0, "distilling")
    about: dict[str, Any] = {"provenance": [{"source": "test", "licence": "CC0"}], "ledger": {}}
    rows = (
        {"id": f"d{n}", "text": sentence(generator, 4 + n % 9), "source": "test", "language": "en"}
        for n in range(30)
    )
    write_corpus(root / "documents", "documents", rows, **about)
    talks = (
        {
            "id": f"talk{n}",
            "messages": [
                {"role": "user", "content": sentence(generator, 3)},
                {"role": "assistant", "content": sentence(generator, 2)},
            ],
            "source": "test",
            "language": "en",
        }
        for n in range(20)
    )
    write_corpus(root / "messages", "messages", talks, **about)
    return {name: root / name for name in ("teacher", "student", "thin", "documents", "messages")}


@pytest.fixture
def train(places: dict[str, Path]) -> Train:
    """``train(out, model=..., teacher=..., older=..., corpus=..., **parameters)`` runs the stage."""

    def run(
        out: Path,
        *,
        model: str = "student",
        teacher: str | None = "teacher",
        older: str | None = None,
        corpus: str = "documents",
        **parameters: Any,
    ) -> Outcome:
        inputs: dict[str, Any] = {"model": str(places[model]), "corpus": {"main": places[corpus]}}
        if teacher is not None:
            inputs["teacher"] = str(places.get(teacher, teacher))
        if older is not None:
            inputs["older"] = str(places[older])
        stage = get_stage("train")
        settings = validate(stage.parameters, {**SMALL, **parameters}, where="test")
        return stage.function(Context("distil", out, inputs), settings)

    return run


def weights(outcome: Outcome) -> dict[str, torch.Tensor]:
    return load_file(outcome.outputs["model"] / "model.safetensors")


def assert_same_weights(one: Outcome, other: Outcome) -> None:
    found, expected = weights(one), weights(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("settings", [{}, {"divergence": "reverse"}, {"temperature": 2.0}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_teacher_teaches_itself_nothing(
    places: dict[str, Path], train: Train, tmp_path: Path, dtype: str, settings: dict[str, Any]
) -> None:
    outcome = train(tmp_path, model="teacher", dtype=dtype, max_steps=2, **settings)
    assert outcome.metrics["loss.first"] == outcome.metrics["loss.last"] == 0.0
    before = pretrained.load(places["teacher"], dtype=dtype).state_dict()
    assert all(torch.equal(before[name].float(), tensor) for name, tensor in weights(outcome).items())


def test_a_teacher_teaches_itself_next_to_nothing_over_its_likeliest_tokens(
    train: Train, tmp_path: Path
) -> None:
    """Not nothing: what is kept of a teacher are log-probabilities, rounded once."""
    outcome = train(tmp_path, model="teacher", top_k=8, max_steps=1)
    assert 0.0 <= outcome.metrics["loss.first"] < 1e-6


@pytest.mark.parametrize("corpus", ["documents", "messages"])
def test_the_student_comes_nearer_to_its_teacher(
    places: dict[str, Path], train: Train, tmp_path: Path, corpus: str
) -> None:
    objective = {"documents": "distill", "messages": "distill_sft"}[corpus]
    outcome = train(tmp_path, corpus=corpus, objective=objective, max_steps=40)
    assert outcome.metrics["loss.last"] < 0.6 * outcome.metrics["loss.first"]
    if corpus == "messages":
        return
    teacher = pretrained.load(places["teacher"]).eval()
    ids = torch.tensor([teacher.tokenizer.encode("the cat sat on that mat")])
    with torch.no_grad():
        apart = [
            float(kl(pretrained.load(path).eval()(ids), teacher(ids), "forward").mean())
            for path in (places["student"], outcome.outputs["model"])
        ]
    assert apart[1] < 0.8 * apart[0]


def test_the_loss_is_the_mean_divergence_of_what_is_learnt(
    places: dict[str, Path], train: Train, tmp_path: Path
) -> None:
    steps = train(
        tmp_path, corpus="messages", objective="distill_sft", max_steps=1, batch_tokens=10_000, packing="off"
    )
    student, teacher = (pretrained.load(places[name]).eval() for name in ("student", "teacher"))
    from puna.data.corpus import Corpus
    from puna.text.encode import encode_rows

    found = []
    for row in encode_rows(
        Corpus.open(places["messages"]).rows(), "messages", student.tokenizer, student.template
    ):
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            apart = kl(student(ids), teacher(ids), "forward")[0, :-1]
        found.append(apart[torch.tensor(row.trained[1:])])
    assert steps.metrics["loss.first"] == pytest.approx(float(torch.cat(found).mean()), abs=1e-5)


@pytest.mark.parametrize("recompute", [0, 3])
def test_hidden_states_behind_every_layer_count_where_there_are_labels(
    places: dict[str, Path], train: Train, tmp_path: Path, recompute: int
) -> None:
    settings = {"model": "thin", "max_steps": 1, "batch_tokens": 10_000, "micro_batch_tokens": 10_000}
    plain = train(tmp_path / "plain", **settings)
    with_states = train(tmp_path / "states", hidden_cosine=0.5, recompute=recompute, **settings)
    student, teacher = (pretrained.load(places[name]).eval() for name in ("thin", "teacher"))
    from puna.data.corpus import Corpus
    from puna.text.encode import encode_rows
    from puna.text.packing import collate, pack

    rows = encode_rows(Corpus.open(places["documents"]).rows(), "documents", student.tokenizer, None)
    batch = collate(pack(rows, 32, mode="wrap"))
    layout = lay_out(*batch.input_ids.shape, batch.input_ids.device, batch.positions, batch.segments, None)
    with torch.no_grad():
        streams = [model.model.embed_tokens(batch.input_ids) for model in (student, teacher)]
        turns = student._rotations(layout.positions, torch.float32)
        apart = torch.zeros(())
        for blocks in zip(student.model.layers, teacher.model.layers, strict=True):
            streams = [block(h, turns, layout, None) for block, h in zip(blocks, streams, strict=True)]
            cosines = torch.nn.functional.cosine_similarity(*streams, dim=-1)
            apart += (1 - cosines)[batch.labels != IGNORED].mean()
    added = with_states.metrics["loss.first"] - plain.metrics["loss.first"]
    assert added == pytest.approx(0.5 * float(apart), rel=1e-4)


def test_what_the_text_goes_on_with_is_not_learnt(places: dict[str, Path]) -> None:
    """A language-model loss beside it raised the divergence in the paper: labels only say where."""
    student, teacher = (pretrained.load(places[name]).eval() for name in ("thin", "teacher"))
    ids = torch.arange(4, 34).view(2, 15)
    positions, segments = torch.arange(15).expand(2, 15), torch.zeros_like(ids)
    objective = Distill(DistillSettings(hidden_cosine=1.0), live=teacher)
    found = []
    for labels in (ids.roll(-1, 1), torch.full_like(ids, 5)):
        micro = MicroBatch(Batch(ids, labels, positions, segments), numpy.arange(2))
        found.append(objective(student, micro))
    assert torch.equal(found[0].tokens, found[1].tokens)


def test_a_stored_teacher_gives_the_bits_of_a_live_one(train: Train, tmp_path: Path) -> None:
    settings = {"top_k": 16, "micro_batch_tokens": 32, "max_steps": 20}  # more than an epoch
    live = train(tmp_path / "live", **settings)
    stored = train(tmp_path / "stored", store_teacher=True, **settings)
    assert_same_weights(live, stored)
    assert live.metrics["loss.last"] == stored.metrics["loss.last"]


def test_a_stored_teacher_is_not_asked_again(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"top_k": 16, "store_teacher": True, "max_steps": 3}
    first = train(tmp_path, **settings)
    shutil.rmtree(tmp_path / "checkpoints")
    read = (tmp_path / "teacher" / "teacher.json").stat().st_mtime_ns
    assert_same_weights(first, train(tmp_path, **settings))
    assert (tmp_path / "teacher" / "teacher.json").stat().st_mtime_ns == read
    shutil.rmtree(tmp_path / "checkpoints")
    train(tmp_path, **{**settings, "max_length": 24})
    assert (tmp_path / "teacher" / "teacher.json").stat().st_mtime_ns != read
    assert "made for something else" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{}, {"top_k": 16, "store_teacher": True}])
def test_a_killed_distillation_goes_on_to_the_same_bits(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    whole = train(tmp_path / "whole", save_steps=2, **settings)
    with monkeypatch.context() as patch:
        step = Loop._step

        def dying(self: Loop, *arguments: Any) -> Any:
            if self.state.step == 3:
                raise KeyboardInterrupt
            return step(self, *arguments)

        patch.setattr(Loop, "_step", dying)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed", save_steps=2, **settings)
    resumed = train(tmp_path / "killed", save_steps=2, **settings)
    assert_same_weights(whole, resumed)
    lines = [line for line in read_metrics(tmp_path / "killed" / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_teacher_gets_no_gradient_and_no_storage_of_one(
    places: dict[str, Path], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Distill] = []
    called = Distill.__call__

    def watched(self: Distill, *arguments: Any) -> Any:
        seen.append(self)
        return called(self, *arguments)

    monkeypatch.setattr(Distill, "__call__", watched)
    train(tmp_path, max_steps=1)
    teacher = seen[0].live
    assert teacher is not None and not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_a_teacher_with_other_words_is_refused(
    places: dict[str, Path], train: Train, tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    other = tiny_llama(vocab_size=352)
    other.tokenizer = tiny_tokenizer
    pretrained.save(other, tmp_path / "other")
    with pytest.raises(PunaError, match="share one vocabulary"):
        train(tmp_path / "run", teacher=str(tmp_path / "other"))


FLIPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "divergence": ({}, {"divergence": "reverse"}),
    "temperature": ({}, {"temperature": 2.0}),
    "top_k": ({}, {"top_k": 4}),
    "hidden_cosine": ({"model": "thin"}, {"hidden_cosine": 0.5}),
    "store_teacher": ({"top_k": 4}, {"store_teacher": True}),
    "compatible": ({}, {"compatible": {}, "older": "thin"}),
}


@pytest.mark.parametrize("name", FLIPS)
def test_flipping_an_option_of_distillation_changes_something(
    train: Train, tmp_path: Path, name: str
) -> None:
    besides, flip = FLIPS[name]
    before, after = (
        train(tmp_path / folder, max_steps=1, **settings)
        for folder, settings in (("before", besides), ("after", {**besides, **flip}))
    )
    if name == "store_teacher":
        assert [(tmp_path / folder / "teacher").exists() for folder in ("before", "after")] == [False, True]
    else:
        assert before.metrics["loss.first"] != after.metrics["loss.first"]


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"teacher": None}, "learns from a teacher"),
        ({"objective": "clm"}, "has no teacher"),
        ({"objective": "clm", "teacher": None, "top_k": 4}, "top_k means nothing"),
        ({"store_teacher": True}, "say how many with top_k"),
        ({"sharding": "full"}, "sharding"),
        ({"hidden_cosine": 1.0}, "a student of 2 layers of 32, a teacher of 4 of 32"),
        ({"model": "thin", "hidden_cosine": 1.0, "top_k": 4, "store_teacher": True}, "does not keep"),
        ({"objective": "distill_sft", "packing": "wrap"}, "packing 'wrap'"),
        ({"top_k": 1000}, "at most 320"),
    ],
)
def test_what_means_nothing_is_refused(
    train: Train, tmp_path: Path, parameters: dict[str, Any], said: str
) -> None:
    with pytest.raises(PunaError) as error:
        train(tmp_path, **parameters)
    assert said in str(error.value)


def test_the_plan_counts_the_teacher(places: dict[str, Path]) -> None:
    from puna.run.planner import plan

    def planned(teacher: bool, **parameters: Any) -> Any:
        inputs = {"model": str(places["student"]), "corpus": str(places["documents"])}
        if teacher:
            inputs["teacher"] = str(places["teacher"])
        objective = "distill" if teacher else "clm"
        stage = {"use": "train", "in": inputs, **SMALL, "objective": objective, **parameters}
        recipe = {"name": "x", "title": "x", "device": "cpu", "stages": {"student": stage}}
        return plan(recipe, device="cpu:laptop").stages[0]

    alone, taught = planned(False), planned(True)
    weights = 4 * pretrained.load(places["teacher"]).spec.parameter_count()
    assert taught.memory - alone.memory == pytest.approx(weights)
    assert taught.cost.flops > 1.2 * alone.cost.flops
    stored = planned(True, top_k=16, store_teacher=True)
    assert stored.memory == alone.memory
