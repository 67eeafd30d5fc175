from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vocabulary_samples import new_tokenizer, old_tokenizer, sentence_pairs

from puna.core.errors import PunaError
from puna.model.llama import Llama
from puna.text import pretrained
from puna.text.template import find_template
from puna.text.tokenizer import Tokenizer
from puna.text.vocabulary import builders
from puna.text.vocabulary.apply import apply_map, map_rows
from puna.text.vocabulary.operator import VocabularyMap

Build = Callable[..., Llama]


@pytest.fixture(scope="module")
def old() -> Tokenizer:
    return old_tokenizer()


@pytest.fixture(scope="module")
def new(old: Tokenizer) -> Tokenizer:
    return new_tokenizer(old)


@pytest.fixture
def model(tiny_llama: Callable[..., Any], old: Tokenizer) -> Build:
    """``model(**config changes)``: a tiny Llama with the old tokenizer."""

    def build(**changes: Any) -> Llama:
        built: Llama = tiny_llama(vocab_size=old.vocab_size, **changes)
        built.tokenizer, built.template = old, find_template(old)
        pretrained.settle_tokens(built)
        return built

    return build


def _dense(mapping: VocabularyMap) -> torch.Tensor:
    table = torch.zeros(mapping.new_size, mapping.old_size, dtype=torch.float64)
    for index in range(mapping.new_size):
        for column, weight in mapping.row(index).items():
            table[index, column] = weight
        if mapping.origin(index) == "mean":
            table[index] = 1 / mapping.old_size
    return table


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_changes_no_bit(model: Build, old: Tokenizer, tied: bool, dtype: torch.dtype) -> None:
    before = model(tie_word_embeddings=tied).to(dtype)
    with torch.no_grad():
        before.model.embed_tokens.weight[5] = -0.0  # a sum that starts from zero would lose this sign
    after = apply_map(before, builders.identity(before.spec.vocab_size), old)
    assert after.spec == before.spec
    for name, tensor in before.state_dict().items():
        kept = after.state_dict()[name]
        assert torch.equal(kept, tensor)
        assert torch.equal(torch.signbit(kept), torch.signbit(tensor))
    ids = torch.randint(0, old.vocab_size, (2, 11), generator=torch.Generator().manual_seed(0))
    assert torch.equal(after(ids), before(ids))


def test_identity_keeps_rows_that_pad_the_old_matrix(tiny_llama: Callable[..., Any], old: Tokenizer) -> None:
    before = tiny_llama(vocab_size=old.vocab_size + 13)
    after = apply_map(before, builders.identity(before.spec.vocab_size), old)
    assert torch.equal(after.head_weight, before.head_weight)


@pytest.mark.parametrize("tied", [True, False])
def test_input_and_output_rows_are_the_weighted_sums(
    model: Build, old: Tokenizer, new: Tokenizer, tied: bool
) -> None:
    before = model(tie_word_embeddings=tied)
    for mapping in (
        builders.alignment(old, new, sentence_pairs(60)),
        builders.weighted_pieces(old, new),
        builders.global_mean(old, new, copy_shared=True),
    ):
        after = apply_map(before, mapping, new)
        assert after.spec.tied == tied
        for name in ("model.embed_tokens.weight", *(() if tied else ("lm_head.weight",))):
            wanted = _dense(mapping) @ before.state_dict()[name].double()
            assert torch.allclose(after.state_dict()[name].double(), wanted, atol=1e-7)
    if not tied:
        assert not torch.equal(after.model.embed_tokens.weight, after.lm_head.weight)


def test_the_sums_do_not_depend_on_how_many_entries_are_taken_at_once(
    old: Tokenizer, new: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.randn(old.vocab_size, 8, generator=torch.Generator().manual_seed(1))
    mapping = builders.mean_of_pieces(old, new)
    whole = map_rows(mapping, matrix, mapping.new_size)
    monkeypatch.setattr("puna.text.vocabulary.apply._ENTRIES_AT_ONCE", 7)
    assert torch.equal(map_rows(mapping, matrix, mapping.new_size), whole)


def test_copied_rows_are_copies_in_half_precision_too(old: Tokenizer, new: Tokenizer) -> None:
    matrix = torch.randn(old.vocab_size, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    mapping = builders.mean_of_pieces(old, new)
    rows = map_rows(mapping, matrix, mapping.new_size)
    for index in range(mapping.new_size):
        if mapping.origin(index) == "copied":
            assert torch.equal(rows[index], matrix[next(iter(mapping.row(index)))])


@pytest.mark.parametrize("tied", [True, False])
def test_padded_rows_never_win(model: Build, old: Tokenizer, new: Tokenizer, tied: bool) -> None:
    before = model(tie_word_embeddings=tied)
    after = apply_map(before, builders.weighted_pieces(old, new), new, pad_to_multiple=128)
    assert after.spec.vocab_size == 384 > new.vocab_size
    assert after.head_weight.shape[0] == after.model.embed_tokens.weight.shape[0] == 384
    ids = torch.randint(0, new.vocab_size, (4, 16), generator=torch.Generator().manual_seed(0))
    logits = after(ids)
    assert (logits.argmax(-1) < new.vocab_size).all()
    mean = logits[..., : new.vocab_size].mean(-1, keepdim=True)
    assert torch.allclose(logits[..., new.vocab_size :], mean.expand(-1, -1, 384 - new.vocab_size), atol=1e-5)


def test_special_ids_stops_and_template_follow_the_new_tokenizer(
    model: Build, old: Tokenizer, new: Tokenizer
) -> None:
    before = model()
    kept = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    after = apply_map(before, builders.weighted_pieces(old, new), new)
    assert after.tokenizer is new
    assert after.template is not None and after.template.source == before.template.source  # type: ignore[union-attr]
    assert new.tokens([after.spec.bos_id, *after.spec.eos_ids, after.spec.pad_id]) == old.tokens(  # type: ignore[list-item]
        [before.spec.bos_id, *before.spec.eos_ids, before.spec.pad_id]  # type: ignore[list-item]
    )
    assert after.spec.eos_ids != before.spec.eos_ids
    assert before.tokenizer is not None and before.tokenizer.vocabulary() == old.vocabulary()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in before.state_dict().items())
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in before.state_dict().items())


def test_the_written_model_opens_in_transformers_with_the_new_vocabulary(
    model: Build, old: Tokenizer, new: Tokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    after = apply_map(model(), builders.weighted_pieces(old, new), new, pad_to_multiple=8)
    folder = pretrained.save(after, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(folder))
    ids = new.encode("de kat ziet de hond")
    assert transformers.AutoTokenizer.from_pretrained(str(folder)).encode("de kat ziet de hond") == ids
    assert torch.allclose(theirs(torch.tensor([ids])).logits, after(torch.tensor([ids])), atol=1e-5)
    assert theirs.generation_config.eos_token_id == list(new.stop_ids)
    again = pretrained.load(folder)
    assert again.spec == after.spec
    assert again.tokenizer is not None and again.tokenizer.vocabulary() == new.vocabulary()


def test_random_rows_have_the_asked_for_spread(old: Tokenizer, new: Tokenizer) -> None:
    scale = torch.linspace(0.5, 2, 64)
    matrix = torch.randn(old.vocab_size, 64, generator=torch.Generator().manual_seed(1)) * scale + 3
    fixed = map_rows(builders.random(old, new, distribution="fixed"), matrix, new.vocab_size)
    assert fixed.mean().abs() < 0.001
    assert fixed.std() == pytest.approx(0.02, rel=0.03)
    matched = map_rows(builders.random(old, new, distribution="matched"), matrix, new.vocab_size)
    assert torch.allclose(matched.mean(0), matrix.mean(0), atol=0.4)
    assert torch.allclose(matched.std(0), matrix.std(0), rtol=0.15)


def test_random_rows_depend_on_seed_and_matrix_alone(old: Tokenizer, new: Tokenizer) -> None:
    matrix = torch.randn(old.vocab_size, 4, generator=torch.Generator().manual_seed(1))

    def rows(seed: int, name: str) -> torch.Tensor:
        return map_rows(builders.random(old, new, seed=seed), matrix, new.vocab_size, name)

    assert torch.equal(rows(1, "in"), rows(1, "in"))
    assert not torch.equal(rows(1, "in"), rows(2, "in"))
    assert not torch.equal(rows(1, "in"), rows(1, "out"))


def test_an_unknown_distribution_is_refused(old: Tokenizer, new: Tokenizer) -> None:
    mapping = builders.random(old, new, distribution="matching")  # type: ignore[arg-type]
    with pytest.raises(PunaError, match="did you mean 'matched'"):
        map_rows(mapping, torch.zeros(old.vocab_size, 2), new.vocab_size)


def test_maps_that_do_not_fit_model_or_tokenizer_are_refused(
    model: Build, old: Tokenizer, new: Tokenizer
) -> None:
    with pytest.raises(PunaError, match="made for a larger vocabulary"):
        apply_map(model(), builders.identity(old.vocab_size + 1), old)
    with pytest.raises(PunaError, match="too few rows"):
        apply_map(model(), builders.identity(old.vocab_size - 1), old)
    with pytest.raises(PunaError, match="at least 1"):
        apply_map(model(), builders.identity(old.vocab_size), old, pad_to_multiple=0)


def test_a_model_with_an_adapter_is_refused(model: Build, old: Tokenizer) -> None:
    from puna.model.adapters import LoraSettings, add_lora

    adapted = model()
    add_lora(adapted, LoraSettings(r=2, alpha=4), seed=0)
    with pytest.raises(PunaError, match="merge the adapter first"):
        apply_map(adapted, builders.identity(old.vocab_size), old)


@pytest.mark.smollm
def test_identity_changes_no_logit_of_the_real_model(smollm: Llama) -> None:
    mapping = builders.identity(smollm.spec.vocab_size)
    assert smollm.tokenizer is not None
    after = apply_map(smollm, mapping, smollm.tokenizer)
    ids = torch.tensor([smollm.tokenizer.encode("De puna is een hoogvlakte in de Andes.")])
    with torch.no_grad():
        assert torch.equal(after(ids), smollm(ids))
