"""Training of twins alone: what moves, what does not, the divergence and its gradients, the plan of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from little_trainings import SMALL, steps, train, weights
from safetensors.torch import load_file
from test_plan import IN_PLACE, kept_by_autograd
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.core.stage import validate
from puna.edit.growing.expand import expand, plan
from puna.model.llama import Llama
from puna.model.spec import BlockSpec, LlamaSpec, MergerKind
from puna.model.twins import watched
from puna.text import pretrained
from puna.train import plan as planning
from puna.train.loader import MicroBatch
from puna.train.objectives import IGNORED, CrossEntropy
from puna.train.stages import Train
from puna.train.train_plan import method_of
from puna.train.twins import TwinLoss, apart, divergence_of, free_twins
from tests.invariants import kit

MERGERS = get_args(MergerKind)


def grown(folder: Path, merger: MergerKind = "dlerp", kind: Any = "concat") -> Llama:
    """The model in ``folder`` with its second layer expanded."""
    base = pretrained.load(folder, dtype="float32")
    return expand(base, plan(base.spec, (1,), merger, kind), seed=0)


def micro_of(labels: Tensor, ids: Tensor) -> MicroBatch:
    from puna.text.packing import Batch

    batch = Batch(ids, labels, torch.arange(ids.shape[1]).expand_as(ids), torch.zeros_like(ids))
    return MicroBatch(batch=batch, rows=torch.arange(len(ids)).numpy())


def lively(merger: MergerKind) -> Llama:
    """Two expanded layers of four, no twin like its layer, float64."""
    model = kit.decoder(kit.spec_of(*[kit.BLOCK] * 4))
    model = expand(model, plan(model.spec, (1, 3), merger), seed=0).double()
    generator = torch_generator(0, "twins")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".twin." in name:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def labelled(seed: int = 0) -> tuple[Tensor, Tensor]:
    ids = kit.random_ids(3, 12, seed)
    labels = ids.roll(-1, 1).clone()
    labels[:, -1] = labels[0, :4] = IGNORED
    return labels, ids


@pytest.mark.parametrize("merger", ["lerp", "dlerp", "moe"])
def test_twins_alone_are_trained(places: dict[str, Path], tmp_path: Path, merger: MergerKind) -> None:
    model = grown(places["model"], merger)
    pretrained.save(model, tmp_path / "grown")
    before = load_file(tmp_path / "grown" / "model.safetensors")
    outcome, _ = train({**places, "model": tmp_path / "grown"}, tmp_path / "run", twins={}, name="twins")
    after = weights(outcome)
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".twin." in name or ".merger." in name}
    layer = 4 * 32 * 32 - 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    assert outcome.metrics["trainable"] == layer + {"lerp": 1, "dlerp": 2 * 32 + 1, "moe": 32 + 1}[merger]
    assert outcome.metrics["divergence.first"] == 0.0
    assert outcome.metrics["divergence.last"] > 0.0
    assert after.keys() == before.keys()


@pytest.mark.parametrize(
    ("twins", "besides"),
    [
        ({"divergence": "mse"}, {}),
        ({"divergence": "none"}, {}),
        ({"factor": 30.0}, {}),
        ({"factor": "share"}, {}),
        ({"hold_share": True}, {}),
        ({"inserted": [0]}, {}),
    ],
    ids=str,
)
def test_flipping_an_option_of_twins_changes_the_model(
    places: dict[str, Path], tmp_path: Path, twins: dict[str, Any], besides: dict[str, Any]
) -> None:
    pretrained.save(grown(places["model"]), tmp_path / "grown")
    here = {**places, "model": tmp_path / "grown"}
    plain = weights(train(here, tmp_path / "a", twins={**besides}, name="twins")[0])
    other = weights(train(here, tmp_path / "b", twins={**besides, **twins}, name="twins")[0])
    assert any(not torch.equal(tensor, other[name]) for name, tensor in plain.items())
    if "hold_share" in twins:
        assert float(other["model.layers.1.merger.bias"]) == 0.0


def test_a_training_of_twins_goes_on_where_it_stood(places: dict[str, Path], tmp_path: Path) -> None:
    pretrained.save(grown(places["model"]), tmp_path / "grown")
    here = {**places, "model": tmp_path / "grown"}
    whole = weights(train(here, tmp_path / "whole", twins={}, name="twins")[0])
    first, _ = train(here, tmp_path / "first", twins={}, stop_after=2, state_after="end", name="twins")
    rest, _ = train(here, tmp_path / "rest", twins={}, state=first.outputs["state"], name="twins")
    assert all(torch.equal(tensor, weights(rest)[name]) for name, tensor in whole.items())
    assert len(steps(tmp_path / "whole")) == SMALL["max_steps"]


def test_stacked_layers_are_trained_by_number(places: dict[str, Path], tmp_path: Path) -> None:
    model = grown(places["model"], kind="stack")
    pretrained.save(model, tmp_path / "grown")
    before = load_file(tmp_path / "grown" / "model.safetensors")
    twins = {"inserted": [2]}
    outcome, _ = train({**places, "model": tmp_path / "grown"}, tmp_path / "run", twins=twins, name="twins")
    assert outcome.metrics["divergence.last"] == 0.0
    moved = {name for name, value in weights(outcome).items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("model.layers.2.") for name in moved)


def test_what_is_not_expanded_cannot_be_trained_so(places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="no layer of this model is expanded"):
        train(places, tmp_path / "run", twins={}, name="twins")
    with pytest.raises(PunaError, match="inserted layer"):
        free_twins(grown(places["model"]), inserted=(1,))


@pytest.mark.parametrize(
    "settings",
    [
        {"twins": {}, "lora": {}},
        {"twins": {}, "frozen": ["lm_head"]},
        {"twins": {}, "exits": [1]},
        {"twins": {}, "objective": "dpo"},
        {"twins": {"divergence": "none", "factor": 2.0}},
        {"twins": {"factor": 0.0}},
        {"twins": {"colour": 1}},
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(PunaError):
        validate(Train, settings, where="test")


TENSORS = st.tuples(st.integers(0, 500), st.sampled_from([1, 3, 8]), st.floats(0.1, 10))


@given(TENSORS)
def test_the_divergences_are_their_formulas(drawn: tuple[int, int, float]) -> None:
    seed, hidden, scale = drawn
    generator = torch_generator(seed, "apart")
    frozen, twin = scale * torch.randn(2, 4, hidden, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(apart(frozen, twin, "mse"), ((frozen - twin) ** 2).mean(-1))
    away = (1 - torch.nn.functional.cosine_similarity(frozen, twin, dim=-1)).relu()
    expected = torch.where(away < 1, away**2 / 2, away - 0.5)
    torch.testing.assert_close(apart(frozen, twin, "cosine"), expected)
    for divergence in ("mse", "cosine"):
        assert bool((apart(frozen, frozen, divergence) == 0).all())
        assert bool((apart(frozen.float(), frozen.float(), divergence) == 0).all())


@pytest.mark.parametrize("merger", MERGERS)
def test_the_objective_is_the_text_and_the_mean_divergence_of_its_layers(merger: MergerKind) -> None:
    model, (labels, ids) = lively(merger), labelled()
    micro = micro_of(labels, ids)
    text = CrossEntropy()(model, micro)
    for divergence in ("cosine", "mse"):
        for factor in (2.5, "share"):
            found = TwinLoss(divergence, factor)(model, micro)
            with watched(model) as seen:
                model.hidden(ids)
            chosen = labels != IGNORED
            layers = [divergence_of(each, divergence, factor)[chosen].sum() for each in seen]
            assert len(layers) == 2
            expected = text.total + sum(layers) / 2
            torch.testing.assert_close(found.total.double(), expected.double(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found.tokens, text.tokens)
            assert float(found.figures["divergence"]) > 0
    parts = [TwinLoss("mse")(model, micro_of(labels[[row]], ids[[row]])).total for row in range(3)]
    whole = TwinLoss("mse")(model, micro).total
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-4)


def test_the_divergence_pulls_at_no_frozen_layer_through_its_own_output() -> None:
    """Of the first expanded layer; later ones pull at what their twins read."""
    model, (_, ids) = lively("lerp"), labelled()
    with watched(model) as seen:
        model.hidden(ids)
    total = divergence_of(seen[0], "mse", 1.0).sum()
    named = dict(model.named_parameters())
    names = ["model.layers.1.mlp.down_proj.weight", "model.layers.1.twin.mlp.down_proj.weight"]
    gradients = torch.autograd.grad(total, [named[name] for name in names], allow_unused=True)
    assert gradients[0] is None
    assert gradients[1] is not None


def test_recomputed_layers_give_the_same_gradients() -> None:
    found = []
    for layers in (0, 4):
        model, (labels, ids) = lively("dlerp"), labelled()
        model.recomputed_layers = layers
        free_twins(model)
        TwinLoss("cosine")(model, micro_of(labels, ids)).total.backward()
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


@pytest.mark.parametrize("merger", MERGERS)
@pytest.mark.parametrize("held", [False, True])
def test_the_plan_counts_what_is_trained(merger: MergerKind, held: bool) -> None:
    model = lively(merger)
    free_twins(model, hold_share=held)
    settings = validate(Train, {"twins": {"hold_share": held}}, where="test")
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    method = method_of(settings)
    assert planning.trained_parameters(model.spec, method) == trained
    assert sum(size for _, size in planning.module_sizes(model.spec)) == model.spec.parameter_count()
    assert planning.weight_bytes(model.spec, method, "float32") == 4 * model.spec.parameter_count()


def test_the_plan_of_twins_is_what_torch_does() -> None:
    block = BlockSpec(heads=4, kv_heads=2, head_dim=12, width=96)
    base = Llama(LlamaSpec(320, 48, (block,) * 12, tied=True))
    model = expand(base, plan(base.spec, (2, 5, 8, 11), "dlerp"), seed=0)
    free_twins(model)
    method = method_of(validate(Train, {"twins": {}}, where="test"))
    kept = kept_by_autograd(model, method)
    assert kept == pytest.approx(planning.activation_bytes(model.spec, method, "float32") * 256, rel=0.15)
    ids = torch.randint(320, (40, 2), generator=torch_generator(0, "ids"))
    labels = ids.clone()
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        CrossEntropy()(model, micro_of(labels, ids)).total.backward()
    planned = planning.training_operations(model.spec, method, 2) * ids.numel()
    assert counter.get_total_flops() == pytest.approx(planned, rel=0.15)
