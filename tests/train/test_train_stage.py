"""The stage ``train`` end to end on a tiny model, and every one of its options by what it changes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from little_trainings import LORA, SMALL, train, weights
from safetensors.torch import load_file

from puna.core.errors import PunaError
from puna.core.stage import Context
from puna.data.corpus import Corpus, write_corpus
from puna.model.adapter_files import read_adapter
from puna.model.nf4 import quantize_base, take_quantised
from puna.text import pretrained
from puna.train.checkpoint import Checkpoints
from puna.train.distributed import World
from puna.train.stages import Train


def test_lora_leaves_a_merged_model_and_an_adapter_that_agree(
    places: dict[str, Path], tmp_path: Path
) -> None:
    lora = {**LORA, "full": ["embed_tokens", "lm_head"]}
    outcome, context = train(places, tmp_path, held_out=True, lora=lora, max_steps=12)
    merged = pretrained.load(outcome.outputs["model"])
    adapted = pretrained.load(outcome.outputs["adapter"])
    base = pretrained.load(places["model"])
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        difference = (merged(ids) - adapted(ids)).abs().max()
        moved = (merged(ids) - base(ids)).abs().max()
    assert difference < 1e-5 < 1e-2 < moved
    assert merged.tokenizer is not None and merged.template is not None
    assert merged.spec == base.spec
    metrics = outcome.metrics
    assert metrics["start_difference"] == 0.0
    assert metrics["steps"] == 12 and metrics["loss.last"] < metrics["loss.first"]
    assert metrics["after.en.loss"] < metrics["before.en.loss"]
    assert metrics["after.en.bits_per_byte"] < metrics["before.en.bits_per_byte"]
    titles = [curve["title"] for curve in context.report["curves"]]
    assert titles == ["Loss", "Held-out text", "Learning rate", "Gradient norm"]
    assert [series["name"] for series in context.report["curves"][0]["series"]] == ["training", "en"]
    assert context.report["tables"][0]["rows"]
    json.dumps(context.report)


@pytest.mark.parametrize("kind", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_on_nf4_leaves_the_decoded_base_with_the_adapter_merged(
    places: dict[str, Path], tmp_path: Path, kind: dict[str, bool], dtype: str
) -> None:
    """What was trained is what is written; the codes are those of weights in the dtype of the training."""
    lora = {**LORA, **kind, "base": "nf4", "target": ["q_proj", "up_proj"]}
    outcome, _ = train(places, tmp_path, lora=lora, dtype=dtype, max_steps=8)
    merged = pretrained.load(outcome.outputs["model"])
    base = pretrained.load(places["model"])
    trained_on = pretrained.load(places["model"], dtype=dtype)
    quantize_base(trained_on)
    adapted = pretrained.load(places["model"])
    take_quantised(adapted, trained_on)
    read_adapter(adapted, outcome.outputs["adapter"])
    on_plain = pretrained.load(outcome.outputs["adapter"])
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert (merged(ids) - adapted(ids)).abs().max() < 1e-5
        assert (merged(ids) - on_plain(ids)).abs().max() > 1e-3
    untouched = merged.model.layers[0].self_attn.v_proj.weight  # no adapter, but decoded all the same
    assert not torch.equal(untouched, base.model.layers[0].self_attn.v_proj.weight)
    assert torch.equal(merged.head_weight, base.head_weight)
    metrics = outcome.metrics
    assert metrics["start_difference"] == 0.0 < metrics["nf4_difference"]
    assert metrics["loss.last"] < metrics["loss.first"]


def test_resume_on_nf4_compares_codes_and_scales(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puna.train import job

    lora = {**LORA, "base": "nf4"}
    whole, _ = train(places, tmp_path / "whole", lora=lora)
    with monkeypatch.context() as patch:
        patch.setattr(job, "write_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(places, tmp_path / "run", lora=lora, save_steps=2)
    other = pretrained.load(places["model"])
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)  # same codes, other scales
    pretrained.save(other, tmp_path / "other")
    with pytest.raises(PunaError, match="'weights' has changed"):
        train({**places, "model": tmp_path / "other"}, tmp_path / "run", lora=lora, save_steps=2)
    resumed, _ = train(places, tmp_path / "run", lora=lora, save_steps=2)
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())


def test_full_training_in_bfloat16_saves_its_masters(places: dict[str, Path], tmp_path: Path) -> None:
    outcome, _ = train(places, tmp_path, dtype="bfloat16", learning_rate=1e-5)
    assert set(outcome.outputs) == {"model"}
    found = weights(outcome)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    base = load_file(places["model"] / "model.safetensors")
    for name, tensor in found.items():
        change = (tensor - base[name].bfloat16().float()).abs().max()
        assert 0 < change < 1e-4, f"{name}: steps below bfloat16's resolution are in the masters"


def test_sft_trains_on_the_chosen_roles_alone(places: dict[str, Path], tmp_path: Path) -> None:
    one, _ = train(places, tmp_path / "one", objective="sft", max_steps=..., epochs=1)
    both, _ = train(
        places, tmp_path / "both", objective="sft", max_steps=..., epochs=1, train_on=["user", "assistant"]
    )
    assert one.metrics["tokens"] == both.metrics["tokens"]
    assert 0 < one.metrics["targets"] < both.metrics["targets"] < both.metrics["tokens"]


@pytest.mark.parametrize(("objective", "usual", "other"), [("clm", "wrap", "fit"), ("sft", "fit", "off")])
def test_packing_goes_by_the_objective(
    places: dict[str, Path], tmp_path: Path, objective: str, usual: str, other: str
) -> None:
    settings = {"objective": objective, "max_steps": 2, "max_length": 64}
    left_open, given, another = (
        weights(train(places, tmp_path / str(packing), packing=packing, **settings)[0])
        for packing in (None, usual, other)
    )
    assert all(torch.equal(tensor, given[name]) for name, tensor in left_open.items())
    assert any(not torch.equal(tensor, another[name]) for name, tensor in left_open.items())


def test_no_row_learns_an_answer_without_its_question(places: dict[str, Path]) -> None:
    from puna.train.job import _held_out_corpus
    from puna.train.prepare import sources_of

    model = pretrained.load(places["model"])
    settings = Train(**{**SMALL, "objective": "sft", "eval_tokens": None})
    context = Context("train", places["model"], {"corpus": {"main": places["messages"]}})
    learnt = sources_of(model, context, settings, seed=0, recipe={}, here=World())[0].rows
    measured = _held_out_corpus(model, Corpus.open(places["messages"]), settings).packed
    for packed in (learnt, measured):
        assert packed.report.cuts == 0
        assert all(piece.start == 0 for row in packed for piece in row.slices)


def test_the_adapter_of_an_earlier_stage_is_merged_before_training(
    places: dict[str, Path], tmp_path: Path
) -> None:
    first, _ = train(places, tmp_path / "first", lora=LORA)
    again = {**places, "model": first.outputs["adapter"]}
    with pytest.raises(PunaError, match="cannot be written"):
        train(again, tmp_path / "refused", lora=LORA)
    second, _ = train(again, tmp_path / "second", lora=LORA, save_adapter=False)
    same, _ = train({**places, "model": first.outputs["model"]}, tmp_path / "same", lora=LORA)
    for name, tensor in weights(second).items():
        torch.testing.assert_close(tensor, weights(same)[name], rtol=0, atol=1e-4)


def test_two_runs_of_one_seed_are_equal_and_another_stage_name_differs(
    places: dict[str, Path], tmp_path: Path
) -> None:
    lora = {**LORA, "dropout": 0.2}
    runs = [weights(train(places, tmp_path / name, lora=lora)[0]) for name in "ab"]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    other = weights(train(places, tmp_path / "c", lora=lora, name="lora2")[0])
    assert any(not torch.equal(runs[0][name], other[name]) for name in other)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"epochs": 1}, "epochs and max_steps"),
        ({"max_tokens": 10}, "max_steps and max_tokens"),
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "warmup_ratio and warmup_steps"),
        ({"max_length": 65}, "batch_tokens 64"),
        ({"batch_tokens": 128, "max_length": 65}, "micro_batch_tokens 64"),
        ({"gamma": 0.7}, "gamma means nothing"),
        ({"schedule": "constant", "min_learning_rate_ratio": 0.1}, "min_learning_rate_ratio means nothing"),
        ({"train_on": ["user"]}, "train_on means nothing"),
        ({"objective": "sft", "beta": 0.2}, "beta means nothing with objective 'sft'"),
        ({"objective": "ipo", "label_smoothing": 0.1}, "label_smoothing means nothing"),
        ({"objective": "dpo", "target_margin": 0.5}, "but with simpo"),
        ({"objective": "orpo", "likelihood_weight": 0.5}, "but with cpo"),
        ({"objective": "dpo", "train_on": ["user"]}, "train_on means nothing with objective 'dpo'"),
        ({"objective": "dpo", "packing": "wrap"}, "with objective 'dpo' take 'fit' or 'off'"),
        ({"objective": "dpo", "label_smoothing": 0.5}, "label_smoothing"),
        ({"objective": "sft", "packing": "wrap"}, "packing 'wrap' cuts conversations"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"lora": {"rank": 8}}, "rank"),
        ({"learning_rat": 1.0}, "learning_rate"),
        ({"eval_steps": 1}, "held_out"),
        ({"lora": {"target": ["nonsense"]}}, "nonsense"),
        ({"restore": "weights"}, "nothing to restore"),
        ({"stop_after": 5}, "stop_after lies beyond the last step"),
        ({"stop_after": 2, "state_after": 3}, "state_after lies beyond the last step"),
    ],
)
def test_mistakes_are_told(
    places: dict[str, Path], tmp_path: Path, parameters: dict[str, Any], words: str
) -> None:
    with pytest.raises(PunaError) as error:
        train(places, tmp_path, **parameters)
    assert words in str(error.value)


def test_a_corpus_of_the_wrong_kind_is_refused_with_the_objective_that_fits(
    places: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(PunaError, match="learns from a corpus of messages") as error:
        train({**places, "messages": places["documents"]}, tmp_path, objective="sft")
    assert "'clm, distill'" in str(error.value)
    with pytest.raises(PunaError, match="learns from a corpus of preferences") as error:
        train({**places, "preferences": places["messages"]}, tmp_path, objective="dpo")
    assert "'sft, distill_sft'" in str(error.value)
    with pytest.raises(PunaError, match="learns from a corpus of documents") as error:
        train({**places, "documents": places["preferences"]}, tmp_path)
    assert "dpo" in str(error.value) and "simpo" in str(error.value)


def test_save_steps_make_checkpoints(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puna.train.checkpoint import Checkpoints

    saved: list[int] = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, state, optimizer: saved.append(state.step))
    train(places, tmp_path / "a")
    train(places, tmp_path / "b", save_steps=2)
    train(places, tmp_path / "c", save_steps=3)
    assert saved == [4, 2, 4, 3, 4]


def test_the_plan_counts_what_the_stage_trains(places: dict[str, Path], tmp_path: Path) -> None:
    from puna.train.train_plan import plan_train

    class Shapes:
        spec = pretrained.load(places["model"]).spec
        dtype = "float32"
        processes = 1
        models: Mapping[str, Any] = {}
        corpora: Mapping[str, float] = {"corpus.main": 500.0, "held_out.en": 40.0}

        class device:
            name = "this"
            memory = 8e9

            @staticmethod
            def seconds(flops: float, dtype: str) -> float:
                return flops / 1e9

            @staticmethod
            def read_seconds(size: float) -> float:
                return size / 1e9

        def tokens_of(self, name: str) -> float:
            return self.corpora.get(f"{name}.main", 0.0)

    held = {**LORA, "base": "nf4"}
    for number, lora in enumerate((None, {**LORA, "dora": True}, held, LORA)):
        changes = {} if lora is None else {"lora": lora}
        outcome, _ = train(places, tmp_path / str(number), **changes)
        cost = plan_train(Train(**{**SMALL, **changes}), Shapes())
        assert cost.trainable == outcome.metrics["trainable"]
        assert cost.tokens == pytest.approx(outcome.metrics["tokens"], rel=0.1)
        assert cost.seconds == cost.flops / 1e9 and cost.memory > 0
    dropped = plan_train(Train(**{**SMALL, "lora": {**LORA, "dropout": 0.1}}), Shapes())
    assert dropped.seconds > cost.seconds and dropped.flops == cost.flops
    limits = {"max_steps": None, "epochs": 3}
    assert plan_train(Train(**{**SMALL, **limits}), Shapes()).tokens == 1500
    assert plan_train(Train(**{**SMALL, "max_steps": None, "max_tokens": 70}), Shapes()).tokens == 70
    often = plan_train(Train(**{**SMALL, "eval_steps": 1}), Shapes())
    assert often.flops > plan_train(Train(**SMALL), Shapes()).flops


def test_another_process_than_the_first_reads_nothing_that_the_first_may_have_moved(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puna.train import job

    @contextlib.contextmanager
    def second(_: str) -> Iterator[World]:
        yield World(rank=1)

    monkeypatch.setattr(job, "world", second)
    monkeypatch.setattr(Checkpoints, "save", lambda *_: None)  # all processes write one together
    outcome, context = train(places, tmp_path / "gone", lora=LORA)
    assert outcome.outputs["model"] == tmp_path / "gone" / "model"
    assert outcome.metrics == context.report == {}
    assert not (tmp_path / "gone").exists()


def test_markers_in_documents_are_tokens(places: dict[str, Path], tmp_path: Path) -> None:
    """A marked document has the tokens of its parts and one for each marker, and no more."""
    texts = ["<pad>the cat sat<|end|>on that mat" for _ in range(4)]
    rows = [{"id": f"{n}", "text": text, "source": "x", "language": "en"} for n, text in enumerate(texts)]
    about: dict[str, Any] = {"provenance": [{"source": "x", "licence": "CC0"}], "ledger": {}}
    marked = {**places, "documents": write_corpus(tmp_path / "marked", "documents", rows, **about).path}
    plain, _ = train(marked, tmp_path / "plain", max_steps=..., epochs=1)
    told, _ = train(marked, tmp_path / "told", max_steps=..., epochs=1, markers=["<pad>", "<|end|>"])
    assert told.metrics["tokens"] < plain.metrics["tokens"]
    with pytest.raises(PunaError, match="no special token of this tokenizer"):
        train(marked, tmp_path / "wrong", markers=["<fim>"])
    with pytest.raises(PunaError, match="markers means nothing with objective 'sft'"):
        train(places, tmp_path / "sft", objective="sft", markers=["<pad>"])
