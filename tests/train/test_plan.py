"""The plan against what really happens: weights trained, operations counted, bytes autograd keeps."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from puna.core.seeds import torch_generator
from puna.model.adapters import LoraSettings, add_lora
from puna.model.llama import Llama
from puna.model.spec import BlockSpec, LlamaSpec
from puna.train import plan
from puna.train.dropout import quicken
from puna.train.linear_loss import CHUNK
from puna.train.objectives import linear_cross_entropy
from puna.train.optimizer import Optimizer, OptimizerSettings
from puna.train.sharded_plan import shard_bytes

FULL = plan.Method()


def in_place_product(to: Any, left: Any, right: Any, **named: Any) -> int:
    """2 n m k; torch counts only the product that makes a new tensor."""
    return 2 * left[0] * left[1] * right[1]


IN_PLACE = {torch.ops.aten.addmm_: in_place_product}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
METHODS = {
    "full": FULL,
    "lora": plan.Method(4, 0.0, ALL),
    "lora with dropout": plan.Method(4, 0.1, ALL),
    "lora on two": plan.Method(2, 0.0, ("q_proj", "layers.1.mlp.up_proj")),
    "lora and embeddings": plan.Method(4, 0.1, ALL, ("embed_tokens", "lm_head")),
    "lora and norms": plan.Method(4, 0.0, ALL, ("norm", "input_layernorm")),
    "dora": plan.Method(4, 0.0, ALL, dora=True),
    "dora with dropout": plan.Method(4, 0.1, ALL, dora=True),
    "lora on nf4": plan.Method(4, 0.1, ("q_proj", "o_proj"), ("norm", "layers.1.mlp"), base="nf4"),
    "dora on nf4": plan.Method(4, 0.0, ("q_proj", "down_proj"), dora=True, base="nf4"),
    "lora and whole modules": plan.Method(2, 0.0, ("q_proj",), ("mlp", "1.self_attn.o_proj", "model.norm")),
}


def prepared(tiny_llama: Callable[..., Any], method: plan.Method, **changes: Any) -> Any:
    model = tiny_llama(**changes)
    if method.r:
        settings = LoraSettings(
            method.r, 8.0, method.dropout, method.target, False, method.full, method.dora, method.base
        )
        add_lora(model, settings, seed=0)
    quicken(model)
    return model.train()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tied", [True, False])
def test_trained_parameters_are_counted(tiny_llama: Callable[..., Any], name: str, tied: bool) -> None:
    model = prepared(tiny_llama, METHODS[name], tie_word_embeddings=tied)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.trained_parameters(model.spec, METHODS[name]) == trained
    assert Optimizer(model.named_parameters(), OptimizerSettings(1e-3)).count == trained


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
        {"model_type": "qwen2", "tie_word_embeddings": False},
    ],
)
def test_every_weight_is_in_a_module_that_the_plan_knows(
    tiny_llama: Callable[..., Any], changes: dict[str, Any]
) -> None:
    model = tiny_llama(**changes)
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        found[module] = found.get(module, 0) + parameter.numel()
    assert dict(plan.module_sizes(model.spec)) == found
    everything = plan.Method(2, 0.0, ("q_proj",), ("model", "lm_head"))
    adapter = plan.lora_parameters(model.spec, everything)
    assert plan.trained_parameters(model.spec, everything) == adapter + model.spec.parameter_count()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("biased", [False, True])
def test_bytes_of_the_weights_are_those_that_are_held(
    tiny_llama: Callable[..., Any], name: str, dtype: str, biased: bool
) -> None:
    """Parameters and buffers alike: codes and scales of a base in NF4 are buffers."""
    model = prepared(tiny_llama, METHODS[name], attention_bias=biased).to(getattr(torch, dtype))
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert plan.weight_bytes(model.spec, METHODS[name], dtype) == held


def test_nf4_makes_the_plan_smaller_by_what_the_weights_shrink(tiny_llama: Callable[..., Any]) -> None:
    spec = tiny_llama(hidden_size=96, intermediate_size=256).spec
    some = ALL[:-1]  # on NF4 an adapted down projection keeps its input
    plain, held = plan.Method(4, 0.0, some), plan.Method(4, 0.0, some, base="nf4")
    saved = plan.weight_bytes(spec, plain, "bfloat16") - plan.weight_bytes(spec, held, "bfloat16")
    projections = sum(count for name, count in plan.module_sizes(spec) if name.endswith("_proj"))
    assert saved == pytest.approx((16 - 4.127) / 8 * projections, rel=0.01)
    one_matrix = 96 * 256 * 2
    assert plan.memory(spec, plain, "bfloat16", 64) - plan.memory(
        spec, held, "bfloat16", 64
    ) == pytest.approx(saved - one_matrix)
    kept = plan.Method(4, 0.1, ALL, dora=True, base="nf4")
    assert plan.decoded_bytes(spec, kept, "bfloat16") == 2 * projections


def ids(batch: int, time: int) -> torch.Tensor:
    return torch.randint(320, (batch, time), generator=torch_generator(0, "ids"))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_those_torch_counts(tiny_llama: Callable[..., Any], name: str, tied: bool) -> None:
    """Torch counts attention dense, so it is compared on documents as short as they come.

    Where nothing before it is trained, the first layer passes no gradient on: one of twelve is little.
    """
    length = 2
    model = prepared(tiny_llama, METHODS[name], tie_word_embeddings=tied, num_hidden_layers=12)
    tokens = ids(40, length)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        loss = linear_cross_entropy(model.hidden(tokens), model.head_weight, tokens)
        forward = counter.get_total_flops()
        loss.total.backward()
    total = counter.get_total_flops()
    method = METHODS[name]
    once = plan.magnitude_operations(model.spec, method)
    assert (total - once) / tokens.numel() == pytest.approx(
        plan.training_operations(model.spec, method, length), rel=0.03
    )
    head = 2 * model.spec.vocab_size * model.spec.hidden_size
    low_rank = plan.lora_parameters(model.spec, dataclasses.replace(method, dora=False))
    made_in_forward = head * (2 if method.trains_head(model.spec) else 1) + 2 * low_rank
    if method.dora and method.dropout:  # the base's matrices once more, for what was dropped
        made_in_forward += 2 * sum(n for name, n in plan.module_sizes(model.spec) if name.endswith("_proj"))
    expected = plan.forward_operations(model.spec, length) + made_in_forward
    assert (forward - once) / tokens.numel() == pytest.approx(expected, rel=0.03)


class Saved:
    """A tensor that autograd keeps, and for as long: a graph that nothing asks for is dropped at once."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps(tiny_llama: Callable[..., Any], name: str, dtype: str) -> None:
    """Every tensor saved for the backward pass, each storage once, weights left out."""
    model = prepared(tiny_llama, METHODS[name], num_hidden_layers=12).to(getattr(torch, dtype))
    measured = kept_by_autograd(model, METHODS[name])
    assert measured == pytest.approx(plan.activation_bytes(model.spec, METHODS[name], dtype) * 256, rel=0.05)


def kept_by_autograd(model: Any, method: plan.Method) -> int:
    """Bytes kept for 4 rows of 64 tokens, without the head's gradient, which is counted with the loss."""
    held = [*model.parameters(), *model.buffers()]
    weights = {tensor.untyped_storage().data_ptr() for tensor in held}
    packed: weakref.WeakSet[Saved] = weakref.WeakSet()

    def keep(tensor: torch.Tensor) -> Saved:
        packed.add(saved := Saved(tensor))
        return saved

    tokens = ids(4, 64)
    segments = torch.bucketize(torch.arange(64), torch.tensor([10, 40])).expand(4, 64).contiguous()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        hidden = model.hidden(tokens, None, segments)
        loss = linear_cross_entropy(hidden, model.head_weight, tokens)
    storages = [hidden.untyped_storage(), *(saved.tensor.untyped_storage() for saved in packed)]
    kept = {storage.data_ptr(): storage.nbytes() for storage in storages}
    measured = sum(size for place, size in kept.items() if place not in weights)
    if method.trains_head(model.spec):
        measured -= 4 * model.spec.vocab_size * model.spec.hidden_size
    assert loss.targets == tokens.numel() == 256
    return measured


@pytest.mark.parametrize("bias", ["none", "qkv", "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_series_and_shortcuts_are_planned_too(dtype: str, bias: Any) -> None:
    """Weights, bytes that autograd keeps, operations that torch counts, and shards."""
    block = BlockSpec(heads=4, kv_heads=2, head_dim=12, width=96, series=2, shortcut=24)
    spec = LlamaSpec(320, 48, (block,) * 12, tied=True, attention_bias=bias, mlp_bias=bias == "all")
    model = Llama(spec, dtype=getattr(torch, dtype))
    modules: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        modules[module] = modules.get(module, 0) + parameter.numel()
    assert dict(plan.module_sizes(spec)) == modules
    measured = kept_by_autograd(model, FULL)
    assert measured == pytest.approx(plan.activation_bytes(spec, FULL, dtype) * 256, rel=0.05)
    assert shard_bytes(spec, FULL, "float32", 1).weights == 4 * spec.parameter_count()
    if dtype == "bfloat16":
        return  # tiles of attention multiply what the mask hides, too
    tokens = ids(40, 2)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        linear_cross_entropy(model.hidden(tokens), model.head_weight, tokens).total.backward()
    operations = plan.training_operations(spec, FULL, 2)
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(operations, rel=0.03)


def test_memory_grows_with_what_it_is_made_of(tiny_llama: Callable[..., Any]) -> None:
    spec = tiny_llama().spec
    lora = METHODS["lora"]
    small = plan.memory(spec, lora, "bfloat16", 256, device="cuda")
    kept = plan.activation_bytes(spec, lora, "bfloat16", device="cuda")
    more = plan.memory(spec, lora, "bfloat16", 512, device="cuda")
    assert more - small == pytest.approx(256 * (kept + 2 * spec.vocab_size))
    assert plan.memory(spec, lora, "float32", 256, device="cuda") > small
    assert plan.memory(spec, FULL, "bfloat16", 256, device="cuda") > small
    assert plan.memory(spec, FULL, "bfloat16", 2) > spec.parameter_count() * (2 + 16)


def test_the_planner_knows_the_chunk_of_the_loss() -> None:
    assert plan.LOGITS_AT_ONCE == CHUNK
