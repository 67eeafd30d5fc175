"""Statistics of activations and gradients: each collector against its definition, token by token."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.edit import stats
from puna.edit.stats import COLLECTORS, SITES, Statistics, collect, site_of
from puna.model.llama import Llama
from puna.model.slicing import Masks, slice_tensors, soft_mask
from puna.model.spec import BlockSpec
from puna.model.units import KINDS, Kept, Unit, layers_of, number_of
from puna.text.packing import IGNORED, Batch
from tests.invariants import kit

UNEQUAL = (
    BlockSpec(heads=4, kv_heads=2, head_dim=8, width=20),
    BlockSpec(attention="none", width=12),
    BlockSpec(heads=3, kv_heads=1, head_dim=4, feed_forward="none"),
)


def batch_of(rows: list[list[int]], time: int, seed: int) -> Batch:
    """Rows of documents of these lengths, padded on the right."""
    ids = kit.random_ids(len(rows), time, seed)
    labels, segments = torch.full_like(ids, IGNORED), torch.full_like(ids, -1)
    positions = torch.zeros_like(ids)
    for row, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths):
            segments[row, start : start + length] = number
            positions[row, start : start + length] = torch.arange(length)
            labels[row, start : start + length - 1] = ids[row, start + 1 : start + length]
            start += length
    return Batch(ids, labels, positions, segments)


BATCHES = [batch_of([[5, 4], [7]], 9, 1), batch_of([[12]], 12, 2)]


def documents() -> list[Tensor]:
    return [
        batch.input_ids[row][batch.segments[row] == number][None]
        for batch in BATCHES
        for row in range(len(batch.input_ids))
        for number in range(int(batch.segments[row].max()) + 1)
    ]


def seen(model: Llama, module: Any, *, before: bool) -> Tensor:
    """What enters or leaves a module, document by document, [tokens, size]."""
    caught: list[Tensor] = []
    if before:
        handle = module.register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0][0]))
    else:
        handle = module.register_forward_hook(lambda _module, _inputs, output: caught.append(output[0]))
    with torch.no_grad():
        for ids in documents():
            model(ids)
    handle.remove()
    return torch.cat(caught).double()


@pytest.fixture(scope="module")
def model() -> Llama:
    return kit.decoder(kit.spec_of(*UNEQUAL))


@pytest.fixture(scope="module")
def collected(model: Llama) -> Statistics:
    return collect(model, BATCHES, COLLECTORS)


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-4, atol=1e-6)


def test_activations_are_those_of_each_site(model: Llama, collected: Statistics) -> None:
    sites = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in SITES]
    assert collected.tokens == 28 and len(sites) == 8
    for site in sites:
        rows = seen(model, model.get_submodule(site), before=True)
        same(collected.of("mean_abs")[site], rows.abs().mean(0))
        same(collected.of("max_abs")[site], rows.abs().amax(0))
        same(collected.of("gram")[site], sum(torch.outer(row, row) for row in rows))  # type: ignore[arg-type]
        assert collected.of("gram")[site].dtype == torch.float32
    assert site_of("model.layers.0.self_attn.v_proj") == "model.layers.0.self_attn.q_proj"
    assert site_of("model.layers.0.mlp.up_proj") == "model.layers.0.mlp.gate_proj"
    assert collected.of("mean_abs").keys() == set(sites)


def test_distances_are_those_of_the_stream_before_and_behind_each_block(
    model: Llama, collected: Statistics
) -> None:
    for layer, block in enumerate(model.model.layers):
        before, after = seen(model, block, before=True), seen(model, block, before=False)
        pairs = list(zip(before, after, strict=True))
        cosines = [a @ b / (a.norm() * b.norm()) for a, b in pairs]
        same(collected.of("cosine")["blocks"][layer], torch.stack(cosines).mean())
        same(
            collected.of("euclidean")["blocks"][layer], torch.stack([(b - a).norm() for a, b in pairs]).mean()
        )
        same(
            collected.of("manhattan")["blocks"][layer],
            torch.stack([(b - a).abs().sum() for a, b in pairs]).mean(),
        )
        shares = torch.stack([(b - a).norm() / a.norm() for a, b in pairs])
        same(collected.units("contribution", "block", layer)[0], shares.mean())


def test_contributions_are_what_a_unit_adds_to_the_stream(model: Llama, collected: Statistics) -> None:
    """What a half gives with one unit alone, its bias aside, is what that unit adds."""
    spec = model.spec
    for kind, name in (("channel", "mlp"), ("head_group", "self_attn")):
        for layer in range(3):
            for index in range(number_of(spec, kind, layer)):  # type: ignore[arg-type]
                # The mask of this layer alone, so that the stream that enters stays what it is.
                one = Masks(**{f"{kind}s": {layer: torch.eye(number_of(spec, kind, layer))[index]}})  # type: ignore[arg-type]
                with soft_mask(model, one):
                    added = seen(model, model.get_submodule(f"model.layers.{layer}.{name}"), before=False)
                same(collected.units("contribution", kind, layer)[index], added.norm(dim=1).mean())  # type: ignore[arg-type]
    streams = torch.stack([seen(model, block, before=True) for block in model.model.layers])
    same(collected.units("contribution", "hidden", -1), streams.abs().mean((0, 1)))


def test_taylor_is_the_sum_of_weight_times_gradient(model: Llama, collected: Statistics) -> None:
    """Against autograd on the documents one by one, and slices of the products."""
    targets, total = 0, torch.zeros(())
    for ids in documents():
        logits = model(ids)[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        targets += len(logits)
    weights = dict(model.named_parameters())
    gradients = torch.autograd.grad(total / targets, list(weights.values()))
    products = {
        name: (weight.detach() * gradient).abs()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }
    everything = Kept.everything(model.spec)
    # With a half's last unit its norm goes too, which is no unit's.
    norms = {name: torch.zeros_like(weight) for name, weight in weights.items() if "layernorm" in name}
    for kind in KINDS:
        for layer in layers_of(model.spec, kind):
            sums = collected.units("taylor", kind, layer)
            assert len(sums) == number_of(model.spec, kind, layer)
            owned = products if kind in ("hidden", "block") else products | norms
            whole = sum(float(product.double().sum()) for product in owned.values())
            for index in range(len(sums)):
                less = everything.without([Unit(kind, layer, index)])
                left = slice_tensors(owned, model.spec, less, correct=False)
                expected = whole - sum(float(product.double().sum()) for product in left.values())
                assert float(sums[index]) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_the_model_is_left_as_it_was(model: Llama) -> None:
    model.train()
    weight = next(iter(model.parameters()))
    weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    collect(model, BATCHES, ["taylor", "gram"])
    assert model.training and not weight.requires_grad
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    weight.requires_grad_(True)
    model.eval()


def test_a_trainer_that_waits_for_gradients_gets_none_and_loses_none(
    model: Llama, collected: Statistics
) -> None:
    """In bfloat16 hooks take gradients off the parameters, and the embedding goes to a sink."""
    from puna.train.optimizer import Optimizer, OptimizerSettings

    low = kit.same_weights(model, model.spec).bfloat16()
    plain = collect(low, BATCHES, ["taylor", "taylor_hidden"])
    optimizer = Optimizer(low.named_parameters(), OptimizerSettings(learning_rate=1e-3))
    watched = collect(low, BATCHES, ["taylor", "taylor_hidden"])
    for name, tensors in plain.values.items():
        assert all(torch.equal(watched.of(name)[key], tensor) for key, tensor in tensors.items())
    assert not optimizer.gradient.any()
    low.hidden(BATCHES[0].input_ids).square().sum().backward()
    assert optimizer.gradient.any()


def test_how_the_text_is_cut_into_batches_changes_nothing_but_rounding(
    model: Llama, collected: Statistics
) -> None:
    rows = [
        Batch(*(tensor[row : row + 1] for tensor in (b.input_ids, b.labels, b.positions, b.segments)))
        for b in BATCHES
        for row in range(len(b.input_ids))
    ]
    apart = collect(model, rows, COLLECTORS)
    for name, tensors in collected.values.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(apart.of(name)[key], tensor, rtol=1e-3, atol=1e-5)


def test_what_was_collected_is_read_again_for_the_same_weights_and_text_alone(
    model: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = collect(model, BATCHES, ["cosine", "mean_abs"], folder=tmp_path)
    passes: list[Any] = []
    run = stats._Pass.run
    monkeypatch.setattr(
        stats._Pass, "run", lambda self, batches: passes.append(self.wanted) or run(self, batches)
    )
    again = collect(model, BATCHES, ["mean_abs", "cosine"], folder=tmp_path)
    assert not passes
    for name in ("mean_abs", "cosine"):
        assert all(torch.equal(again.of(name)[key], tensor) for key, tensor in first.of(name).items())
    collect(model, BATCHES, ["cosine", "gram"], folder=tmp_path)
    assert passes == [["gram"]]
    changed = kit.same_weights(model, model.spec)
    with torch.no_grad():  # the same numbers in another order
        changed.model.layers[0].mlp.up_proj.weight.copy_(model.model.layers[0].mlp.up_proj.weight.flip(0))
    collect(changed, BATCHES, ["cosine"], folder=tmp_path)
    collect(model, BATCHES[:1], ["cosine"], folder=tmp_path)
    assert passes[1:] == [["cosine"], ["cosine"]]


def test_bad_requests_are_told(model: Llama) -> None:
    with pytest.raises(PunaError, match="unknown collector 'grams'"):
        collect(model, BATCHES, ["grams"])
    with pytest.raises(PunaError, match="no text"):
        collect(model, [], ["gram"])
    with pytest.raises(PunaError, match="not collected"):
        collect(model, BATCHES, ["cosine"]).of("gram")


def test_a_model_in_bfloat16_has_float32_sums(model: Llama, collected: Statistics) -> None:
    low = kit.same_weights(model, dataclasses.replace(model.spec)).bfloat16()
    found = collect(low, BATCHES, ["gram", "taylor"])
    for name, tensor in found.of("gram").items():
        assert tensor.dtype == torch.float32
        exact = collected.of("gram")[name]
        assert float((tensor - exact).norm() / exact.norm()) < 0.05
    exact, close = collected.units("taylor", "channel", 0), found.units("taylor", "channel", 0)
    assert close.dtype == torch.float32 and float((close - exact).norm() / exact.norm()) < 0.1
