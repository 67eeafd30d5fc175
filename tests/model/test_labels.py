"""Heads for labels: pooling, masks, padding, files that transformers and peft open, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.core.errors import PunaError
from puna.core.files import read_json
from puna.core.seeds import torch_generator
from puna.model.adapters import LoraSettings, add_lora
from puna.model.cache import KeyValueCache
from puna.model.labels import LabelKind, add_label_head, label_logits, states_of_texts
from puna.model.steppers import make_stepper
from puna.model.unmasking import all_patterns, group_sizes, unmask, unmasked
from puna.text import pretrained

Build = Callable[..., Any]
NAMES = ("bad", "good", "so-so")
TEXTS = LabelKind(NAMES)
WORDS = LabelKind(NAMES, per="word", bias=True)


def labeller(build: Build, kind: LabelKind = TEXTS, pattern: str = "0", **changes: Any) -> Any:
    """A tiny decoder with lively weights and a head for labels, in evaluation mode."""
    model = build(**changes).eval()
    add_label_head(model, kind, seed=1)
    generator = torch_generator(0, "labels test")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(("norm" in name) + 0.2 * torch.randn(weight.shape, generator=generator))
    unmask(model, pattern)
    return model


def ids_of(rows: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 320, (rows, time), generator=torch_generator(seed, "ids"))


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [rows, time] and segments of texts of unequal length, padded with a real token's id."""
    time = max(map(len, rows))
    ids, segments = torch.full((len(rows), time), 7), torch.full((len(rows), time), -1)
    for number, row in enumerate(rows):
        ids[number, : len(row)], segments[number, : len(row)] = row, 0
    return ids, segments


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
@pytest.mark.parametrize("pattern", ["0", "1", "01"])
def test_a_text_beside_others_has_the_logits_it_has_alone(
    tiny_llama: Build, pooling: Any, pattern: str
) -> None:
    """The published code attends to padding and averages it in; here neither padding nor packing is seen."""
    model = labeller(tiny_llama, LabelKind(NAMES, pooling=pooling), pattern).double()
    texts = [ids_of(1, length, seed=length)[0] for length in (9, 3, 14, 1)]
    alone = torch.cat([label_logits(model, text[None]) for text in texts])
    assert torch.allclose(label_logits(model, *_with_segments(padded(texts))), alone, atol=1e-6)
    packed = torch.cat(texts)[None]
    segments = torch.arange(4).repeat_interleave(torch.tensor([9, 3, 14, 1]))[None]
    assert torch.allclose(label_logits(model, packed, None, segments), alone, atol=1e-6)


def _with_segments(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, None, torch.Tensor]:
    return pair[0], None, pair[1]


def test_states_of_texts_are_those_of_their_own_tokens_alone() -> None:
    hidden = torch.arange(24.0).view(2, 4, 3)
    segments = torch.tensor([[0, 0, 1, -1], [-1, 0, 0, 0]])
    assert states_of_texts(hidden, segments, "last")[:, 0].tolist() == [3.0, 6.0, 21.0]
    assert states_of_texts(hidden, segments, "mean")[:, 0].tolist() == [1.5, 6.0, 18.0]
    assert states_of_texts(-hidden, segments, "max")[:, 0].tolist() == [0.0, -6.0, -15.0]
    assert states_of_texts(hidden, None, "last")[:, 0].tolist() == [9.0, 21.0]


@pytest.mark.parametrize("pattern", all_patterns(2))
def test_a_place_sees_later_words_if_and_only_if_a_layer_is_unmasked(tiny_llama: Build, pattern: str) -> None:
    model = labeller(tiny_llama, WORDS, pattern)
    embedded = torch.zeros(1, 10, 48, requires_grad=True)

    def add(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + embedded

    handle = model.model.embed_tokens.register_forward_hook(add)
    logits = label_logits(model, ids_of(1, 10))
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[0, 4].square().sum(), embedded)
    later = gradient[0, 5:].abs().sum(-1)
    assert gradient[0, :5].abs().sum(-1).min() > 0
    assert (later == 0).all() if pattern == "00" else (later > 0).all()


def test_the_pattern_of_zeros_changes_no_bit(tiny_llama: Build) -> None:
    model, ids = tiny_llama().eval(), ids_of(2, 20)
    before = model(ids)
    unmask(model, "11")
    assert not torch.equal(model(ids), before)
    unmask(model, "00")
    assert torch.equal(model(ids), before)


def test_masks_of_layers_in_bfloat16_are_those_in_float32(tiny_llama: Build) -> None:
    """bfloat16 takes another path through attention on a CPU: tiles, with masks of their own."""
    exact = labeller(tiny_llama, WORDS, "10")
    logits = label_logits(exact, ids_of(1, 150))
    both, causal = exact.bfloat16(), labeller(tiny_llama, WORDS, "00")
    near = (label_logits(both, ids_of(1, 150)) - logits).abs().mean()
    assert near < 0.2 * (label_logits(causal, ids_of(1, 150)) - logits).abs().mean()


def test_groups_are_as_even_as_can_be(tiny_llama: Build) -> None:
    assert group_sizes(30, 4) == [8, 8, 7, 7] and group_sizes(32, 4) == [8] * 4
    spec = tiny_llama(num_hidden_layers=5).spec
    assert unmasked(spec, "0110").layers_both_ways == (2, 3)
    assert len(all_patterns(4)) == 16 and all_patterns(2) == ["00", "01", "10", "11"]
    with pytest.raises(PunaError, match="more groups than layers"):
        unmasked(spec, "010101")
    with pytest.raises(ValueError, match="low layers first"):
        unmasked(spec, "02")
    with pytest.raises(PunaError, match="window"):
        unmasked(spec.replace(window=4), "1")


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_opens_a_causal_labeller_of_texts_with_the_same_logits(
    tiny_llama: Build, tmp_path: Path, tied: bool
) -> None:
    import transformers

    model = labeller(tiny_llama, TEXTS, tie_word_embeddings=tied)
    pretrained.save(model, tmp_path / "model")
    assert not (tmp_path / "model" / "puna.json").exists()
    theirs = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert theirs.config.id2label == dict(enumerate(NAMES)) and theirs.config.pad_token_id == 0
    texts = [ids_of(1, length, seed=length)[0] for length in (9, 3, 14)]
    ids, segments = padded(texts)
    real = segments == 0
    with torch.no_grad():
        found = theirs(torch.where(real, ids, 0), attention_mask=real.long()).logits
        ours = label_logits(pretrained.load(tmp_path / "model"), ids, None, segments)
    assert (found - ours).abs().max() < 1e-5
    assert torch.equal(ours, label_logits(model, ids, None, segments))


@pytest.mark.parametrize("bias", [True, False])
def test_transformers_opens_a_causal_labeller_of_words_with_the_same_logits(
    tiny_llama: Build, tmp_path: Path, bias: bool
) -> None:
    """transformers' class has a bias: without it in the file it would draw one."""
    import transformers

    model = labeller(tiny_llama, LabelKind(NAMES, per="word", bias=bias))
    pretrained.save(model, tmp_path / "model")
    theirs = transformers.LlamaForTokenClassification.from_pretrained(tmp_path / "model").eval()
    ids = ids_of(2, 12)
    with torch.no_grad():
        found = theirs(ids).logits
        ours = label_logits(pretrained.load(tmp_path / "model"), ids)
    assert (found - ours).abs().max() < 1e-5 and torch.equal(ours, label_logits(model, ids))


def test_a_checkpoint_that_transformers_wrote_opens(tiny_llama: Build, tmp_path: Path) -> None:
    import transformers

    pretrained.save(labeller(tiny_llama), tmp_path / "ours")
    transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "ours").save_pretrained(
        tmp_path / "theirs"
    )
    found = pretrained.load(tmp_path / "theirs")
    assert found.labels == TEXTS
    ids = ids_of(2, 5)
    assert torch.equal(label_logits(found, ids), label_logits(pretrained.load(tmp_path / "ours"), ids))


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        (LabelKind(NAMES, per="word"), "10"),
        (TEXTS, "11"),
        (LabelKind(NAMES, pooling="mean"), "0"),
        (LabelKind(NAMES, bias=True), "0"),
    ],
    ids=["half-unmasked", "unmasked", "mean", "bias"],
)
def test_what_transformers_would_compute_otherwise_it_refuses(
    tiny_llama: Build, tmp_path: Path, kind: LabelKind, pattern: str
) -> None:
    """A labeller that looks right must not open there as a causal one, or pooled by its last token."""
    import transformers

    model = labeller(tiny_llama, kind, pattern)
    pretrained.save(model, tmp_path / "model")
    assert read_json(tmp_path / "model" / "config.json")["model_type"] == "puna"
    with pytest.raises(ValueError, match="puna"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    again = pretrained.load(tmp_path / "model")
    ids = ids_of(2, 12)
    assert again.spec == model.spec and again.labels is not None
    assert again.labels.pooling == kind.pooling and again.labels.names == kind.names
    assert torch.equal(label_logits(again, ids), label_logits(model, ids))


@pytest.mark.parametrize("kind", [TEXTS, WORDS], ids=["texts", "words"])
def test_peft_opens_the_adapter_with_the_head_among_modules_to_save(
    tiny_llama: Build, tmp_path: Path, kind: LabelKind
) -> None:
    import peft
    import transformers

    base = tiny_llama().eval()
    pretrained.save(base, tmp_path / "base")
    model = pretrained.load(tmp_path / "base")
    add_label_head(model, kind, seed=3)
    add_lora(model, LoraSettings(r=2, target=("q_proj", "v_proj"), full=("score",)), seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name or name.startswith("score"):
                weight.normal_(0, 0.3, generator=torch_generator(0, name))
    pretrained.save(model, tmp_path / "adapter", "adapter")
    stated = read_json(tmp_path / "adapter" / "adapter_config.json")
    assert stated["modules_to_save"] == ["score"]
    assert stated["task_type"] == ("SEQ_CLS" if kind.per == "text" else "TOKEN_CLS")
    auto = peft.AutoPeftModelForSequenceClassification
    if kind.per == "word":
        auto = peft.AutoPeftModelForTokenClassification
    theirs = auto.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    ids = ids_of(1, 11)
    with torch.no_grad():
        ours = label_logits(model.eval(), ids)
        assert (theirs(input_ids=ids).logits - ours).abs().max() < 1e-5
        again = pretrained.load(tmp_path / "adapter")
    assert again.labels == kind and torch.equal(label_logits(again, ids), ours)
    assert isinstance(theirs.base_model.model, transformers.PreTrainedModel)


def test_an_adapter_of_an_unmasked_model_knows_its_masks(tiny_llama: Build, tmp_path: Path) -> None:
    pretrained.save(tiny_llama(), tmp_path / "base")
    model = pretrained.load(tmp_path / "base")
    add_label_head(model, WORDS, seed=3)
    unmask(model, "01")
    add_lora(model, LoraSettings(r=2, full=("score",)), seed=0)
    pretrained.save(model, tmp_path / "adapter", "adapter")
    again = pretrained.load(tmp_path / "adapter")
    assert again.spec.layers_both_ways == (1,)
    assert torch.equal(label_logits(again, ids_of(1, 9)), label_logits(model.eval(), ids_of(1, 9)))


def test_an_unmasked_model_is_not_decoded(tiny_llama: Build, tmp_path: Path) -> None:
    """Neither with a cache nor on either of the kernels, which would put the mask back."""
    model = tiny_llama()
    unmask(model, "01")
    with pytest.raises(PunaError, match="layers 1 are not causal"):
        KeyValueCache(model.spec, 1, 8)
    for kernels in ("auto", "native", "plain"):
        with pytest.raises(PunaError, match=r"decoding needs a causal model[^~]*layers 1 are not"):
            make_stepper(model, cache_tokens=32, kernels=kernels)  # type: ignore[arg-type]
    labelled = labeller(tiny_llama)
    with pytest.raises(PunaError, match="3 labels, without a head for words"):
        make_stepper(labelled, cache_tokens=32)
    with pytest.raises(PunaError, match="a GGUF file needs a language model"):
        pretrained.save(labelled, tmp_path / "model.gguf", "gguf")


def test_bad_labels_are_said() -> None:
    with pytest.raises(PunaError, match="at least two different names"):
        LabelKind(("one", "one"))
    with pytest.raises(PunaError, match=r"pooling 'lst'[^~]*did you mean 'last'"):
        LabelKind(NAMES, pooling="lst")  # type: ignore[arg-type]
    with pytest.raises(PunaError, match="thing to label"):
        LabelKind(NAMES, per="line")  # type: ignore[arg-type]


def test_a_language_model_has_no_labels(tiny_llama: Build) -> None:
    with pytest.raises(PunaError, match="no head for labels"):
        label_logits(tiny_llama(), ids_of(1, 4))
    with pytest.raises(PunaError, match="a head for labels already"):
        add_label_head(labeller(tiny_llama), TEXTS)
