"""muP in the weights: the multipliers' own form step by step, its neutral setting, and widths that agree."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from little_trainings import train, weights
from torch.nn import functional

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.core.stage import Context, get_stage, validate
from puna.model.llama import Llama
from puna.model.mup import Mup, begin, parts
from puna.model.spec import INITIAL_DEVIATION, BlockSpec, LlamaSpec
from puna.train.optimizer import Optimizer, OptimizerSettings

NEUTRAL = {
    "deviation": 0.02,
    "embedding_multiplier": 1.0,
    "output_multiplier": 1.0,
    "attention": "inverse_root",
    "depth_scaled": False,
}


def spec(width: int = 32, *, tied: bool = True) -> LlamaSpec:
    block = BlockSpec(heads=2, kv_heads=2, head_dim=width // 2, width=2 * width)
    return LlamaSpec(vocab_size=40, hidden_size=width, blocks=(block, block), tied=tied)


class Explicit:
    """The form with multipliers: a Llama's layers between an embedding and logits that are multiplied."""

    def __init__(self, settings: Mup, *, tied: bool) -> None:
        self.model = Llama(spec(tied=tied), generator=torch_generator(3, "explicit"))
        self.settings, self.tied = settings, tied
        self.narrower = settings.base_width / self.model.spec.hidden_size
        head_dim = self.model.spec.blocks[0].head_dim
        scaled = tuple(  # 1/d itself, where the folded form scales q_proj
            dataclasses.replace(block, logit_scale=1 / head_dim) for block in self.model.spec.blocks
        )
        self.model.set_blocks(scaled)
        layers = 2 * len(self.model.spec.blocks)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.dim() == 2:
                    hidden = "layers" in name
                    start = (
                        settings.deviation / INITIAL_DEVIATION * (math.sqrt(self.narrower) if hidden else 1.0)
                    )
                    start /= (
                        math.sqrt(layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                    )
                    parameter.mul_(start)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        model = self.model
        embedded = (
            functional.embedding(ids, model.model.embed_tokens.weight) * self.settings.embedding_multiplier
        )
        model._embed = lambda given: embedded  # type: ignore[method-assign]
        return model.logits(model.hidden(ids)) * self.settings.output_multiplier * self.narrower

    def rate_of(self, name: str) -> float:
        return self.narrower if "layers" in name and "norm" not in name else 1.0


@pytest.mark.parametrize("tied", [True, False])
def test_the_plain_llama_learns_as_the_one_with_multipliers(tied: bool) -> None:
    """Five steps of AdamW on both, in float64 and with an epsilon that is nothing."""
    settings = Mup(base_width=8, deviation=0.1, embedding_multiplier=5.0, output_multiplier=2.0)
    explicit = Explicit(settings, tied=tied)
    folded = Llama(spec(tied=tied), generator=torch_generator(3, "explicit"))
    begin(folded, settings)
    told = parts(folded.spec, settings)
    models = {"explicit": explicit.model.double(), "folded": folded.double()}
    rates = {
        "explicit": {name: (explicit.rate_of(name), 1.0) for name, _ in folded.named_parameters()},
        "folded": {name: (part.rate, part.decay) for name, part in told.items()},
    }
    ids = torch.randint(40, (6, 12), generator=torch_generator(0, "ids"))
    losses: dict[str, list[float]] = {}
    for kind, model in models.items():
        groups = []
        for name, parameter in model.named_parameters():
            rate, decay = rates[kind].get(name, (1.0, 1.0))
            groups.append(
                {
                    "params": [parameter],
                    "lr": 1e-2 * rate,
                    "weight_decay": 0.1 * decay * (parameter.dim() > 1),
                }
            )
        optimizer = torch.optim.AdamW(groups, eps=1e-30)
        for _ in range(5):
            logits = explicit.logits(ids) if kind == "explicit" else model(ids)
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            losses.setdefault(kind, []).append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses["folded"][-1] < losses["folded"][0]
    assert losses["explicit"] == pytest.approx(losses["folded"], abs=2e-4)  # logits are rounded to float32


def test_a_neutral_setting_moves_no_bit_and_no_rate() -> None:
    neutral = Mup(base_width=32, **NEUTRAL)
    assert parts(spec(), neutral) == {}
    model = Llama(spec(), generator=torch_generator(1, "x"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    begin(model, neutral)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_layers_that_are_not_plain_are_refused() -> None:
    blocks = (spec().blocks[0], BlockSpec(attention="linear", width=64))
    with pytest.raises(PunaError, match="plain layers alone") as error:
        parts(spec().replace(blocks=blocks), Mup())
    assert error.value.where == "layer 1"


def test_the_papers_figures() -> None:
    """Width 4,096 over 256: rates of hidden matrices, multiplier of the logits, deviations."""
    block = BlockSpec(heads=32, kv_heads=32, head_dim=128, width=10922)
    told = parts(LlamaSpec(vocab_size=32032, hidden_size=4096, blocks=(block,) * 32, tied=True), Mup())
    layer = "model.layers.31."
    assert told[f"{layer}mlp.up_proj.weight"].rate == told[f"{layer}self_attn.o_proj.weight"].rate == 0.0625
    assert told[f"{layer}mlp.up_proj.weight"].start * INITIAL_DEVIATION == pytest.approx(0.01825)
    assert told[f"{layer}mlp.down_proj.weight"].start * INITIAL_DEVIATION == pytest.approx(0.00228, abs=5e-6)
    assert told["model.embed_tokens.weight"].rate == 14.6
    assert told["model.norm.weight"].start * 14.6 == pytest.approx(0.13875)
    query, key = told[f"{layer}self_attn.q_proj.weight"], told[f"{layer}self_attn.k_proj.weight"]
    assert query.start / key.start == query.rate / key.rate == pytest.approx(128**-0.5)
    assert query.rate * query.decay == pytest.approx(key.rate * key.decay)


def test_the_optimiser_goes_by_the_scales() -> None:
    torch.manual_seed(0)
    named = {"a": torch.nn.Parameter(torch.ones(2, 2)), "b": torch.nn.Parameter(torch.ones(2, 2))}
    optimizer = Optimizer(named.items(), OptimizerSettings(0.1, max_grad_norm=0, scales={"b": (0.5, 1.0)}))
    for parameter in named.values():
        assert parameter.grad is not None
        parameter.grad += 1
    optimizer.step(1.0, 1, 1.0)
    moved = {name: float((1 - parameter.detach()).abs().max()) for name, parameter in named.items()}
    assert moved["a"] == pytest.approx(0.1, rel=1e-3) and moved["b"] == pytest.approx(0.05, rel=1e-3)


def test_a_trained_model_is_refused_and_a_new_one_begins(places: dict[str, Path], tmp_path: Path) -> None:
    definition = get_stage("mup_start")
    settings = validate(definition.parameters, {"mup": {"base_width": 16}}, where="test")

    def start(model: Path, out: str) -> Any:
        return definition.function(Context("start", tmp_path / out, {"model": model}), settings)

    outcome = start(places["model"], "new")
    assert outcome.metrics["scaled"] == 2 + 2 * 7  # embedding, final norm, seven matrices of two layers
    trained, _ = train({**places, "model": outcome.outputs["model"]}, tmp_path / "t", mup={"base_width": 16})
    with pytest.raises(PunaError, match="this one has been trained"):
        start(trained.outputs["model"], "again")


def test_mup_moves_rates_in_training_and_its_neutral_setting_none(
    places: dict[str, Path], tmp_path: Path
) -> None:
    plain, _ = train(places, tmp_path / "plain")
    neutral, _ = train(places, tmp_path / "neutral", mup={"base_width": 32, **NEUTRAL})
    narrow, _ = train(places, tmp_path / "narrow", mup={"base_width": 8})
    same, other = weights(neutral), weights(narrow)
    assert all(torch.equal(tensor, same[name]) for name, tensor in weights(plain).items())
    assert not torch.equal(same["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_widths_agree_under_mup_and_grow_without(places: dict[str, Path], tmp_path: Path) -> None:
    definition = get_stage("mup_check")
    given = {"widths": [16, 64], "rates": [0.003, 0.006], "length": 16, "batch_tokens": 32, "steps": 3}
    given |= {"sweep_steps": 4, "mup": {"base_width": 16}, "learning_rate": 0.003}
    settings = validate(definition.parameters, given, where="test")
    inputs = {"tokenizer": places["model"], "corpus": places["documents"]}
    context = Context("check", tmp_path / "check", inputs)
    metrics = definition.function(context, settings).metrics
    assert metrics["mup.hidden.apart"] < 0.2 < metrics["plain.hidden.apart"]
    assert metrics["plain.hidden.growth"] > 2 > metrics["mup.hidden.growth"]
    assert metrics["mup.best_rate.16"] in (0.003, 0.006) and metrics["mup.moved"] in (0, 1)
    assert len(context.report["tables"]) == 4
    with pytest.raises(PunaError, match="too small for these steps"):
        definition.function(
            context, validate(definition.parameters, {**given, "sweep_steps": 400}, where="test")
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"widths": [16, 20]}, "no multiple"),
        ({"widths": [64, 16]}, "rise"),
        ({"batch_tokens": 100}, "no multiple"),
    ],
)
def test_wrong_settings_of_the_check_are_told(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(PunaError, match=message):
        validate(get_stage("mup_check").parameters, wrong, where="test")
