"""The stage ``train`` end to end on a tiny model, and every one of its options by what it changes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from little_checkpoints import stored
from little_preferences import sentence, write_preferences
from safetensors.torch import load_file
from test_distilling import FLIPS as OF_DISTILLING

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import Corpus, write_corpus
from puna.model.adapter_files import read_adapter
from puna.model.nf4 import quantize_base, take_quantised
from puna.text import pretrained
from puna.text.template import Template
from puna.train.checkpoint import Checkpoints
from puna.train.distributed import World
from puna.train.metrics import read_metrics
from puna.train.objectives import OBJECTIVES
from puna.train.stages import Lora, Train

CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# A run of a few steps in a few hundred tokens.
SMALL: dict[str, Any] = {
    "max_steps": 4,
    "batch_tokens": 64,
    "micro_batch_tokens": 64,
    "max_length": 32,
    "learning_rate": 1e-2,
    "dtype": "float32",
    "save_dtype": "float32",
}
LORA = {"r": 2, "alpha": 8.0}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Path]:
    """A model folder and corpora of documents and of conversations."""
    from puna.model.llama import Llama
    from puna.model.spec import BlockSpec, LlamaSpec

    root = tmp_path_factory.mktemp("train-stage")
    block = BlockSpec(heads=4, kv_heads=2, head_dim=8, width=48)
    model = Llama(
        LlamaSpec(vocab_size=320, hidden_size=32, blocks=(block, block), tied=True, max_positions=64)
    )
    model.tokenizer = tiny_tokenizer
    model.template = Template(CHAT, tiny_tokenizer.template_strings)
    pretrained.save(model, root / "model")
    generator = numpy_generator(0, "stage")
    about = {"provenance": [{"source": "test", "licence": "CC0"}], "ledger": {}}
    for name, count in (("documents", 40), ("held_out", 6)):
        rows = (
            {"id": f"{name}{n}", "text": sentence(generator, 4 + n % 9), "source": "test", "language": "en"}
            for n in range(count)
        )
        write_corpus(root / name, "documents", rows, **about)
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
        for n in range(30)
    )
    write_corpus(root / "messages", "messages", talks, **about)
    write_preferences(root / "preferences", 20)
    return {name: root / name for name in ("model", "documents", "held_out", "messages", "preferences")}


def train(
    places: Mapping[str, Path],
    out: Path,
    *,
    held_out: bool = False,
    state: Path | None = None,
    seed: int = 0,
    name: str = "lora",
    **parameters: Any,
) -> tuple[Outcome, Context]:
    kind = OBJECTIVES[parameters.get("objective", "clm")].kind
    inputs: dict[str, Any] = {"model": str(places["model"]), "corpus": {"main": places[kind]}}
    if held_out:
        inputs["held_out"] = {"en": places["held_out"]}
    if state is not None:
        inputs["state"] = state
    stage = get_stage("train")
    context = Context(name, out, inputs, seed=seed, dtype="bfloat16")
    settings = {key: value for key, value in {**SMALL, **parameters}.items() if value is not ...}
    return stage.function(context, validate(stage.parameters, settings, where="test")), context


def weights(outcome: Outcome) -> dict[str, torch.Tensor]:
    return load_file(outcome.outputs["model"] / "model.safetensors")


def steps(out: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(out / "metrics.jsonl") if line["kind"] == "train"]


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
        patch.setattr(job, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
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


def test_resume_refuses_another_recipe_and_finishes_with_the_same(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puna.train import job

    whole, _ = train(places, tmp_path / "whole", lora=LORA)
    with monkeypatch.context() as patch:
        patch.setattr(job, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(places, tmp_path / "run", lora=LORA, save_steps=2)
    for changed, key in (
        ({"learning_rate": 2e-2}, "learning_rate"),
        ({"lora": {**LORA, "r": 4}}, "lora"),
        ({"seed": 9}, "seed"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"save_steps": 3}, "save_steps"),
    ):
        with pytest.raises(PunaError, match=f"'{key}' has changed"):
            train(places, tmp_path / "run", **{"lora": LORA, "save_steps": 2, **changed})
    other = {**places, "documents": places["held_out"]}
    with pytest.raises(PunaError, match="'corpus' has changed"):
        train(other, tmp_path / "run", lora=LORA, save_steps=2)
    resumed, _ = train(places, tmp_path / "run", lora=LORA, save_steps=2)
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())


def compared(out: Path, after: int) -> list[dict[str, Any]]:
    """Lines of metrics beyond a step, without what a clock gave."""
    timed = {"seconds", "tokens_per_second", "targets_per_second", "peak_memory"}
    lines = read_metrics(out / "metrics.jsonl")
    return [
        {key: value for key, value in line.items() if key not in timed}
        for line in lines
        if line["step"] > after
    ]


def test_a_state_handed_on_gives_what_the_whole_run_gives_and_its_weights_alone_do_not(
    places: dict[str, Path], tmp_path: Path
) -> None:
    """Under another name, whose own seed would order and drop otherwise; logging may differ."""
    same = {"lora": {**LORA, "dropout": 0.3}, "max_steps": 8}
    whole, _ = train(places, tmp_path / "whole", held_out=True, state_after=4, eval_steps=2, **same)
    half, _ = train(places, tmp_path / "half", stop_after=4, state_after="end", **same)
    assert half.metrics["steps"] == 4 and whole.metrics["steps"] == 8
    one, other = (stored(outcome.outputs["state"]) for outcome in (whole, half))
    assert one.keys() == other.keys() and "cpu/0" in one
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    ends = {}
    for restore in ("all", "weights"):
        settings = {**same, "restore": restore, "save_dtype": "float32", "state_after": "end"}
        resumed, _ = train(
            places, tmp_path / restore, name="other", state=half.outputs["state"], held_out=True, **settings
        )
        assert resumed.metrics["steps"] == 8
        ends[restore] = weights(resumed)
        first = read_metrics(tmp_path / restore / "metrics.jsonl")[0]
        assert (first["step"], first["kind"]) == (4, "eval")
    expected = weights(whole)
    assert all(torch.equal(tensor, ends["all"][name]) for name, tensor in expected.items())
    trained = [line for line in compared(tmp_path / "whole", 4) if line["kind"] == "train"]
    assert trained == [line for line in compared(tmp_path / "all", 4) if line["kind"] == "train"]
    assert not all(torch.equal(tensor, ends["weights"][name]) for name, tensor in expected.items())
    losses = [line["loss"] for line in compared(tmp_path / "weights", 4)[:1]]
    assert losses == [trained[0]["loss"]], "weights, order of data and dropout are those of the state"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"learning_rate": 2e-2}, "'learning_rate' has changed"),
        ({"weight_decay": 0.1}, "'weight_decay' has changed"),
        ({"stop_after": 2}, "nothing is left to train"),
    ],
)
def test_a_state_of_another_recipe_or_beyond_the_end_is_refused(
    places: dict[str, Path], tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    half, _ = train(places, tmp_path / "half", stop_after=2, state_after="end")
    with pytest.raises(PunaError, match=words):
        train(places, tmp_path / "on", state=half.outputs["state"], **changed)


def test_recomputed_layers_change_no_bit_of_a_training(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as are set, or as few as the memory needs; dropout draws the same again."""
    from puna.train import job

    same = {"lora": {**LORA, "dropout": 0.3}, "max_steps": 3, "save_dtype": "float32"}
    seen: list[int] = []
    plain = job.start_table

    def table(model: Any, *others: Any) -> Any:
        seen.append(model.recomputed_layers)
        return plain(model, *others)

    monkeypatch.setattr(job, "start_table", table)
    usual, _ = train(places, tmp_path / "usual", **same)
    one, _ = train(places, tmp_path / "one", recompute=1, **same)
    monkeypatch.setattr(job, "total_memory", lambda: 1)
    needed, _ = train(places, tmp_path / "needed", **same)
    assert seen == [0, 1, 2]
    for outcome in (one, needed):
        found = weights(outcome)
        assert all(torch.equal(tensor, found[name]) for name, tensor in weights(usual).items())


def test_a_state_with_a_torn_file_is_refused_by_name(places: dict[str, Path], tmp_path: Path) -> None:
    half, _ = train(places, tmp_path / "half", stop_after=2, state_after="end")
    (file,) = half.outputs["state"].glob("shard-*.safetensors")
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-5])
    with pytest.raises(PunaError, match=r"shard-.*safetensors: not the file that was written"):
        train(places, tmp_path / "on", state=half.outputs["state"])


def test_a_state_is_kept_even_if_the_process_dies_right_before(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puna.train.checkpoint import Checkpoints

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "keep", dies)
        with pytest.raises(KeyboardInterrupt):
            train(places, tmp_path, state_after=2)
    resumed, _ = train(places, tmp_path, state_after=2)
    assert json.loads((resumed.outputs["state"] / "state.json").read_text())["state"]["step"] == 2


def test_a_full_disk_under_the_final_model_is_told_and_the_same_call_finishes(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    whole, _ = train(places, tmp_path / "whole", lora=LORA)
    with monkeypatch.context() as patch:

        def refused(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(pretrained, "save", refused)
        with pytest.raises(PunaError, match="no room to write this") as error:
            train(places, tmp_path / "run", lora=LORA)
    assert "model" in str(error.value.where) and "bytes are free" in str(error.value)
    assert "checkpoint-00000004: the same command goes on" in str(error.value)
    finished, _ = train(places, tmp_path / "run", lora=LORA)
    assert all(torch.equal(tensor, weights(finished)[name]) for name, tensor in weights(whole).items())


# ---- every option is read ---------------------------------------------------------------------------------


def seen(outcome: Outcome, out: Path) -> dict[str, Any]:
    """All that can be observed of a run, apart from times."""
    lines = read_metrics(out / "metrics.jsonl")
    timed = {"seconds", "tokens_per_second", "targets_per_second", "peak_memory"}
    model = {
        name: (str(tensor.dtype), float(tensor.double().sum())) for name, tensor in weights(outcome).items()
    }
    return {
        "lines": [{key: value for key, value in line.items() if key not in timed} for line in lines],
        "model": model,
        "outputs": sorted(outcome.outputs),
        "files": sorted(str(path.relative_to(out)).partition("events")[0] for path in out.rglob("*")),
    }


# What to change, and what must be set besides for it to mean something.
PAIRS: dict[str, Any] = {"max_length": 96, "batch_tokens": 192, "micro_batch_tokens": 192}
FLIPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "objective": ({}, {"objective": "sft"}),
    "beta": ({**PAIRS, "objective": "dpo"}, {"beta": 0.5}),
    "label_smoothing": ({**PAIRS, "objective": "dpo"}, {"label_smoothing": 0.2}),
    "target_margin": ({**PAIRS, "objective": "simpo"}, {"target_margin": 0.0}),
    "likelihood_weight": ({**PAIRS, "objective": "cpo"}, {"likelihood_weight": 0.0}),
    "epochs": ({"max_steps": ..., "epochs": 1}, {"epochs": 2}),
    "max_steps": ({}, {"max_steps": 3}),
    "max_tokens": ({"max_steps": ..., "max_tokens": 100}, {"max_tokens": 200}),
    "batch_tokens": ({}, {"batch_tokens": 96}),
    "max_length": ({}, {"max_length": 24}),
    "packing": ({}, {"packing": "fit"}),
    "mixture": ({}, {"mixture": {"caps": {"main": {"rows": 9}}}}),
    "order": ({}, {"order": "sorted"}),
    "sort_by": ({"order": "sorted"}, {"sort_by": "loss"}),
    "descending": ({"order": "sorted"}, {"descending": True}),
    "train_on": ({"objective": "sft"}, {"train_on": ["user"]}),
    "learning_rate": ({}, {"learning_rate": 2e-2}),
    "embedding_learning_rate_factor": ({}, {"embedding_learning_rate_factor": 0.1}),
    "schedule": ({}, {"schedule": "linear"}),
    "warmup_ratio": ({}, {"warmup_ratio": 0.5}),
    "warmup_steps": ({}, {"warmup_steps": 2}),
    "min_learning_rate_ratio": ({}, {"min_learning_rate_ratio": 0.5}),
    "timescale": ({"schedule": "inverse_sqrt"}, {"timescale": 2}),
    "step_size": ({"schedule": "step"}, {"step_size": 2}),
    "gamma": ({"schedule": "step", "step_size": 1}, {"gamma": 0.9}),
    "decay_ratio": ({"schedule": "wsd"}, {"decay_ratio": 0.9}),
    "weight_decay": ({}, {"weight_decay": 0.5}),
    "betas": ({}, {"betas": [0.5, 0.9]}),
    "max_grad_norm": ({}, {"max_grad_norm": 1e-3, "betas": [0.0, 0.0]}),
    "lora": ({}, {"lora": LORA}),
    "dtype": ({}, {"dtype": "bfloat16"}),
    "seed": ({}, {"seed": 1}),
    "logging_steps": ({}, {"logging_steps": 2}),
    "eval_steps": ({"held_out": True}, {"eval_steps": 1}),
    "eval_tokens": ({"held_out": True}, {"eval_tokens": 10}),
    "stop_after": ({}, {"stop_after": 3}),
    "state_after": ({}, {"state_after": "end"}),
    "report_to": ({}, {"report_to": "tensorboard"}),
    "save_adapter": ({"lora": LORA}, {"save_adapter": False}),
    "save_dtype": ({}, {"save_dtype": "bfloat16"}),
}
LORA_FLIPS: dict[str, Any] = {
    "r": 3,
    "alpha": 4.0,
    "dropout": 0.5,
    "target": ["q_proj"],
    "rslora": True,
    "full": ["embed_tokens"],
    "dora": True,
    "base": "nf4",
}
_SEEN_ELSEWHERE = {
    "micro_batch_tokens": "test_micro_batch_tokens_bound_a_forward_pass",
    "save_steps": "test_save_steps_make_checkpoints",
    "restore": "test_a_state_handed_on_gives_what_the_whole_run_gives_and_its_weights_alone_do_not",
    "sharding": "test_a_process_alone_shares_nothing_out",
    "recompute": "test_recomputed_layers_change_no_bit_of_a_training",
}


def test_no_option_is_left_out_of_these_tests() -> None:
    assert set(FLIPS) | set(_SEEN_ELSEWHERE) | set(OF_DISTILLING) == set(Train.model_fields)
    assert set(LORA_FLIPS) == set(Lora.model_fields)
    assert all(name in globals() for name in _SEEN_ELSEWHERE.values())


@pytest.mark.parametrize("name", FLIPS)
def test_flipping_an_option_changes_something(places: dict[str, Path], tmp_path: Path, name: str) -> None:
    if name == "report_to":
        pytest.importorskip("tensorboard")
    besides, flip = FLIPS[name]
    if name == "max_grad_norm":  # AdamW forgives a constant factor unless its averages are off
        besides = {"betas": [0.0, 0.0]}
    before = seen(train(places, tmp_path / "before", **besides)[0], tmp_path / "before")
    after = seen(train(places, tmp_path / "after", **{**besides, **flip})[0], tmp_path / "after")
    assert before != after


@pytest.mark.parametrize("name", LORA_FLIPS)
def test_flipping_an_option_of_lora_changes_the_model(
    places: dict[str, Path], tmp_path: Path, name: str
) -> None:
    before = weights(train(places, tmp_path / "before", lora=LORA)[0])
    after = weights(train(places, tmp_path / "after", lora={**LORA, name: LORA_FLIPS[name]})[0])
    assert any(not torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_micro_batch_tokens_bound_a_forward_pass(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puna.model.llama import Llama

    plain = Llama.hidden
    shapes: list[tuple[int, ...]] = []

    def noted(self: Llama, input_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append(tuple(input_ids.shape))
        return plain(self, input_ids, *rest)

    monkeypatch.setattr(Llama, "hidden", noted)
    train(places, tmp_path / "64")
    assert max(rows * width for rows, width in shapes) == 64
    shapes.clear()
    train(places, tmp_path / "32", micro_batch_tokens=32)
    assert max(rows * width for rows, width in shapes) == 32


def test_a_process_alone_shares_nothing_out(places: dict[str, Path], tmp_path: Path) -> None:
    """What it does with several processes: test_sharding.py, test_elastic.py."""
    alone, shared = (weights(train(places, tmp_path / way, sharding=way)[0]) for way in ("none", "full"))
    assert all(torch.equal(tensor, shared[name]) for name, tensor in alone.items())


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
    from puna.train.stages import plan_train

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
