"""A super-network is tuned: the whole and children by turns, drawn by seed and step, exactly resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from little_trainings import SMALL, steps, train, weights

from puna.core.errors import PunaError
from puna.core.stage import validate
from puna.model.llama import Llama
from puna.model.search_space import SearchSpace
from puna.model.spec import BlockSpec, LlamaSpec
from puna.train.objectives import CrossEntropy
from puna.train.stages import Train
from puna.train.subnetworks import Alternating
from puna.train.train_plan import plan_train

CHILDREN = {"layers": [2, 1], "widths": [1.0, 0.5], "leaving": "last"}
SPEC = LlamaSpec(120, 32, (BlockSpec(heads=4, kv_heads=2, head_dim=8, width=48),) * 4, tied=True)
SPACE = SearchSpace.of(SPEC, (4, 3, 2), (1.0, 0.5, 0.25))


def test_the_whole_and_children_take_turns_and_children_are_of_seed_and_step_alone() -> None:
    one, again = (Alternating(CrossEntropy(), SPACE, seed=3) for _ in range(2))
    drawn = [one.genes(step) for step in range(40)]
    assert all(genes == SPACE.whole for genes in drawn[::2])
    assert len({*drawn[1::2]}) > 15
    assert [again.genes(step) for step in reversed(range(40))] == drawn[::-1]
    other = Alternating(CrossEntropy(), SPACE, seed=4)
    assert [other.genes(step) for step in range(40)] != drawn
    more = Alternating(CrossEntropy(), SPACE, seed=3, child_steps=3)
    assert [step for step in range(12) if more.genes(step) == SPACE.whole] == [0, 4, 8]


def test_a_step_of_a_child_learns_the_child_alone(places: dict[str, Path], tmp_path: Path) -> None:
    """Of two layers one leaves: behind a step of a child without it, it stands as the first step left it."""
    leaves = {"children": {**CHILDREN, "widths": [0.5, 1.0]}, "seed": 0}
    found: dict[int, dict[str, torch.Tensor]] = {}
    for last in (1, 2):
        outcome, _ = train(places, tmp_path / str(last), **leaves, stop_after=last, betas=[0.0, 0.0])
        found[last] = weights(outcome)
    moved = {name for name, tensor in found[1].items() if not torch.equal(tensor, found[2][name])}
    assert any(name.startswith("model.layers.0.") for name in moved)
    gate = "model.layers.0.mlp.gate_proj.weight"
    drawn = Alternating(CrossEntropy(), SearchSpace.of(_spec_of(places), (2, 1), (1.0, 0.5), "last"), _seed())
    genes = drawn.genes(1)
    layers_gone = genes[0] == 1
    assert any(name.startswith("model.layers.1.") for name in moved) != layers_gone
    half = found[1][gate].shape[0] // 2
    same = torch.equal(found[1][gate][half:], found[2][gate][half:])
    assert same == (genes[1] == 1)
    assert layers_gone or genes[1] == 1, "the seed draws the whole: take another"


def _spec_of(places: dict[str, Path]) -> LlamaSpec:
    from puna.text import pretrained

    return pretrained.load(places["model"], dtype="float32").spec


def _seed() -> int:
    from puna.core.seeds import derive

    return derive(0, "lora")


def test_a_tuned_super_network_has_better_children_than_plain_tuning(
    places: dict[str, Path], tmp_path: Path
) -> None:
    from puna.model.slicing import sliced
    from puna.text import pretrained

    losses = {}
    for name, given in {"plain": {}, "super": {"children": CHILDREN}}.items():
        outcome, _ = train(places, tmp_path / name, **given, max_steps=40)
        model = pretrained.load(outcome.outputs["model"], dtype="float32")
        space = SearchSpace.of(model.spec, (2, 1), (1.0, 0.5), "last")
        pretrained.save(sliced(model, space.kept(space.smallest)), tmp_path / f"{name}-child")
        again, _ = train(
            {**places, "model": tmp_path / f"{name}-child"},
            tmp_path / f"{name}-seen",
            held_out=True,
            max_steps=1,
        )
        losses[name] = again.metrics["before.en.loss"]
    assert losses["super"] < losses["plain"] - 0.05


def test_the_largest_child_alone_is_plain_training_to_the_bit(
    places: dict[str, Path], tmp_path: Path
) -> None:
    plain, _ = train(places, tmp_path / "plain")
    whole, _ = train(places, tmp_path / "whole", children={"layers": [2], "widths": [1.0]})
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, weights(whole)[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_stopped_goes_on_to_the_same_weights(
    places: dict[str, Path], tmp_path: Path, dtype: str
) -> None:
    given: dict[str, Any] = {"children": CHILDREN, "max_steps": 7, "dtype": dtype}
    straight, _ = train(places, tmp_path / "straight", **given)
    begun, _ = train(places, tmp_path / "begun", **given, stop_after=3, state_after="end")
    resumed, _ = train(places, tmp_path / "resumed", **given, state=begun.outputs["state"])
    for name, tensor in weights(straight).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    assert steps(tmp_path / "straight")[3:] and len(steps(tmp_path / "resumed")) == 4


def test_micro_batches_of_a_step_learn_with_one_child(places: dict[str, Path], tmp_path: Path) -> None:
    whole, _ = train(places, tmp_path / "64", children=CHILDREN, max_steps=2)
    parted, _ = train(places, tmp_path / "32", children=CHILDREN, max_steps=2, micro_batch_tokens=32)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(parted)[name], rtol=1e-3, atol=1e-4)


def test_a_child_computes_less(places: dict[str, Path], tmp_path: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from puna.model.subnetwork import part_of

    model, ids = Llama(SPEC), torch.arange(24).view(2, 12)
    flops = []
    for kept in (SPACE.kept(SPACE.whole), SPACE.kept(SPACE.smallest)):
        with FlopCounterMode(display=False) as counter:
            part_of(model, kept).hidden(ids).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[1] < 0.5 * flops[0]


def test_the_plan_counts_what_children_compute() -> None:
    class Device:
        name, memory = "cpu", 1e12

        def seconds(self, flops: float, dtype: str) -> float:
            return flops

        def read_seconds(self, number: float) -> float:
            return 0.0

    class Shapes:
        spec, models, dtype, device, processes = SPEC, {}, "float32", Device(), 1
        corpora = {"corpus.main": 1000.0}  # noqa: RUF012

        def tokens_of(self, name: str) -> float:
            return 1000.0

    def flops(**given: Any) -> float:
        return plan_train(validate(Train, given, where="test"), Shapes()).flops

    children = {"layers": [4, 2], "widths": [1.0, 0.25]}
    assert flops(children={"layers": [4], "widths": [1.0]}) == pytest.approx(flops())
    assert flops(children=children) < 0.95 * flops()
    assert flops(children=children, child_steps=3) < flops(children=children)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"children": CHILDREN, "lora": {}}, "children do not go with lora"),
        ({"children": CHILDREN, "exits": [1]}, "children do not go with lora, exits"),
        ({"children": CHILDREN, "sharding": "full"}, "sharding 'full'"),
        ({"children": CHILDREN, "objective": "dpo"}, "children means nothing with objective 'dpo'"),
        ({"child_steps": 2}, "child_steps means nothing without children"),
        ({"children": {"layers": []}}, "layers"),
        ({"children": {"layers": [2], "widths": [1.5]}}, "widths"),
    ],
)
def test_children_that_cannot_be_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(PunaError) as error:
        validate(Train, {**SMALL, **given}, where="test")
    assert words in str(error.value)


def test_children_of_another_depth_are_refused(places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="numbers of layers"):
        train(places, tmp_path, children={"layers": [3, 1]})
