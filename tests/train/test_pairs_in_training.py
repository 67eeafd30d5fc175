"""Preference objectives in the stage ``train``: the reference, exact starts, resume, what is learnt."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from little_preferences import write_preferences
from safetensors.torch import load_file

from puna.core.errors import PunaError
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import write_corpus
from puna.model.adapters import LoraSettings, adapter_disabled, add_lora
from puna.text import pretrained
from puna.text.packing import pack
from puna.text.template import Template
from puna.train import preferences
from puna.train.distributed import World
from puna.train.held_out import passes
from puna.train.loader import Feed
from puna.train.loop import measuring
from puna.train.metrics import read_metrics
from puna.train.objectives import OBJECTIVES
from puna.train.preferences import FIGURES, Answers, Reference, answer_log_probs, trained_passes
from puna.train.settings import WITH_REFERENCE
from puna.train.stages import Train
from puna.train.train_plan import plan_train

CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
OF_PAIRS = [name for name, objective in OBJECTIVES.items() if objective.unit == "pairs"]
SMALL: dict[str, Any] = {
    "objective": "dpo",
    "max_steps": 6,
    "batch_tokens": 320,
    "micro_batch_tokens": 160,
    "max_length": 160,
    "learning_rate": 1e-3,
    "schedule": "constant",
    "dtype": "float32",
    "save_dtype": "float32",
    "lora": {"r": 4, "alpha": 8.0},
}
TIMES = {"seconds", "tokens_per_second", "targets_per_second", "peak_memory"}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Path]:
    """A model folder, pairs to train on and to hold out, and held-out text."""
    from puna.core.seeds import torch_generator
    from puna.model.llama import Llama
    from puna.model.spec import BlockSpec, LlamaSpec

    root = tmp_path_factory.mktemp("pairs")
    block = BlockSpec(heads=4, kv_heads=2, head_dim=8, width=48)
    spec = LlamaSpec(vocab_size=320, hidden_size=32, blocks=(block, block), tied=True, max_positions=256)
    model = Llama(spec, generator=torch_generator(0, "tiny"))
    model.tokenizer = tiny_tokenizer
    model.template = Template(CHAT, tiny_tokenizer.template_strings)
    pretrained.save(model, root / "model")
    write_preferences(root / "pairs", 40)
    write_preferences(root / "held_out", 12, seed=1, name="other")
    text = [{"id": f"{n}", "text": "the cat sat on that mat", "source": "t", "language": "en"} for n in "ab"]
    about = [{"source": "t", "licence": "CC0"}]
    write_corpus(root / "text", "documents", text, provenance=about, ledger={})
    return {name: root / name for name in ("model", "pairs", "held_out", "text")}


Run = Callable[..., Outcome]


@pytest.fixture
def run(places: dict[str, Path], tmp_path: Path) -> Run:
    """``run(name, **parameters)`` is the outcome of the stage in a folder of that name."""

    def start(name: str, *, held_out: tuple[str, ...] = ("held_out",), **parameters: Any) -> Outcome:
        inputs: dict[str, Any] = {"model": str(places["model"]), "corpus": {"main": places["pairs"]}}
        inputs["held_out"] = {key: places[key] for key in held_out}
        settings = {key: value for key, value in {**SMALL, **parameters}.items() if value is not ...}
        stage = get_stage("train")
        context = Context("tune", tmp_path / name, inputs, dtype="float32")
        return stage.function(context, validate(stage.parameters, settings, where="test"))

    return start


def lines_of(folder: Path) -> list[dict[str, Any]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [line for line in lines_of(folder) if line["kind"] == "train"]


def weights(outcome: Outcome) -> dict[str, torch.Tensor]:
    return load_file(outcome.outputs["model"] / "model.safetensors")


def packed_pairs(places: dict[str, Path], model: Any, name: str = "pairs") -> Any:
    from puna.data.corpus import Corpus
    from puna.text.encode import encode_rows

    rows = Corpus.open(places[name]).rows()
    encoded = encode_rows(rows, "preferences", model.tokenizer, model.template)
    return pack(encoded, SMALL["max_length"], mode="fit", group=2)


@pytest.mark.parametrize("lora", [SMALL["lora"], None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_step_has_loss_ln_2_and_margin_0_exactly(
    run: Run, tmp_path: Path, dtype: str, lora: Any
) -> None:
    outcome = run("run", dtype=dtype, lora=lora)
    first = steps_of(tmp_path / "run")[0]
    assert first["margin"] == first["chosen_reward"] == first["rejected_reward"] == 0.0
    assert first["accuracy"] == 0.5  # a tie counts half
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert outcome.metrics["loss.first"] == first["loss"] and outcome.metrics["margin.first"] == 0.0
    assert outcome.metrics["before.held_out.margin"] == 0.0
    assert outcome.metrics["before.held_out.loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert steps_of(tmp_path / "run")[-1]["margin"] != 0.0


def test_the_reference_is_the_adapter_switched_off_and_a_copy_of_the_model_bit_for_bit(
    places: dict[str, Path], run: Run, tmp_path: Path
) -> None:
    """Also after the adapter has moved, with embeddings that were trained beside it."""
    run("run", max_steps=..., epochs=1)
    stored = load_file(tmp_path / "run" / "reference.safetensors")
    copy, adapted = pretrained.load(places["model"]), pretrained.load(places["model"])
    add_lora(adapted, LoraSettings(4, 8.0, full=("embed_tokens",)), seed=0, keep_base=True)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "embed_tokens" in name:
                parameter.add_(0.1)
    packed = packed_pairs(places, copy, "held_out")
    answers = Answers(packed)
    found = torch.full((3, len(answers)), torch.nan)
    for micro in passes(packed, SMALL["micro_batch_tokens"], World()):
        at = answers.places(micro.rows)
        with measuring(copy, copy.device):
            found[0, at] = answer_log_probs(copy, micro)[0]
        with measuring(adapted, copy.device):
            found[1, at] = answer_log_probs(adapted, micro)[0]
            with adapter_disabled(adapted):
                found[2, at] = answer_log_probs(adapted, micro)[0]
    assert torch.equal(found[0], stored["held_out.held_out"])
    assert torch.equal(found[0], found[2])
    assert (found[0] - found[1]).abs().min() > 0
    assert not stored["corpus"].isnan().any()


def test_answers_are_summed_each_by_itself_without_its_prompt(places: dict[str, Path]) -> None:
    model = pretrained.load(places["model"])
    packed = packed_pairs(places, model)
    assert max(len(row.slices) for row in packed) > 2
    numbers = [1, 0]
    micro = next(iter(passes([packed[n] for n in numbers], 400, World())))
    sums, counts, tokens = answer_log_probs(model, micro)
    expected, lengths = [], []
    for row in (packed[numbers[int(n)]] for n in micro.rows):
        for piece in row.slices:
            ids = torch.tensor([piece.document.ids])
            log_probs = model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            learnt = torch.tensor(piece.document.trained[1:])
            expected.append(log_probs[learnt].sum())
            lengths.append(int(learnt.sum()))
    torch.testing.assert_close(sums, torch.stack(expected), atol=1e-4, rtol=0)
    assert counts.tolist() == lengths and len(tokens) == sum(lengths)


def test_a_step_in_many_passes_equals_the_step_in_one(run: Run, tmp_path: Path) -> None:
    found = [
        weights(run(f"{micro}", micro_batch_tokens=micro, batch_tokens=640, lora=None, max_steps=3))
        for micro in (160, 640)
    ]
    for one, other in zip(*(steps_of(tmp_path / name) for name in ("160", "640")), strict=True):
        for figure in ("loss", *FIGURES):
            assert one[figure] == pytest.approx(other[figure], abs=1e-4), figure
    for name, tensor in found[0].items():
        assert (tensor - found[1][name]).abs().max() < 1e-4, name


def test_the_loss_of_a_step_is_the_mean_over_its_pairs(
    places: dict[str, Path], run: Run, tmp_path: Path
) -> None:
    run("run", objective="simpo", beta=3.0, target_margin=0.5, max_steps=1, batch_tokens=10_000)
    model = pretrained.load(places["model"])
    losses = []
    for row in packed_pairs(places, model):
        means = []
        for piece in row.slices:
            ids = torch.tensor([piece.document.ids])
            log_probs = model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            means.append(log_probs[torch.tensor(piece.document.trained[1:])].mean().detach())
        for chosen, rejected in zip(means[::2], means[1::2], strict=True):
            losses.append(-torch.nn.functional.logsigmoid(3.0 * (chosen - rejected) - 0.5))
    assert len(losses) == 40
    assert steps_of(tmp_path / "run")[0]["loss"] == pytest.approx(float(sum(losses)) / 40, abs=1e-5)


def test_a_planted_preference_is_learnt(run: Run, tmp_path: Path) -> None:
    metrics = run("run", max_steps=30, learning_rate=5e-3).metrics
    assert metrics["after.held_out.margin"] > 0.1 and metrics["after.held_out.accuracy"] > 0.9
    assert metrics["after.held_out.ranking_accuracy"] > metrics["before.held_out.ranking_accuracy"]
    assert metrics["after.held_out.loss"] < math.log(2) - 0.05
    last = steps_of(tmp_path / "run")[-1]
    assert last["margin"] == pytest.approx(last["chosen_reward"] - last["rejected_reward"], abs=1e-5)
    assert last["chosen_log_prob"] < 0 and last["rejected_log_prob"] < 0


@pytest.mark.parametrize("objective", OF_PAIRS)
def test_every_objective_trains_and_only_some_have_a_reference(
    run: Run, tmp_path: Path, objective: str
) -> None:
    metrics = run("run", objective=objective, max_steps=30, learning_rate=5e-3).metrics
    assert metrics["after.held_out.loss"] < metrics["before.held_out.loss"]
    assert metrics["after.held_out.margin"] > metrics["before.held_out.margin"]
    assert metrics["after.held_out.accuracy"] >= metrics["before.held_out.accuracy"]
    assert (tmp_path / "run" / "reference.safetensors").exists() == (objective in WITH_REFERENCE)


def test_a_killed_run_goes_on_bit_for_bit_without_another_reference(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"lora": {**SMALL["lora"], "dropout": 0.2}, "save_steps": 2, "max_steps": 8}
    whole = run("whole", **settings)
    plain, calls = preferences.Pairs.__call__, [0]

    def dying(self: Any, *inputs: Any) -> Any:
        calls[0] += torch.is_grad_enabled()
        if calls[0] == 10:
            raise KeyboardInterrupt
        return plain(self, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(preferences.Pairs, "__call__", dying)
        with pytest.raises(KeyboardInterrupt):
            run("killed", **settings)
    assert 0 < len(steps_of(tmp_path / "killed")) < 8
    monkeypatch.setattr(Reference, "_compute", lambda *_: pytest.fail("the reference was computed again"))
    resumed = weights(run("killed", **settings))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights(whole).items())
    assert lines_of(tmp_path / "killed") == lines_of(tmp_path / "whole")


@pytest.mark.parametrize("spoil", ["cut", "flip", "other rows", "other model"])
def test_a_stored_reference_of_no_use_is_named_and_computed_again(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: str
) -> None:
    model = pretrained.load(places["model"])
    rows = packed_pairs(places, model)
    feed = Feed(rows, batch_tokens=320, micro_batch_tokens=160, seed=0, unit="pairs")
    path = tmp_path / "reference.safetensors"

    def computed(recipe: str = "same", feed: Feed = feed) -> torch.Tensor:
        with measuring(model, model.device):
            corpora = {"corpus": trained_passes(feed, 100)}
            return Reference(path, {"weights": recipe}, World()).log_probs(model, corpora)["corpus"]

    first = computed()
    content = bytearray(path.read_bytes())
    assert torch.equal(computed(), first) and not capsys.readouterr().err
    if spoil == "cut":
        path.write_bytes(content[:-30])
    elif spoil == "flip":
        content[-3] ^= 1
        path.write_bytes(content)
    elif spoil == "other rows":
        fewer = Feed(rows[:-1], batch_tokens=320, micro_batch_tokens=160, seed=0, unit="pairs")
        assert len(computed(feed=fewer)) < len(first)
    else:
        computed("another")
    capsys.readouterr()
    assert torch.equal(computed(), first)
    told = "".join(capsys.readouterr().err.split())
    assert "reference.safetensors" in told and "computedagain" in told
    assert torch.equal(load_file(path)["corpus"], first)


def test_only_pairs_that_the_run_will_come_to_are_looked_at(run: Run, tmp_path: Path) -> None:
    run("run", max_steps=1)
    known = load_file(tmp_path / "run" / "reference.safetensors")["corpus"].isfinite()
    assert 0 < known.sum() < len(known)


def test_text_is_measured_as_text_beside_pairs(run: Run) -> None:
    metrics = run("run", held_out=("held_out", "text"), max_steps=2).metrics
    assert metrics["before.text.bits_per_byte"] > 0 and "before.text.margin" not in metrics


def test_curves_and_counts_of_pairs_are_reported(places: dict[str, Path], tmp_path: Path) -> None:
    stage = get_stage("train")
    inputs = {"model": str(places["model"]), "corpus": {"main": places["pairs"]}}
    context = Context("tune", tmp_path / "run", {**inputs, "held_out": {"nl": places["held_out"]}})
    stage.function(context, validate(stage.parameters, SMALL, where="test"))
    curves = {curve["title"]: curve for curve in context.report["curves"]}
    assert curves["Loss"]["y"] == "nats per pair"
    for title in ("Reward margin", "Pairs with a margin above 0"):
        assert [series["name"] for series in curves[title]["series"]] == ["training", "nl"]


def test_a_plan_counts_the_reference_pass(places: dict[str, Path]) -> None:
    class Shapes:
        spec = pretrained.load(places["model"]).spec
        dtype = "float32"
        processes = 1
        models: ClassVar[dict[str, Any]] = {}
        corpora: dict[str, float] = {"corpus.main": 1000.0}  # noqa: RUF012

        class device:
            name = "this"
            memory = 8e9

            @staticmethod
            def seconds(flops: float, dtype: str) -> float:
                return flops

            @staticmethod
            def read_seconds(size: float) -> float:
                return size

        def tokens_of(self, name: str) -> float:
            return self.corpora.get(f"{name}.main", 0.0)

    def flops(**changes: Any) -> float:
        return float(plan_train(Train(**{**SMALL, "max_steps": None, **changes}), Shapes()).flops)

    from puna.train.plan import forward_operations

    once = 1000 * forward_operations(Shapes.spec, SMALL["max_length"])
    assert flops() - flops(objective="simpo") == pytest.approx(once)
    assert flops(epochs=3) - flops(epochs=3, objective="simpo") == pytest.approx(once)


SCRIPT = """
    import sys
    from pathlib import Path
    from puna.core.stage import Context, get_stage, validate

    places, settings, out = eval(sys.argv[1]), eval(sys.argv[2]), Path(sys.argv[3])
    inputs = {"model": places["model"], "corpus": {"main": Path(places["pairs"])},
              "held_out": {"held_out": Path(places["held_out"])}}
    stage = get_stage("train")
    context = Context("tune", out, inputs, dtype="float32")
    stage.function(context, validate(stage.parameters, settings, where="test"))
"""


def start(places: dict[str, Path], out: Path, size: int, port: int) -> None:
    names = {name: str(path) for name, path in places.items()}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), repr(names), repr(SMALL), str(out)]
    processes = []
    for rank in range(size):
        place = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **place, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, env=environment))
    assert [process.wait(timeout=300) for process in processes] == [0] * size


def test_one_and_two_processes_agree(places: dict[str, Path], tmp_path: Path) -> None:
    import socket

    for size in (1, 2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        start(places, tmp_path / str(size), size, port)
    alone, together = (load_file(tmp_path / name / "reference.safetensors") for name in "12")
    for name, values in alone.items():
        assert torch.equal(values.isnan(), together[name].isnan())
        torch.testing.assert_close(values, together[name], atol=1e-4, rtol=0, equal_nan=True)
    assert steps_of(tmp_path / "2")[0]["margin"] == 0.0
    for one, two in zip(lines_of(tmp_path / "1"), lines_of(tmp_path / "2"), strict=True):
        for figure in one.keys() - {"kind"}:
            assert one[figure] == pytest.approx(two[figure], abs=1e-4, rel=1e-4), figure
    for name, tensor in load_file(tmp_path / "1" / "model" / "model.safetensors").items():
        other = load_file(tmp_path / "2" / "model" / "model.safetensors")[name]
        assert (tensor - other).abs().max() < 1e-4, name


def test_an_unknown_objective_of_pairs_is_told() -> None:
    with pytest.raises(PunaError, match="did you mean 'dpo'"):
        preferences.pair_loss("dpoo", {})
