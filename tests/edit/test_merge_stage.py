"""The stages of merging on small models: what they write opens elsewhere, and their figures are right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import write_corpus
from puna.data.ledger import Ledger
from puna.edit.merging import statistics as merge_statistics
from puna.edit.merging.delta import DeltaSet
from puna.edit.merging.study import delta_metrics
from puna.model.adapter_files import write_adapter
from puna.model.adapters import LoraSettings, add_lora
from puna.text import pretrained
from puna.text.encode import encode_document
from puna.text.packing import Row, Slice
from puna.text.stored_weights import Weights
from puna.text.tokenizer import Tokenizer


def with_tokenizer(folders: dict[str, str], tokenizer: Any = None) -> None:
    """Put a tokenizer beside each model."""
    import json

    for folder in folders.values():
        rows = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
        vocabulary = {f"t{number}": number for number in range(rows)}
        core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
        (tokenizer or Tokenizer(core, {"eos_token": "t2"})).save(Path(folder))


@pytest.fixture
def models(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> dict[str, str]:
    """A base and two models with a tokenizer, by name."""
    found = {}
    for number, name in enumerate(("base", "one", "two")):
        model = tiny_llama(vocab_size=tiny_tokenizer.vocab_size)
        with torch.no_grad():
            for place, weight in enumerate(model.parameters()):
                noise = torch.randn(weight.shape, generator=torch_generator(place, name))
                weight.add_(0.02 * number * noise)
        model.tokenizer = tiny_tokenizer
        found[name] = str(pretrained.save(model, tmp_path / name))
    return found


def _run(name: str, tmp_path: Path, inputs: dict[str, Any], **parameters: Any) -> Outcome:
    stage = get_stage(name)
    settings = validate(stage.parameters, parameters, where="test")
    out = tmp_path / "stage"
    out.mkdir(exist_ok=True)
    return stage.function(Context(name, out, inputs, dtype="float32"), settings)


def _merged(tmp_path: Path, inputs: dict[str, Any], **parameters: Any) -> Any:
    return pretrained.load(_run("merge", tmp_path, inputs, **parameters).outputs["model"])


def _inputs(models: dict[str, str]) -> dict[str, Any]:
    return {"base": models["base"], "models": {"one": models["one"], "two": models["two"]}}


def test_a_merge_opens_in_transformers_with_the_same_logits(models: dict[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    outcome = _run("merge", tmp_path, _inputs(models), method="ties", settings={"weight": 1, "density": 0.4})
    merged = pretrained.load(outcome.outputs["model"])
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        opened = AutoModelForCausalLM.from_pretrained(outcome.outputs["model"], dtype=torch.float32)
        torch.testing.assert_close(merged(ids), opened(ids).logits, atol=1e-5, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(outcome.outputs["model"])
    assert tokenizer("the cat")["input_ids"][-2:] == merged.tokenizer.encode("the cat")[-2:]
    assert outcome.metrics["models"] == 3 and outcome.metrics["parameters"] == merged.spec.parameter_count()
    assert "merge_method: ties" in (outcome.outputs["model"] / "mergekit_config.yml").read_text()


def test_a_file_of_mergekit_runs_as_a_stage(models: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "merge.yml"
    file.write_text(
        f"merge_method: linear\ndtype: bfloat16\nmodels:\n"
        f"- {{model: {models['one']}, parameters: {{weight: 3}}}}\n"
        f"- {{model: {models['two']}, parameters: {{weight: 1}}}}\n"
    )
    outcome = _run("merge", tmp_path, {}, config=str(file))
    one, two = (dict(pretrained.load(models[name]).named_parameters()) for name in ("one", "two"))
    for name, weight in pretrained.load(outcome.outputs["model"], dtype="bfloat16").named_parameters():
        expected = (0.75 * one[name] + 0.25 * two[name]).detach()
        torch.testing.assert_close(weight.detach().float(), expected, atol=1e-5, rtol=2**-8)
    with pytest.raises(PunaError, match="names its models itself"):
        _run("merge", tmp_path, _inputs(models), config=str(file))
    with pytest.raises(PunaError, match="the file says it all"):
        _run("merge", tmp_path, {}, config=str(file), settings={"weight": 1})
    with pytest.raises(PunaError, match="no model to merge"):
        _run("merge", tmp_path, {"base": models["base"]})
    with pytest.raises(PunaError, match="unknown model 'noe'"):
        _run("merge", tmp_path, _inputs(models), each={"noe": {"weight": 1}})


def test_an_adapter_merges_as_the_model_that_it_makes(
    models: dict[str, str], tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = pretrained.load(models["base"])
    add_lora(model, LoraSettings(r=2), seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1)
    write_adapter(model, tmp_path / "adapter", base_name=models["base"])
    merged = pretrained.save(pretrained.load_merged(tmp_path / "adapter"), tmp_path / "merged")
    found = []
    for one in (tmp_path / "adapter", merged):
        inputs = {"base": models["base"], "models": {"one": str(one), "two": models["two"]}}
        outcome = _run("merge", tmp_path, inputs, method="task_arithmetic", settings={"weight": 0.6})
        found.append(dict(pretrained.load(outcome.outputs["model"]).named_parameters()))
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], atol=1e-6, rtol=1e-6)


def _longer(tokenizer: Any, *tokens: str) -> Tokenizer:
    core = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    core.add_special_tokens(list(tokens))
    config = {**tokenizer.strings, "add_bos_token": tokenizer.adds_bos}
    return Tokenizer(core, config, tokenizer.stop_tokens)


def test_other_tokenizers_are_refused_until_one_is_named(
    models: dict[str, str], tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    longer = _longer(tiny_tokenizer, "<|tool|>", "<|call|>")
    large = tiny_llama(vocab_size=longer.vocab_size)
    large.tokenizer = longer
    models["two"] = str(pretrained.save(large, tmp_path / "large"))
    inputs = _inputs(models)
    asked: dict[str, Any] = {"method": "task_arithmetic", "settings": {"weight": 1}}
    with pytest.raises(PunaError, match="tokenizers differ") as error:
        _run("merge", tmp_path, inputs, **asked)
    assert "tokenizer_source: base, union" in str(error.value)
    small = pretrained.load(
        _run("merge", tmp_path, inputs, **asked, tokenizer_source="base").outputs["model"]
    )
    assert small.spec.vocab_size == tiny_tokenizer.vocab_size
    name = "model.embed_tokens.weight"
    base, one, two = (pretrained.load(models[key]).get_parameter(name).detach() for key in models)
    rows = tiny_tokenizer.vocab_size
    expected = base + (one - base) + (two[:rows] - base)
    torch.testing.assert_close(small.get_parameter(name).detach(), expected, atol=1e-6, rtol=0)
    whole = pretrained.load(
        _run("merge", tmp_path, inputs, **asked, tokenizer_source="union").outputs["model"]
    )
    assert whole.tokenizer.vocabulary() == longer.vocabulary() and whole.spec.vocab_size == rows + 2
    torch.testing.assert_close(whole.get_parameter(name).detach()[:rows], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(whole.get_parameter(name).detach()[rows:], two[rows:], atol=1e-6, rtol=0)
    named = _merged(tmp_path, inputs, **asked, tokenizer_source="two")
    torch.testing.assert_close(named.get_parameter(name), whole.get_parameter(name))


def test_rows_belong_together_by_their_tokens(
    models: dict[str, str], tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    for name, tokens in (("one", ("<|a|>", "<|b|>")), ("two", ("<|b|>", "<|a|>"))):
        tokenizer = _longer(tiny_tokenizer, *tokens)
        model = tiny_llama(vocab_size=tokenizer.vocab_size, tie_word_embeddings=True)
        with torch.no_grad():
            for place, token in enumerate(tokens, start=tiny_tokenizer.vocab_size):
                model.get_parameter("model.embed_tokens.weight")[place] = float(token == "<|a|>")
        model.tokenizer = tokenizer
        models[name] = str(pretrained.save(model, tmp_path / name))
    inputs = {"models": {"one": models["one"], "two": models["two"]}}
    outcome = _run("merge", tmp_path, inputs, method="linear", settings={"weight": 1}, tokenizer_source="one")
    merged = pretrained.load(outcome.outputs["model"])
    rows = merged.get_parameter("model.embed_tokens.weight")[tiny_tokenizer.vocab_size :]
    assert rows[0].eq(1).all() and rows[1].eq(0).all()


def test_vocabularies_that_split_otherwise_have_no_union(
    models: dict[str, str], tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    with_tokenizer({"two": models["two"]})
    with pytest.raises(PunaError, match="no union of them is a tokenizer"):
        _run("merge", tmp_path, _inputs(models), settings={"weight": 1}, tokenizer_source="union")


def test_a_delta_is_measured_and_written(models: dict[str, str], tmp_path: Path) -> None:
    outcome = _run("delta", tmp_path, {"base": models["base"], "model": models["one"]})
    base = Weights.open(models["base"])
    back = DeltaSet.read(base, outcome.outputs["delta"])
    every = torch.cat([back.tensor(name).reshape(-1) for name in back.shapes])
    weights = torch.cat([base.part(n, 0, torch.Size(s).numel()) for n, s in base.shapes.items()])
    assert outcome.metrics["largest"] == float(every.abs().max())
    assert outcome.metrics["relative"] == pytest.approx(float(every.norm() / weights.norm()), rel=1e-5)
    exact = every.abs().sort().values
    assert outcome.metrics["quantile.50"] == pytest.approx(float(exact[len(exact) // 2]), rel=1e-3)
    same = DeltaSet.between(base, Weights.open(models["base"]))
    assert delta_metrics(same)["zeros"] == 1 and delta_metrics(same)["relative"] == 0


def _corpus(folder: Path) -> None:
    texts = [f"the cat {number} sat on that mat" for number in range(3)]
    rows = [{"id": text, "text": text, "source": "s", "language": "en"} for text in texts]
    source = {"source": "s", "licence": "MIT"}
    write_corpus(folder, "documents", rows, provenance=[source], ledger=Ledger())


def _row(tokenizer: Any, text: str) -> Row:
    encoded = encode_document(tokenizer, text)
    return Row((Slice(encoded, 0, len(encoded)),))


def test_what_is_measured_is_squared_gradients_and_products_of_inputs(
    models: dict[str, str], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = pretrained.load(models["one"])
    rows = [_row(tiny_tokenizer, text) for text in ("the cat sat", "on that mat in the end")]
    found = merge_statistics.measure(model, rows, "fisher")
    name = "model.layers.1.mlp.up_proj.weight"
    expected = torch.zeros_like(model.get_parameter(name))
    for row in rows:
        ids = torch.tensor([row.slices[0].document.ids])
        logits = model(ids)[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        expected += torch.autograd.grad(loss, model.get_parameter(name))[0].square() / 2
    torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-4)
    assert set(found) == {name for name, _ in model.named_parameters()}
    seen: list[torch.Tensor] = []
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    grams = merge_statistics.measure(model, rows, "gram")
    handle.remove()
    inputs = torch.cat(seen).detach()
    site = "model.layers.1.mlp.gate_proj"  # whose inputs up_proj shares
    torch.testing.assert_close(grams[site], inputs.T @ inputs / len(inputs), atol=1e-5, rtol=1e-4)
    assert len(grams) == 8


@pytest.mark.parametrize(("method", "kind"), [("fisher", "fisher"), ("regmean", "gram")])
def test_measured_methods_run_on_what_was_measured(
    models: dict[str, str], tmp_path: Path, method: str, kind: str
) -> None:
    rows = [
        {"id": str(n), "text": f"the cat {n} sat on that mat", "source": "s", "language": "en"}
        for n in range(3)
    ]
    write_corpus(tmp_path / "corpus", "documents", rows, provenance=[], ledger=[])
    inputs = _inputs(models)
    inputs["statistics"] = {}
    for name, path in inputs["models"].items():
        place = tmp_path / f"of-{name}"
        place.mkdir()
        measured = _run(
            "merge_statistics", place, {"model": path, "corpus": tmp_path / "corpus"}, kind=kind, rows=2
        )
        inputs["statistics"][name] = measured.outputs["statistics"]
    outcome = _run("merge", tmp_path, inputs, method=method)
    merged = dict(pretrained.load(outcome.outputs["model"]).named_parameters())
    one, two = (dict(pretrained.load(models[name]).named_parameters()) for name in ("one", "two"))
    for name, weight in merged.items():
        assert torch.isfinite(weight).all()
        if method == "fisher":  # between the two, element by element
            least, most = torch.minimum(one[name], two[name]), torch.maximum(one[name], two[name])
            assert (weight >= least - 1e-5).all() and (weight <= most + 1e-5).all()
    other = "regmean" if method == "fisher" else "fisher"
    with pytest.raises(PunaError, match="measured for another method"):
        _run("merge", tmp_path, inputs, method=other)
    del inputs["statistics"]["two"]
    with pytest.raises(PunaError, match="nothing was measured of a model"):
        _run("merge", tmp_path, inputs, method=method)


def test_a_sweep_tells_what_is_kept(models: dict[str, str], tiny_tokenizer: Any, tmp_path: Path) -> None:
    _corpus(tmp_path / "corpus")
    expert = pretrained.load(models["base"]).train()
    from puna.edit.merging.study import Questions

    asked = Questions.read(tmp_path / "corpus", expert, 3)
    optimizer = torch.optim.Adam(expert.parameters(), lr=1e-2)
    for _ in range(6):
        optimizer.zero_grad()
        sum(merge_statistics.nats_of(expert, row) for row in asked.rows).backward()
        optimizer.step()
    pretrained.save(expert, tmp_path / "expert")
    inputs = {
        "base": models["base"],
        "models": {"expert": tmp_path / "expert", "two": models["two"]},
        "corpora": {"expert": tmp_path / "corpus"},
    }
    variants = {
        "half": {"settings": {"weight": 0.5}, "models": ["expert"]},
        "nothing": {"settings": {"weight": 0}},
        "other": {"settings": {"weight": 1}, "models": ["two"]},
    }
    metrics = _run("merge_sweep", tmp_path, inputs, variants=variants, rows=3).metrics
    assert metrics["kept.base.expert"] == metrics["kept.nothing.expert"] == 0
    assert metrics["kept.expert.expert"] == 1 and 0 < metrics["kept.half.expert"] < 1
    assert metrics["loss.expert.expert"] == pytest.approx(asked.score(expert)["loss"], rel=1e-5)
    assert "loss.other.expert" not in metrics  # a skill of a model that has no part in it
    with pytest.raises(PunaError, match="unknown model"):
        _run("merge_sweep", tmp_path, inputs, variants={"x": {"models": ["none"]}})
    inputs["models"] = {"expert": models["base"]}
    with pytest.raises(PunaError, match="not better than the base"):
        _run("merge_sweep", tmp_path, inputs, variants={"nothing": variants["nothing"]}, rows=3)


def test_dare_is_checked_on_a_delta(models: dict[str, str], tmp_path: Path) -> None:
    inputs = {"base": models["base"], "model": models["one"]}
    metrics = _run("dare_checks", tmp_path, inputs, draws=200, drop_rate=0.5).metrics
    assert metrics["identity_differ.dare_linear"] == metrics["identity_differ.dare_ties"] == 0
    assert metrics["within"] > 0.99 and metrics["bias_z"] < 4 and metrics["kept_z"] < 4
    with pytest.raises(PunaError, match="unknown tensor"):
        _run("dare_checks", tmp_path, inputs, tensors=["model.norm"])
    with pytest.raises(PunaError, match="delta is zero"):
        _run("dare_checks", tmp_path, {**inputs, "model": models["base"]})
