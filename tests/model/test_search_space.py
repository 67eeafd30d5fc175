"""Children as genes: one spelling each, all of them, prefixes of channels; parts of the whole that learn."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator, torch_generator
from puna.model.adapters import LoraSettings, add_lora
from puna.model.llama import Llama
from puna.model.search_space import SearchSpace
from puna.model.slicing import Masks, sliced, soft_mask
from puna.model.spec import BlockSpec, LlamaSpec
from puna.model.subnetwork import part_of
from puna.model.units import Kept

BLOCK = BlockSpec(heads=4, kv_heads=2, head_dim=8, width=48)
SPEC = LlamaSpec(120, 32, (BLOCK,) * 4, tied=True)
SPACE = SearchSpace.of(SPEC, (4, 3, 2), (1.0, 0.5, 0.25), "spread")
GENES = st.tuples(*(st.integers(0, count - 1) for count in SPACE.choices))


def model_of(seed: int = 0) -> Llama:
    return Llama(SPEC, generator=torch_generator(seed, "children")).eval()


def test_the_space_holds_every_child_once() -> None:
    spellings = itertools.product(*(range(count) for count in SPACE.choices))
    children = {SPACE.canonical(genes) for genes in spellings}
    assert len(children) == SPACE.size == 3**4 + 3**3 + 3**2
    assert len({SPACE.kept(genes) for genes in children}) == SPACE.size


@given(GENES, GENES)
def test_genes_of_layers_that_are_not_there_do_not_matter(
    genes: tuple[int, ...], other: tuple[int, ...]
) -> None:
    there = set(SPACE.layers(genes))
    changed = (
        genes[0],
        *(
            own if layer in there else foreign
            for layer, (own, foreign) in enumerate(zip(genes[1:], other[1:], strict=True))
        ),
    )
    assert SPACE.canonical(changed) == SPACE.canonical(genes)
    assert SPACE.kept(changed) == SPACE.kept(genes)
    assert SPACE.one_hot(changed) == SPACE.one_hot(genes)
    assert SPACE.canonical(SPACE.canonical(genes)) == SPACE.canonical(genes)


@given(GENES)
def test_a_child_masked_materialised_and_as_a_part_is_the_same(genes: tuple[int, ...]) -> None:
    model, kept = model_of().double(), SPACE.kept(genes)
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad(), soft_mask(model, Masks.of(SPEC, kept, torch.float64)):
        masked = model.hidden(ids)
    with torch.no_grad():
        materialised = sliced(model, kept)
        torch.testing.assert_close(masked, materialised.hidden(ids), rtol=1e-5, atol=1e-7)
        assert torch.equal(materialised.hidden(ids), part_of(model, kept).hidden(ids))
    there = SPACE.layers(genes)
    widths = [SPACE.widths[layer][genes[1 + layer]] for layer in there]
    assert [block.width for block in materialised.spec.blocks] == widths


def test_the_maximal_genes_are_the_whole_decoder_to_the_bit() -> None:
    model = model_of()
    assert SPACE.kept(SPACE.whole) == Kept.everything(SPEC)
    child, ids = sliced(model, SPACE.kept(SPACE.whole)), torch.arange(30).view(2, 15)
    assert child.spec == model.spec
    for name, weight in model.named_parameters():
        assert torch.equal(weight, child.get_parameter(name))
    assert torch.equal(model(ids), child(ids))


def test_gradients_of_a_part_are_those_of_the_child_at_its_places_and_zero_elsewhere() -> None:
    genes = (1, 1, 0, 2, 1)
    model, kept = model_of(), SPACE.kept(genes)
    alone = sliced(model_of(), kept)
    ids = torch.arange(24).view(2, 12)
    part = part_of(model, kept)
    part.hidden(ids).square().sum().backward()
    alone.hidden(ids).square().sum().backward()
    there = SPACE.layers(genes)
    for name, weight in alone.named_parameters():
        whole = name
        if ".layers." in name:
            number, rest = name.removeprefix("model.layers.").split(".", 1)
            whole = f"model.layers.{there[int(number)]}.{rest}"
        found = model.get_parameter(whole).grad
        assert found is not None and weight.grad is not None
        inside = tuple(slice(size) for size in weight.shape)
        torch.testing.assert_close(found[inside], weight.grad)
        outside = found.clone()
        outside[inside] = 0
        assert not outside.any()
    (gone,) = set(range(4)) - set(there)
    assert model.get_parameter(f"model.layers.{gone}.mlp.up_proj.weight").grad is None


def test_a_part_copies_no_cut_matrix_and_holds_no_more_rows_than_it_computes() -> None:
    model = model_of()
    part = part_of(model, SPACE.kept((2, 2, 2, 2, 2)))
    assert len(part.model.layers) == 2
    down = part.model.layers[0].mlp.down_proj.weight
    assert down.shape == (32, 12)
    assert down.untyped_storage().data_ptr() == model.model.layers[0].mlp.down_proj.weight.data_ptr()


def test_recomputed_layers_of_a_part_change_no_gradient() -> None:
    gradients = []
    for again in (0, 3):
        model = model_of().train()
        model.recomputed_layers = again
        part_of(model, SPACE.kept((1, 1, 1, 1, 1))).hidden(torch.arange(16).view(1, 16)).sum().backward()
        gradients.append(model.get_parameter("model.layers.0.mlp.gate_proj.weight").grad)
    assert torch.equal(*gradients)


def test_policies_say_which_layers_leave() -> None:
    def left(leaving: object, layers: int) -> tuple[int, ...]:
        space = SearchSpace.of(LlamaSpec(9, 32, (BLOCK,) * 8), (8, 6, 5), (1.0,), leaving)  # type: ignore[arg-type]
        depth = (8, 6, 5).index(layers)
        return space.layers((depth, *(0,) * 8))

    assert left("last", 6) == (0, 1, 2, 3, 4, 5)
    assert left("spread", 6) == (0, 1, 2, 3, 5, 7)
    assert left((0, 7, 3), 6) == (1, 2, 3, 4, 5, 6)
    assert left((0, 7, 3), 5) == (1, 2, 4, 5, 6)
    assert set(left("spread", 5)) < set(left("spread", 6))


def test_drawn_children_are_canonical_and_reach_every_size() -> None:
    generator = numpy_generator(0, "drawn")
    drawn = [SPACE.sample(generator) for _ in range(400)]
    assert all(SPACE.canonical(genes) == genes for genes in drawn)
    assert {genes[0] for genes in drawn} == {0, 1, 2}
    assert SPACE.whole in drawn or SPACE.smallest in drawn or len({*drawn}) > 60


@pytest.mark.parametrize(
    ("layers", "shares", "leaving", "words"),
    [
        ((3, 2), (1.0,), "last", "numbers of layers"),
        ((4, 0), (1.0,), "last", "numbers of layers"),
        ((4, 5), (1.0,), "last", "numbers of layers"),
        ((4,), (0.5,), "last", "shares of the channels"),
        ((4, 2), (1.0,), (1,), "layers that leave"),
        ((4, 2), (1.0,), (1, 1), "layers that leave"),
        ((4, 2), (1.0,), (1, 4), "layers that leave"),
    ],
)
def test_a_space_without_the_whole_or_with_unfit_layers_is_refused(
    layers: tuple[int, ...], shares: tuple[float, ...], leaving: object, words: str
) -> None:
    with pytest.raises(PunaError, match=words):
        SearchSpace.of(SPEC, layers, shares, leaving)  # type: ignore[arg-type]


def test_genes_of_another_space_and_adapters_are_refused() -> None:
    for genes in ((0, 0, 0), (3, 0, 0, 0, 0), (0, 0, 0, 0, -1)):
        with pytest.raises(PunaError, match="genes are not of this space"):
            SPACE.canonical(genes)
    model = model_of()
    add_lora(model, LoraSettings(r=2), seed=0)
    with pytest.raises(PunaError, match="under an adapter"):
        part_of(model, SPACE.kept(SPACE.whole))
