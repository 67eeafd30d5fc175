"""Augmenting a model: no logit changes, what is new gets gradients, mistakes are told; features collapse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import puna
from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.data.corpus import write_corpus
from puna.edit.growing.augment import augment
from puna.edit.growing.augment_checks import gradients
from puna.edit.quantize.quantize import quantize
from puna.edit.quantize.settings import Quantization, Uniform
from puna.evaluate.collapse import effective_dimensions, measure
from puna.model.native.weights import OUT, QKV
from puna.model.spec import BlockSpec, LlamaSpec
from puna.model.steppers import make_stepper
from puna.text import pretrained
from puna.text.packing import Batch
from tests.edit.running import run_stage
from tests.invariants import kit
from tests.model.native_models import hidden_of


def augmented(model: Any, series: int = 2, shortcut: int = 3, seed: int = 0) -> Any:
    return augment(model, series=series, shortcut=shortcut, generator=torch_generator(seed, "augment"))


for _series, _shortcut in ((2, 0), (1, 0), (0, 3), (2, 3)):

    @kit.neutral(f"just augmented, series {_series}, shortcut {_shortcut}")
    def _(series: int = _series, shortcut: int = _shortcut) -> tuple[kit.Forward, kit.Forward]:
        model = kit.decoder(kit.spec_of(tied=False))
        return model, augmented(model, series, shortcut)


@pytest.mark.parametrize("name", [name for name in kit.NEUTRAL if name.startswith("just augmented")])
def test_no_logit_changes(name: str) -> None:
    plain, changed = kit.NEUTRAL[name]()
    kit.assert_same_bits(plain, changed, kit.random_ids(3, 17))


def batch_of(rows: int, time: int) -> Batch:
    ids = kit.random_ids(rows, time)
    positions = torch.arange(time).expand(rows, time)
    labels = torch.cat((ids[:, 1:], torch.full((rows, 1), -100)), dim=1)
    return Batch(ids, labels, positions, torch.zeros_like(ids))


@st.composite
def specs(draw: st.DrawFn) -> LlamaSpec:
    kv_heads = draw(st.integers(1, 3))
    blocks = tuple(
        BlockSpec(
            attention=draw(st.sampled_from(["full", "full", "linear", "none"])),
            heads=kv_heads * draw(st.integers(1, 2)),
            kv_heads=kv_heads,
            head_dim=2 * draw(st.integers(1, 4)),
            feed_forward=draw(st.sampled_from(["swiglu", "swiglu", "none"])),
            width=draw(st.integers(1, 20)),
        )
        for _ in range(draw(st.integers(1, 2)))
    )
    full = BlockSpec(heads=2, kv_heads=1, head_dim=4, width=9)
    sizes = {"tied": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    bias = draw(st.sampled_from(["none", "qkv", "all"]))
    return LlamaSpec(kit.VOCABULARY, draw(st.integers(4, 24)), (full, *blocks), attention_bias=bias, **sizes)


@settings(max_examples=25)
@given(specs(), st.integers(1, 2), st.integers(1, 8))
def test_of_any_shape_bits_stay_gradients_come_and_weights_are_counted(
    spec: LlamaSpec, series: int, shortcut: int
) -> None:
    model = kit.decoder(spec)
    richer = augmented(model, series, shortcut)
    kit.assert_same_bits(model, richer, kit.random_ids(2, 7))
    added = sum(weight.numel() for weight in richer.parameters()) - spec.parameter_count()
    full = [block for block in spec.blocks if block.attention == "full"]
    widths = sum(block.width for block in spec.blocks)
    assert added == 2 * spec.hidden_size * shortcut * len(full) + 2 * series * widths
    found = gradients(richer, [batch_of(2, 7)])
    assert found["gradient.shortcut"] > 0
    if series == 2:
        assert found["gradient.series"] > 0


def test_what_is_new_moves_the_model_as_soon_as_it_is_trained() -> None:
    model = kit.decoder(kit.spec_of())
    richer = augmented(model)
    new = [weight for name, weight in richer.named_parameters() if "expand_proj" in name or "act_fn" in name]
    optimizer = torch.optim.SGD(new, lr=0.1)
    ids = kit.random_ids(2, 9)
    first = torch.nn.functional.cross_entropy(richer(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    first.backward()
    optimizer.step()
    after = torch.nn.functional.cross_entropy(richer(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(after.detach()) < float(first.detach())


def test_a_model_can_be_given_one_and_later_the_other() -> None:
    model = kit.decoder(kit.spec_of())
    both = augmented(augmented(model, 2, 0), 0, 3)
    assert {(block.series, block.shortcut) for block in both.spec.blocks} == {(2, 3)}
    kit.assert_same_bits(model, both, kit.random_ids(2, 9))


@pytest.mark.parametrize(
    ("series", "shortcut", "where"),
    [(3, 0, "series"), (-1, 0, "series"), (0, 0, "series, shortcut")],
)
def test_what_cannot_be_added_is_told(series: int, shortcut: int, where: str) -> None:
    with pytest.raises(PunaError) as error:
        augmented(kit.decoder(kit.spec_of()), series, shortcut)
    assert error.value.where == where


def test_what_is_there_already_is_not_added_twice() -> None:
    with pytest.raises(PunaError, match="has its series already") as error:
        augmented(augmented(kit.decoder(kit.spec_of())), 2, 0)
    assert error.value.where == "layer 0"


def test_quantised_the_engine_keeps_the_grids_of_shortcuts_too() -> None:
    """Heads of 24 numbers: the shortcut's inputs of the packed output projection begin behind a gap of 8."""
    block = BlockSpec(heads=3, kv_heads=1, head_dim=8, width=40, series=2, shortcut=40)
    model = kit.decoder(kit.spec_of(block, block))
    quantize(model, Quantization(grid=Uniform(bits=4, group=32)), kit.random_ids(2, 9))
    attention: Any = model.model.layers[1].self_attn
    stepper: Any = make_stepper(model, quantize="int4", cache_tokens=16, kernels="native")
    row = stepper.stored_row(1, OUT, 5)
    assert torch.equal(row[:24], attention.o_proj.weight[5])
    assert torch.equal(row[32:72], attention.expand_proj.weight[5]) and not row[24:32].any()
    squeeze = stepper.stored_row(1, QKV, 24 + 8 + 8 + 3)
    assert torch.equal(squeeze, attention.squeeze_proj.weight[3])
    plain: Any = make_stepper(model, quantize="int4", cache_tokens=16, kernels="plain")
    ids = kit.random_ids(1, 9)[0].tolist()
    found, expected = (each.logits(hidden_of(each, ids, [9])) for each in (stepper, plain))
    assert (found - expected).norm() < 0.05 * expected.norm()  # int8 activations


TEXT = "the cat and the other cat sat on that mat in the end, and then it went in again. "


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = (
        {"id": str(n), "text": f"{TEXT * (1 + n % 4)}{n}", "source": "s", "language": "en"} for n in range(60)
    )
    source = {"source": "s", "licence": "CC0"}
    write_corpus(tmp_path / "corpus", "documents", rows, provenance=[source], ledger={})
    return tmp_path / "corpus"


def test_the_stages_augment_and_check(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, corpus: Path, tmp_path: Path
) -> None:
    model = tiny_llama()
    model.tokenizer = tiny_tokenizer
    source = str(pretrained.save(model, tmp_path / "plain"))
    made, _ = run_stage("augment", tmp_path / "richer", {"model": source}, {})
    assert puna.load(made.outputs["model"]).spec == model.spec.replace(series=2, shortcut=1)
    inputs = {"model": source, "augmented": str(made.outputs["model"]), "corpus": str(corpus)}
    checked, _ = run_stage("augment_checks", tmp_path / "checks", inputs, {"rows": 3, "length": 16})
    figures = checked.metrics
    assert figures["added"] == figures["added_by_formula"] == made.metrics["added"] == 2 * (2 * 48 + 4 * 96)
    assert figures["logits.differ"] == figures["logits.largest"] == 0
    assert figures["engine.differ"] == 0
    assert figures["gradient.shortcut"] > 0 and figures["gradient.series"] > 0

    models = {"one": source, "other": inputs["augmented"]}
    given_ = {"models": models, "corpus": str(corpus)}
    found, context = run_stage("feature_collapse", tmp_path / "seen", given_, {"rows": 6, "length": 24})
    assert found.metrics["dimensions.one.deep"] == found.metrics["dimensions.other.deep"] > 1
    assert 0 < found.metrics["distance.one.last"] <= 1
    assert len(context.report["curves"][0]["series"]) == 2


def test_dimensions_are_those_that_hold_the_variance() -> None:
    assert effective_dimensions(torch.diag(torch.tensor([8.0, 1.0, 1.0])), 0.8) == 1
    assert effective_dimensions(torch.diag(torch.tensor([1.0, 7.9, 1.1])), 0.8) == 2
    assert effective_dimensions(torch.eye(10), 0.8) == 8


def test_states_that_are_alike_have_collapsed_and_a_first_token_does_not_count() -> None:
    """One direction behind a layer that writes one vector; spread states behind one that writes nothing."""
    model = kit.decoder(kit.spec_of(kit.BLOCK, kit.BLOCK, kit.BLOCK))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    batch = batch_of(4, 12)
    spread = measure(model, [batch])
    assert spread.tokens == 4 * 11 and len(set(spread.dimensions)) == 1
    assert spread.dimensions[0] > 5 and spread.distance[0] > 0.5

    def alike(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output + 1000.0
        output[:, 0] += torch.arange(output.shape[-1]) * 1e4  # an outlier, which is left out
        return output

    model.model.layers[-1].register_forward_hook(alike)
    collapsed = measure(model, [batch])
    assert collapsed.distance[-1] < 0.01 and collapsed.distance[0] == spread.distance[0]
    assert collapsed.dimensions[-1] == spread.dimensions[-1]  # the mean does not count, only what varies
    assert collapsed.deep(collapsed.distance) == collapsed.distance[-1]


def test_texts_that_are_too_short_to_compare_are_told() -> None:
    with pytest.raises(PunaError, match="three tokens"):
        measure(kit.decoder(kit.spec_of()), [batch_of(2, 2)])
