"""LoRAM: a LoRA trained on a pruned copy works in the whole model, at the places that were kept alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import write_corpus
from puna.edit.pruning.prune import PruneSettings, prune
from puna.edit.pruning.sparsegpt import Pattern, follows, prune_matrix, sparsify
from puna.edit.quantize.rounding import Moments
from puna.model.adapters import LoraSettings, add_lora, lora_layers
from puna.model.kept_units import FILE
from puna.model.llama import Llama
from puna.model.masked_lora import nonzero_places
from puna.model.spec import BlockSpec, LlamaSpec
from puna.model.units import Kept
from puna.text import pretrained
from tests.invariants import kit

BLOCK = BlockSpec(heads=4, kv_heads=2, head_dim=8, width=48)
SPEC = LlamaSpec(vocab_size=320, hidden_size=32, blocks=(BLOCK,) * 3, tied=True, max_positions=64)
TRAINING: dict[str, Any] = {
    "max_steps": 4,
    "batch_tokens": 64,
    "micro_batch_tokens": 64,
    "max_length": 32,
    "learning_rate": 1e-2,
    "dtype": "float32",
    "save_dtype": "float32",
}
LORA = {"r": 2, "alpha": 8.0}
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("recover")
    model = Llama(SPEC, generator=torch_generator(0, "recovered"))
    model.tokenizer = tiny_tokenizer
    pretrained.save(model, root / "model")
    about: dict[str, Any] = {"provenance": [{"source": "test", "licence": "CC0"}], "ledger": {}}
    rows = [
        {
            "id": f"row{n}",
            "text": "the cat sat on that mat and then it went " * (1 + n % 3),
            "source": "test",
            "language": "en",
        }
        for n in range(40)
    ]
    write_corpus(root / "text", "documents", rows, **about)
    return {"model": root / "model", "text": root / "text"}


def run(name: str, out: Path, inputs: dict[str, Any], **parameters: Any) -> Outcome:
    stage = get_stage(name)
    context = Context(name, out, inputs, seed=0, dtype="float32")
    outcome = stage.function(context, validate(stage.parameters, parameters, where="test"))
    assert isinstance(outcome, Outcome)
    return outcome


def pruned(places: dict[str, Path], out: Path, **changed: Any) -> Path:
    settings = {"share": 0.4, "steps": 1, "scorer": "random", "allocator": "uniform", "calibration_rows": 1}
    settings |= {"calibration_length": 16, "save_dtype": "float32", **changed}
    found = run("prune", out, {"model": str(places["model"]), "corpus": places["text"]}, **settings)
    return found.outputs["model"]


def trained(places: dict[str, Path], model: Path, out: Path, **changed: Any) -> Outcome:
    inputs = {"model": str(model), "corpus": {"main": places["text"]}}
    return run("train", out, inputs, **{**TRAINING, "lora": LORA, **changed})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(pretrained.load(folder).named_parameters())


# --- structured ---------------------------------------------------------------------------------------


def test_a_recovered_adapter_is_the_small_one_at_kept_places_and_zero_elsewhere(
    places: dict[str, Path], tmp_path: Path
) -> None:
    copy_ = pruned(places, tmp_path / "pruned")
    lora = trained(places, copy_, tmp_path / "lora", lora={"r": 2, "alpha": 3.0})
    found = run(
        "recover_adapter",
        tmp_path / "back",
        {"base": str(places["model"]), "adapter": lora.outputs["adapter"], "pruned": copy_},
        save_dtype="float32",
    )
    assert found.metrics["kept_differ"] == found.metrics["elsewhere"] == 0
    assert found.metrics["factors_difference"] < 1e-7
    held = sum(tensor.nbytes for tensor in weights(copy_).values())
    assert lora.metrics["weight_bytes"] == held < sum(t.nbytes for t in weights(places["model"]).values())
    kept = Kept.from_json(json.loads((copy_ / FILE).read_text()))
    small = load_file(lora.outputs["adapter"] / "adapter_model.safetensors")
    large = load_file(found.outputs["adapter"] / "adapter_model.safetensors")
    base, merged = weights(places["model"]), weights(found.outputs["model"])
    for layer in range(3):
        stem = f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_"
        channels = list(kept.channels[layer])
        assert len(channels) < BLOCK.width
        rows = large[f"{stem}B.weight"]
        assert torch.equal(rows[channels], small[f"{stem}B.weight"])
        others = [n for n in range(BLOCK.width) if n not in channels]
        assert not rows[others].any() and rows[channels].any()
        assert torch.equal(large[f"{stem}A.weight"], small[f"{stem}A.weight"])
        down = f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_A.weight"
        assert torch.equal(large[down][:, channels], small[down]) and not large[down][:, others].any()
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert torch.equal(merged[name][others], base[name][others])  # W0 where nothing was trained
        change = small[f"{stem}B.weight"] @ small[f"{stem}A.weight"] * (3.0 / 2)
        assert torch.equal(merged[name][channels], base[name][channels] + change)  # alpha over r


def test_a_whole_group_of_query_heads_goes_with_its_key_value_head(
    places: dict[str, Path], tmp_path: Path
) -> None:
    copy_ = pruned(places, tmp_path / "pruned", units=["head_group"], share=0.1)
    kept = Kept.from_json(json.loads((copy_ / FILE).read_text()))
    layer = next(n for n, groups in enumerate(kept.head_groups) if len(groups) == 1)
    (group,) = kept.head_groups[layer]
    lora = trained(places, copy_, tmp_path / "lora")
    found = run(
        "recover_adapter",
        tmp_path / "back",
        {"base": str(places["model"]), "adapter": lora.outputs["adapter"], "pruned": copy_},
    )
    large = load_file(found.outputs["adapter"] / "adapter_model.safetensors")
    at = f"base_model.model.model.layers.{layer}.self_attn."
    span = 2 * BLOCK.head_dim  # two query heads to a key-value head
    queries = large[f"{at}q_proj.lora_B.weight"]
    assert queries[group * span : (group + 1) * span].any()
    assert not queries[(1 - group) * span : (2 - group) * span].any()
    columns = large[f"{at}o_proj.lora_A.weight"]
    assert columns[:, group * span : (group + 1) * span].any()
    assert not columns[:, (1 - group) * span : (2 - group) * span].any()


def test_nothing_pruned_gives_the_lora_itself_to_the_bit(places: dict[str, Path], tmp_path: Path) -> None:
    copy_ = pruned(places, tmp_path / "pruned", share=0.0)
    lora = trained(places, copy_, tmp_path / "lora")
    found = run(
        "recover_adapter",
        tmp_path / "back",
        {"base": str(places["model"]), "adapter": lora.outputs["adapter"], "pruned": copy_},
        save_dtype="float32",
    )
    theirs = weights(lora.outputs["model"])
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(found.outputs["model"]).items())
    small = load_file(lora.outputs["adapter"] / "adapter_model.safetensors")
    large = load_file(found.outputs["adapter"] / "adapter_model.safetensors")
    assert small.keys() == large.keys() and all(torch.equal(small[name], large[name]) for name in small)


@pytest.mark.parametrize("units", [["head_group", "channel"], ["block"]])
def test_peft_opens_a_recovered_adapter_over_the_original_model(
    places: dict[str, Path], tmp_path: Path, units: list[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    copy_ = pruned(places, tmp_path / "pruned", units=units)
    lora = trained(places, copy_, tmp_path / "lora")
    found = run(
        "recover_adapter",
        tmp_path / "back",
        {"base": str(places["model"]), "adapter": lora.outputs["adapter"], "pruned": copy_},
        save_dtype="float32",
    )
    theirs = AutoModelForCausalLM.from_pretrained(places["model"], dtype=torch.float32)
    adapted = PeftModel.from_pretrained(theirs, found.outputs["adapter"]).eval()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        expected = adapted(ids).logits
        ours = pretrained.load(found.outputs["model"]).eval()(ids)
        again = pretrained.load(found.outputs["adapter"]).eval()(ids)  # which names the original base
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)


def test_it_goes_into_the_original_weights_and_not_into_aligned_ones(
    places: dict[str, Path], tmp_path: Path
) -> None:
    copy_ = pruned(places, tmp_path / "pruned")
    inputs = {"model": str(copy_), "corpus": {"main": places["text"]}}
    aligned = run("train", tmp_path / "aligned", inputs, **TRAINING, frozen=["lm_head"]).outputs["model"]
    before, after = weights(copy_), weights(aligned)
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(
        before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"]
    )
    lora = trained(places, aligned, tmp_path / "lora", learning_rate=1e-9)  # next to no change
    given = {"base": str(places["model"]), "adapter": lora.outputs["adapter"]}
    found = run("recover_adapter", tmp_path / "back", {**given, "pruned": copy_}, save_dtype="float32")
    base = weights(places["model"])
    for name, tensor in weights(found.outputs["model"]).items():
        torch.testing.assert_close(tensor, base[name], atol=1e-6, rtol=0)
    with pytest.raises(PunaError, match="not written down which units"):
        run("recover_adapter", tmp_path / "lost", {**given, "pruned": aligned})


def test_the_adapter_is_chosen_by_the_loss_of_the_whole_model(
    places: dict[str, Path], tmp_path: Path
) -> None:
    copy_ = pruned(places, tmp_path / "pruned")
    lora = trained(places, copy_, tmp_path / "lora", adapter_steps=2, max_steps=5)
    folder = lora.outputs["adapters"]
    assert sorted(inner.name for inner in folder.iterdir()) == ["step-2", "step-4", "step-5"]
    last = load_file(lora.outputs["adapter"] / "adapter_model.safetensors")
    left = load_file(folder / "step-5" / "adapter_model.safetensors")
    assert all(torch.equal(last[name], left[name]) for name in last)
    given = {"base": str(places["model"]), "adapter": folder, "pruned": copy_}
    with pytest.raises(PunaError, match="no text to choose by"):
        run("recover_adapter", tmp_path / "blind", given)
    # The last one is made worse than none: training that drifted.
    drifted = {name: tensor * 50 for name, tensor in left.items()}
    from safetensors.torch import save_file

    save_file(drifted, folder / "step-5" / "adapter_model.safetensors")
    found = run(
        "recover_adapter", tmp_path / "back", {**given, "held_out": places["text"]}, max_length=32
    ).metrics
    losses = {name: found[f"loss.{name}"] for name in ("step-2", "step-4", "step-5")}
    assert found["loss"] == min(losses.values()) < found["loss.last"] == losses["step-5"]
    assert found["candidates"] == 3 and found["chosen"] in (1, 2)


def test_what_does_not_fit_together_is_told(places: dict[str, Path], tmp_path: Path) -> None:
    copy_ = pruned(places, tmp_path / "pruned")
    lora = trained(places, copy_, tmp_path / "lora").outputs["adapter"]
    base = str(places["model"])
    with pytest.raises(PunaError, match="where in the whole model"):
        run("recover_adapter", tmp_path / "a", {"base": base, "adapter": lora})
    with pytest.raises(PunaError, match="does not come from this base"):
        other = pruned(places, tmp_path / "other", share=0.2)
        (other / FILE).write_text((copy_ / FILE).read_text())
        run("recover_adapter", tmp_path / "b", {"base": base, "adapter": lora, "pruned": other})
    with pytest.raises(PunaError, match="no adapter here"):
        run("recover_adapter", tmp_path / "c", {"base": base, "adapter": copy_, "pruned": copy_})
    with pytest.raises(PunaError, match="does not say which units"):
        (copy_ / FILE).write_text("{}")
        run("recover_adapter", tmp_path / "d", {"base": base, "adapter": lora, "pruned": copy_})
    for wrong, words in (
        ({"lora": None, "adapter_steps": 2}, "means nothing without lora"),
        ({"frozen": ["lm_head"]}, "frozen means nothing with lora"),
        ({"keep_zeros": True, "lora": {**LORA, "dora": True}}, "keep_zeros does not go with"),
        (
            {"lora": {**LORA, "target": ["lm_head"]}},
            "a LoRA goes on|unknown",
        ),  # tied: there is no such module
    ):
        with pytest.raises(PunaError, match=words):
            trained(places, copy_, tmp_path / "e", **wrong)


def test_spared_layers_lose_nothing_and_the_target_is_met(places: dict[str, Path]) -> None:
    model = pretrained.load(places["model"])
    batches = []
    for allocator in ("uniform", "adaptive"):
        settings = PruneSettings(0.3, scorer="magnitude", allocator="uniform", steps=2, spared_last=1)
        if allocator == "adaptive":
            ids = torch.arange(4, 36).view(2, 16)
            labels = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), dim=1)
            from puna.text.packing import Batch

            batches = [Batch(ids, labels, torch.arange(16).expand(2, 16), torch.zeros_like(ids))]
            settings = PruneSettings(0.2, steps=2, amplitude=0.05, spared_first=1, spared_last=1)
        found = prune(model, batches, settings)
        whole = Kept.everything(SPEC)
        for layer in settings.spared(3):
            assert found.kept.head_groups[layer] == whole.head_groups[layer]
            assert found.kept.channels[layer] == whole.channels[layer]
        gone = 1 - sum(len(numbers) for numbers in found.kept.channels) / (3 * BLOCK.width)
        assert gone > 0.1
    with pytest.raises(PunaError, match="spared layers keep all"):
        prune(model, [], PruneSettings(0.5, scorer="magnitude", allocator="uniform", spared_first=3))
    found = prune(model, [], PruneSettings(0.3, ("block",), "magnitude", spared_first=2))
    assert found.kept.blocks == (0, 1)


# --- without becoming smaller ---------------------------------------------------------------------------


def moments(inputs: int) -> Moments:
    rows = torch.randn(200, inputs, generator=torch_generator(0, "rows"))
    rows = rows @ torch.randn(inputs, inputs, generator=torch_generator(1, "mix"))
    return Moments(rows.T @ rows)


@pytest.mark.parametrize("pattern", ["4:8", "2:4", "unstructured"])
def test_sparsegpt_keeps_the_pattern_and_loses_less_than_magnitudes_do(pattern: str) -> None:
    found_in = moments(160)  # a block of 128 inputs and a shorter one
    weight = torch.randn(24, 160, generator=torch_generator(2, "weight"))
    chosen = Pattern.of(pattern, 0.5 if pattern == "unstructured" else None)
    found = prune_matrix(weight, found_in, chosen)
    assert float((found == 0).float().mean()) == pytest.approx(0.5)
    if chosen.among:
        assert follows({"w": found}, chosen) == 0
        order = weight.abs().view(24, -1, chosen.among).argsort(dim=-1)
        mask = torch.zeros(24, 160 // chosen.among, chosen.among).scatter_(-1, order[..., chosen.kept :], 1.0)
        plain = weight * mask.view(24, 160)
    else:
        plain = weight * (weight.abs() > weight.abs().median())

    def error(pruned_: torch.Tensor) -> float:
        return float(found_in.error((pruned_ - weight).T).sum())

    assert error(found) < 0.8 * error(plain)


def test_sparsegpt_of_independent_inputs_is_pruning_by_size() -> None:
    """With H the identity nothing can be made up for: the smallest go and the others stay, to the bit."""
    weight = torch.randn(8, 16, generator=torch_generator(3, "weight"))
    found = prune_matrix(weight, Moments.of_settled(torch.eye(16)), Pattern(share=0.25))
    gone = weight.abs().flatten().argsort()[:32]
    expected = weight.flatten().clone()
    expected[gone] = 0
    assert torch.equal(found, expected.view(8, 16))


def test_nothing_removed_changes_no_bit_and_wrong_patterns_are_told() -> None:
    model, ids = kit.decoder(kit.spec_of()), kit.random_ids(4, 16)
    sparsify(model, Pattern.of("unstructured", 0.0), ids)
    kit.assert_same_bits(kit.decoder(kit.spec_of()), model, ids)
    for pattern, share in (
        ("4:9", None),
        ("8:4", None),
        ("half", None),
        ("4:8", 0.5),
        ("unstructured", None),
    ):
        with pytest.raises(PunaError):
            Pattern.of(pattern, share)


@pytest.mark.parametrize("base", ["as_is", "nf4"])
def test_a_masked_lora_changes_nothing_at_zeros_through_training_and_recovery(
    places: dict[str, Path], tmp_path: Path, base: str
) -> None:
    inputs = {"model": str(places["model"]), "corpus": places["text"]}
    made = run(
        "sparsegpt",
        tmp_path / "sparse",
        inputs,
        share=0.55,
        calibration_rows=4,
        calibration_length=32,
        save_dtype="float32",
    )
    assert made.metrics["zero_share"] == pytest.approx(0.55, abs=0.01)
    sparse = made.outputs["model"]
    inputs = {"model": str(sparse), "corpus": {"main": places["text"]}}
    aligned = run("train", tmp_path / "aligned", inputs, **TRAINING, keep_zeros=True).outputs["model"]
    before, after = nonzero_places(pretrained.load(sparse)), nonzero_places(pretrained.load(aligned))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(
        weights(sparse)["model.layers.0.mlp.up_proj.weight"],
        weights(aligned)["model.layers.0.mlp.up_proj.weight"],
    )
    lora = trained(
        places, aligned, tmp_path / "lora", keep_zeros=True, lora={**LORA, "base": base, "dropout": 0.1}
    )
    if base == "as_is":
        merged = nonzero_places(pretrained.load(lora.outputs["model"]))
        assert all(torch.equal(before[name], merged[name]) for name in before)
    given = {"base": str(places["model"]), "adapter": lora.outputs["adapter"]}
    found = run("recover_adapter", tmp_path / "back", given, save_dtype="float32")
    assert found.metrics["kept_differ"] == found.metrics["elsewhere"] == 0
    assert set(found.outputs) == {"model"}  # no low rank, no PEFT adapter
    if base == "as_is":  # zeros are stored like any number, and masks besides
        held = sum(tensor.nbytes for tensor in weights(sparse).values())
        assert lora.metrics["weight_bytes"] > held
    whole, changed = weights(places["model"]), weights(found.outputs["model"])
    for name, kept in before.items():
        same = whole[f"{name}.weight"] == changed[f"{name}.weight"]
        assert same[~kept].all() and not same[kept].all()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(places["model"]), lora.outputs["adapter"]
        )
    with pytest.raises(PunaError, match="only LoRA adapters"):
        pretrained.load(lora.outputs["adapter"])


def test_a_masked_lora_starts_at_the_same_bits() -> None:
    model = kit.decoder(kit.spec_of())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[::2] = 0
    ids = kit.random_ids(2, 17)
    with torch.no_grad():
        before = model(ids)
    add_lora(model, LoraSettings(r=2), seed=0, places=nonzero_places(model))
    with torch.no_grad():
        assert torch.equal(before, model(ids))
        for _, layer in lora_layers(model):
            layer.lora_B["default"].weight.fill_(1.0)
        assert not torch.equal(before, model(ids))
