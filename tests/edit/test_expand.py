"""Decoders that grow by twins or stacked layers, and shrink back: formulas, stages, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import run_stage

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.data.corpus import write_corpus
from puna.edit.growing.expand import expand, last_of_groups, learnt_shares, merge_back, plan, seen_shares
from puna.model.adapters import LoraSettings, add_lora
from puna.model.llama import Llama
from puna.model.spec import MergerKind
from puna.text import pretrained
from tests.invariants import kit

MERGERS = get_args(MergerKind)


def four(seed: int = 0) -> Llama:
    return kit.decoder(kit.spec_of(*[kit.BLOCK] * 4), seed)


def grown(merger: MergerKind = "lerp", away: float = 0.1, **changes: Any) -> Llama:
    """Four layers, the second and the last expanded, twins so far from their layers."""
    base = four()
    model = expand(base, plan(base.spec, (1, 3), merger, **changes), seed=0)
    generator = torch_generator(0, "away")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".twin." in name:
                weight.add_(away * torch.randn(weight.shape, generator=generator))
    return model


@given(st.integers(1, 40), st.integers(1, 40))
def test_expanded_layers_lie_evenly_and_end_with_the_last(layers: int, count: int) -> None:
    if layers % count:
        with pytest.raises(PunaError, match="divides"):
            last_of_groups(layers, count)
        return
    chosen = last_of_groups(layers, count)
    assert len(chosen) == count
    assert chosen[-1] == layers - 1
    assert {later - one for one, later in itertools.pairwise(chosen)} <= {layers // count}


def test_the_papers_eight_of_thirty_two() -> None:
    assert last_of_groups(32, 8) == (3, 7, 11, 15, 19, 23, 27, 31)


def test_kinds_put_layers_where_they_say() -> None:
    spec = four().spec
    concat, stack, hybrid = (plan(spec, (1, 3), "dlerp", kind) for kind in ("concat", "stack", "hybrid"))
    assert (concat.twins, concat.inserted, concat.sources) == ((1, 3), (), (0, 1, 2, 3))
    assert (stack.twins, stack.inserted, stack.sources) == ((), (2, 5), (0, 1, 1, 2, 3, 3))
    assert (hybrid.twins, hybrid.inserted, hybrid.sources) == ((4,), (2,), (0, 1, 1, 2, 3))
    assert stack.spec.uniform
    assert not concat.spec.uniform


@settings(max_examples=20)
@given(st.sampled_from(MERGERS), st.floats(0, 1), st.sampled_from(["own", "lerp", "slerp"]))
def test_merged_layers_lie_between_the_two(merger: MergerKind, share: float, method: Any) -> None:
    model = grown(merger)
    merged = merge_back(model, {1: share, 3: share}, method)
    assert merged.spec == four().spec
    source = model.state_dict()
    line = method == "lerp" or (method == "own" and merger == "lerp")
    for name in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
        own, twin = source[f"model.layers.3.{name}"], source[f"model.layers.3.twin.{name}"]
        found = merged.state_dict()[f"model.layers.3.{name}"]
        if line:
            expected = (1 - share) * own + share * twin
        else:
            angle = torch.acos(torch.nn.functional.cosine_similarity(own, twin, dim=-1))[..., None]
            expected = torch.sin((1 - share) * angle) * own + torch.sin(share * angle) * twin
            expected = expected / torch.sin(angle)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(
        merged.state_dict()["model.layers.2.mlp.up_proj.weight"],
        four().get_parameter("model.layers.2.mlp.up_proj.weight"),
    )


@pytest.mark.parametrize("merger", MERGERS)
def test_twins_that_never_moved_merge_back_to_the_base(merger: MergerKind) -> None:
    model = grown(merger, away=0.0)
    merged = merge_back(model, {1: 0.3, 3: 0.7})
    kit.assert_same_bits(four(), merged, kit.random_ids(2, 12))


def test_shares_are_those_of_the_constant_or_of_the_tokens_seen() -> None:
    model = grown("dlerp")
    with torch.no_grad():
        for layer in (1, 3):
            model.model.layers[layer].merger.bias.fill_(1.0)
    assert learnt_shares(model) == pytest.approx({1: 0.731058, 3: 0.731058})
    texts = [[1, 5, 9, 22], [7, 3]]
    found = seen_shares(model, texts)
    shares = []
    for ids in texts:
        entering: list[torch.Tensor] = []
        handle = model.model.layers[1].merger.register_forward_hook(
            lambda _module, _inputs, output, kept=entering: kept.append(output[1])
        )
        with torch.no_grad():
            model(torch.tensor([ids]))
        handle.remove()
        shares += entering[0].flatten().tolist()
    assert found[1] == pytest.approx(sum(shares) / 6)
    with pytest.raises(PunaError, match="no text"):
        seen_shares(model, [])


def test_what_cannot_be_expanded_or_merged_is_refused() -> None:
    base = four()
    with pytest.raises(PunaError, match="not one of the model's"):
        plan(base.spec, (4,), "lerp")
    with pytest.raises(PunaError, match="no twin to put back"):
        merge_back(base, {})
    add_lora(base, LoraSettings(r=2), seed=0)
    with pytest.raises(PunaError, match="under an adapter"):
        expand(base, plan(base.spec, (1,), "lerp"), seed=0)


@pytest.fixture
def places(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> dict[str, Path]:
    model = tiny_llama(num_hidden_layers=4)
    model.tokenizer = tiny_tokenizer
    rows = [{"id": str(n), "text": "the cat sat " * 3, "source": "test", "language": "en"} for n in range(4)]
    about = {"provenance": [{"source": "test", "licence": "CC0"}], "ledger": {}}
    write_corpus(tmp_path / "text", "documents", rows, **about)
    return {"model": pretrained.save(model, tmp_path / "base"), "corpus": tmp_path / "text"}


def test_the_stages_expand_check_and_merge(places: dict[str, Path], tmp_path: Path) -> None:
    outcome, context = run_stage(
        "expand", tmp_path / "expand", {"model": places["model"]}, {"layers": 2, "merger": "lerp"}
    )
    assert outcome.metrics["difference"] == 0.0
    assert outcome.metrics["divergence.cosine"] == outcome.metrics["divergence.mse"] == 0.0
    assert outcome.metrics["twins"] == 2
    assert context.report["tables"][0]["rows"][0] == ["twins in layers", "1, 3"]
    again, _ = run_stage(
        "expand", tmp_path / "same", {"model": places["model"]}, {"layers": [1, 3], "merger": "lerp"}
    )
    kit.assert_same_bits(
        pretrained.load(outcome.outputs["model"]),
        pretrained.load(again.outputs["model"]),
        kit.random_ids(1, 9),
    )
    model = pretrained.load(outcome.outputs["model"], dtype="float32")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".twin." in name:
                weight.mul_(1.2)
    moved = pretrained.save(model, tmp_path / "moved")
    merged, _ = run_stage(
        "merge_twins", tmp_path / "merged", {"model": moved, "corpus": places["corpus"]}, {"tokens": 10}
    )
    assert merged.metrics["share.1"] == pytest.approx(0.5)
    inputs = {"base": places["model"], "expanded": moved, "merged": merged.outputs["model"]}
    checks, _ = run_stage("twin_checks", tmp_path / "checks", inputs, {})
    found = checks.metrics
    assert found["frozen_changed"] == 0
    assert found["frozen_tensors"] == 4 * 9 + 2
    assert found["added_parameters"] == found["added_formula"]
    assert found["cache_ratio"] == found["cache_ratio.engine"] == found["cache_ratio.formula"] == 1.5
    assert found["cached_difference"] < 1e-5
    assert found["served"] == 1.0
    assert found["merged_parameters_more"] == 0
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] += 1e-3
    inputs["expanded"] = pretrained.save(model, tmp_path / "touched")
    touched, _ = run_stage("twin_checks", tmp_path / "again", inputs, {})
    assert touched.metrics["frozen_changed"] == 1


def test_checks_against_another_base_name_the_tensor(places: dict[str, Path], tmp_path: Path) -> None:
    inputs = {"model": places["model"]}
    stacked, _ = run_stage("expand", tmp_path / "s", inputs, {"layers": 2, "kind": "stack"})
    swapped = {"base": stacked.outputs["model"], "expanded": places["model"]}
    with pytest.raises(PunaError, match=r"model\.layers\.4"):
        run_stage("twin_checks", tmp_path / "checks", swapped, {})


@pytest.mark.parametrize("layers", [[], [3, 1], 0, [-1]])
def test_layers_that_make_no_sense_are_refused(places: dict[str, Path], tmp_path: Path, layers: Any) -> None:
    with pytest.raises(PunaError):
        run_stage("expand", tmp_path / "x", {"model": places["model"]}, {"layers": layers})
