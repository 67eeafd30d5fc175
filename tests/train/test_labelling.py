"""The stage ``label``: what it learns, what it leaves, and that every micro-batch counts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from little_trainings import CHAT, write_model

from puna.core.errors import PunaError
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import Corpus, write_corpus
from puna.data.next_word import NextWordParameters, next_word_rows
from puna.model.labels import LabelKind, label_logits, labels_of, require_words
from puna.model.unmasking import unmask
from puna.text import pretrained
from puna.train.labelling import LabelLoss, kind_of, loop_of, open_labeller, packed_rows
from puna.train.labelling_stages import LabelTraining

ABOUT: dict[str, Any] = {"provenance": [{"source": "test", "licence": "CC0"}], "ledger": {}}
SMALL: dict[str, Any] = {
    "max_steps": 3,
    "batch_tokens": 256,
    "micro_batch_tokens": 128,
    "max_length": 64,
    "learning_rate": 1e-2,
    "dtype": "float32",
}
MOODS = {"good": "the cat sat", "bad": "in the end it went", "so-so": "then again that mat"}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Path]:
    """A model and corpora of labelled texts and words."""
    root = tmp_path_factory.mktemp("labelled")
    write_model(root / "model", tiny_tokenizer, template=CHAT)
    texts = (
        {
            "id": f"{n}",
            "text": f"{text} and {'so ' * (n % 5)}on",
            "label": label,
            "source": "test",
            "language": "en",
        }
        for n in range(30)
        for label, text in [list(MOODS.items())[n % 3]]
    )
    write_corpus(root / "texts", "labelled_texts", texts, **ABOUT)
    drawn = NextWordParameters(
        rows=60, held_out_rows=20, words=("the", "cat", "sat", "mat", "end"), triggers=2
    )
    for side in ("train", "held_out"):
        write_corpus(root / side, "labelled_words", next_word_rows(drawn, side, 0), **ABOUT)
    return {"root": root, **{name: root / name for name in ("model", "texts", "train", "held_out")}}


def run(places: Mapping[str, Path], out: Path, corpus: str, **parameters: Any) -> Outcome:
    stage = get_stage("label")
    inputs: dict[str, Any] = {"model": str(places["model"]), "corpus": places[corpus]}
    if corpus == "train":
        inputs["held_out"] = {"apart": places["held_out"]}
    context = Context("label", out, inputs, seed=0, dtype="float32")
    return stage.function(context, validate(stage.parameters, {**SMALL, **parameters}, where="test"))


def test_texts_are_learnt_and_the_model_opens_in_transformers(
    labelled: dict[str, Path], tmp_path: Path
) -> None:
    import transformers

    outcome = run(labelled, tmp_path, "texts", max_steps=30)
    assert outcome.metrics["accuracy.last"] > 0.9 > outcome.metrics["accuracy.first"]
    model = pretrained.load(outcome.outputs["model"])
    assert labels_of(model) == LabelKind(("bad", "good", "so-so"))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(outcome.outputs["model"]).eval()
    ids = torch.tensor([model.tokenizer.encode("the cat sat and so on")])  # type: ignore[union-attr]
    with torch.no_grad():
        ours = label_logits(model, ids)
        assert (theirs(ids).logits - ours).abs().max() < 1e-5
    assert not (tmp_path / "checkpoints").exists()


def test_with_lora_the_merged_model_and_the_adapter_say_the_same(
    labelled: dict[str, Path], tmp_path: Path
) -> None:
    lora = {"r": 2, "target": ["q_proj", "v_proj"]}
    outcome = run(labelled, tmp_path, "train", lora=lora, unmask="01", max_steps=6, bias=True)
    merged, adapted = (pretrained.load(outcome.outputs[name]) for name in ("model", "adapter"))
    assert merged.spec.layers_both_ways == adapted.spec.layers_both_ways == (1,)
    assert outcome.metrics["layers_both_ways"] == 1
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        assert (label_logits(merged, ids) - label_logits(adapted, ids)).abs().max() < 1e-5
    base = pretrained.load(labelled["model"])
    assert torch.equal(merged.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert outcome.metrics["after.apart.loss"] < outcome.metrics["before.apart.loss"]


def test_a_base_in_nf4_is_what_the_labels_are_learnt_on(labelled: dict[str, Path], tmp_path: Path) -> None:
    outcome = run(labelled, tmp_path, "texts", lora={"r": 2, "base": "nf4"})
    left = pretrained.load(outcome.outputs["model"]).model.layers[0].self_attn.v_proj.weight
    base = pretrained.load(labelled["model"]).model.layers[0].self_attn.v_proj.weight
    assert len(left.unique()) < len(base.unique()) or not torch.equal(left, base)


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
def test_a_step_is_the_same_however_it_is_cut_into_micro_batches(
    labelled: dict[str, Path], tmp_path: Path, pooling: str
) -> None:
    """The published code of S75 loses all micro-batches of a step but the last."""
    corpus = Corpus.open(labelled["texts"])
    found = []
    for micro in (256, 64):
        parameters = LabelTraining(**{**SMALL, "micro_batch_tokens": micro, "pooling": pooling})
        model = open_labeller(
            labelled["model"], kind_of(corpus, parameters), parameters, "01", dtype="float32", seed=0
        )
        packed = packed_rows(model, corpus, 64)
        loop = loop_of(model, packed, parameters, tmp_path / str(micro), seed=0, recipe={})
        step = loop.feed.steps(0)[0]
        assert len(list(loop.feed.micro_batches(step))) > (micro == 64)
        loss, _ = loop._accumulate(step)
        found.append((loss, loop.optimizer.gradient.clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    away = torch.linalg.vector_norm(found[0][1] - found[1][1])
    assert away < 1e-4 * torch.linalg.vector_norm(found[0][1])


def test_a_text_is_learnt_from_its_own_tokens_alone(labelled: dict[str, Path]) -> None:
    """Packed beside others, or padded, its loss is the one it has alone; so it is with every pooling."""
    from puna.text.packing import pack
    from puna.train.distributed import World
    from puna.train.held_out import passes

    corpus = Corpus.open(labelled["texts"])
    for pooling in ("last", "mean", "max"):
        parameters = LabelTraining(**{**SMALL, "pooling": pooling})
        kind = kind_of(corpus, parameters)
        model = (
            open_labeller(labelled["model"], kind, parameters, "1", dtype="float32", seed=0).double().eval()
        )
        together = packed_rows(model, corpus, 64)
        documents = [piece.document for row in together for piece in row.slices]
        apart = pack(documents, 64, mode="off")
        sums = []
        for rows in (together, apart):
            losses = [LabelLoss()(model, micro) for micro in passes(rows, 256, World())]
            assert sum(loss.targets for loss in losses) == 30
            sums.append(sum(float(loss.total.detach()) for loss in losses))
        assert sums[0] == pytest.approx(sums[1], rel=1e-6)


def test_what_the_next_word_decides_is_learnt_only_without_the_mask(
    labelled: dict[str, Path], tmp_path: Path
) -> None:
    common = {"max_steps": 60, "micro_batch_tokens": 256, "learning_rate": 2e-2, "warmup_ratio": 0.1}
    causal = run(labelled, tmp_path / "0", "train", unmask="00", **common).metrics
    ahead = run(labelled, tmp_path / "1", "train", unmask="10", **common).metrics
    assert causal["after.apart.accuracy"] < 0.75 < 0.9 < ahead["after.apart.accuracy"]


def test_dropout_before_the_head_is_off_outside_of_training(
    labelled: dict[str, Path], tmp_path: Path
) -> None:
    corpus = Corpus.open(labelled["texts"])
    parameters = LabelTraining(**SMALL)
    kind = kind_of(corpus, parameters)
    model = open_labeller(labelled["model"], kind, parameters, "0", dtype="float32", seed=0)
    loop = loop_of(model, packed_rows(model, corpus, 64), parameters, tmp_path, seed=0, recipe={})
    (micro, *_) = loop.feed.micro_batches(loop.feed.steps(0)[0])
    found = []
    for training in (False, True):
        model.train(training)
        found.append([LabelLoss(share)(model, micro).total.detach() for share in (0.0, 0.5)])
    assert torch.equal(*found[0]) and not torch.equal(*found[1])


def test_the_same_seed_gives_the_same_weights(labelled: dict[str, Path], tmp_path: Path) -> None:
    one, two = (run(labelled, tmp_path / name, "texts") for name in "ab")
    other = run(labelled, tmp_path / "c", "texts", seed=5)
    first, second, third = (pretrained.load(each.outputs["model"]).state_dict() for each in (one, two, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["score.weight"], third["score.weight"])


def test_text_is_not_trained_on_with_layers_that_see_what_is_to_be_predicted(
    labelled: dict[str, Path], tmp_path: Path
) -> None:
    """S75's code adapts unmasked models by next-token loss, which leaks the targets."""
    stage = get_stage("train")
    model = pretrained.load(labelled["model"])
    unmask(model, "01")
    with pytest.raises(PunaError, match=r"a causal model[^~]*layers 1 are not causal"):
        require_words(model, "training on text")
    pretrained.save(model, tmp_path / "unmasked")
    talk = {"id": "1", "text": "the cat", "source": "test", "language": "en"}
    corpus = write_corpus(tmp_path / "texts", "documents", [talk], **ABOUT)
    inputs = {"model": str(tmp_path / "unmasked"), "corpus": {"main": corpus.path}}
    context = Context("train", tmp_path / "out", inputs)
    with pytest.raises(PunaError, match="training on text needs a causal model"):
        stage.function(context, stage.parameters(max_steps=1, max_length=16))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"unmask": "012"}, "low layers first"),
        ({"unmask": "0101"}, "more groups than layers"),
        ({"epochs": 1}, "a run has one limit"),
        ({"batch_tokens": 32}, "no room for a row"),
        ({"betas": [0.9, 1.0]}, "betas must be"),
        ({"pooling": "mean"}, "words are not pooled"),
    ],
)
def test_wrong_settings_are_said(
    labelled: dict[str, Path], tmp_path: Path, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(PunaError, match=message):
        run(labelled, tmp_path, "train", **parameters)


def test_a_corpus_without_labels_is_refused(labelled: dict[str, Path], tmp_path: Path) -> None:
    talk = {"id": "1", "text": "the cat", "source": "test", "language": "en"}
    corpus = write_corpus(tmp_path / "plain", "documents", [talk], **ABOUT)
    with pytest.raises(PunaError, match="have no labels"):
        run({**labelled, "plain": corpus.path}, tmp_path / "out", "plain")
