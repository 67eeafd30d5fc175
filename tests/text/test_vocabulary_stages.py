import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vocabulary_samples import new_tokenizer, noisy_pairs, old_tokenizer

from puna.core.errors import PunaError
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import write_corpus
from puna.text import pretrained
from puna.text.template import find_template
from puna.text.tokenizer import Tokenizer
from puna.text.vocabulary import job
from puna.text.vocabulary.apply import apply_map
from puna.text.vocabulary.operator import VocabularyMap

Run = Callable[..., Outcome]
PAIRS = noisy_pairs()
OLD_SIZE = 330  # small, so that words have several tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with the old tokenizer, a new tokenizer, pairs, documents and messages."""
    from puna.model.llama import Llama
    from puna.model.spec import BlockSpec, LlamaSpec, RopeRule

    root = tmp_path_factory.mktemp("inputs")
    old = old_tokenizer(OLD_SIZE)
    block = BlockSpec(heads=2, kv_heads=1, head_dim=8, rope=RopeRule(kind="default", theta=1e4), width=32)
    model = Llama(LlamaSpec(vocab_size=old.vocab_size, hidden_size=16, blocks=(block,), tied=True))
    model.tokenizer, model.template = old, find_template(old)
    pretrained.save(model, root / "model")
    new_tokenizer(old, size=290).save(root / "tokenizer")
    about: dict[str, Any] = {"provenance": [{"source": "made", "licence": "CC0"}], "ledger": {}}
    languages = {"source": "made", "source_language": "en", "target_language": "nl"}
    rows = [{"id": str(n), "source_text": a, "target_text": b, **languages} for n, (a, b) in enumerate(PAIRS)]
    write_corpus(root / "pairs", "sentence_pairs", rows, **about)
    rows = [{"id": str(n), "text": b, "source": "made", "language": "nl"} for n, (_, b) in enumerate(PAIRS)]
    write_corpus(root / "documents", "documents", rows, **about)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_corpus(
        root / "messages",
        "messages",
        [{"id": "0", "messages": turns, "source": "made", "language": "nl"}],
        **about,
    )
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """``run(stage, inputs, **parameters)`` runs a stage and keeps its report in ``run.report``."""

    def call(name: str, inputs: dict[str, Any], **parameters: Any) -> Outcome:
        found = get_stage(name)
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        context = Context(name, out, inputs, seed=parameters.pop("run_seed", 0), dtype="float32")
        outcome = found.function(context, validate(found.parameters, parameters, where=name))
        call.report = context.report  # type: ignore[attr-defined]
        return outcome

    return call


def _corpora(folders: dict[str, Path], *names: str) -> dict[str, Path]:
    return {name: folders[name] for name in names}


@pytest.mark.parametrize("corpus", ["documents", "pairs"])
def test_a_tokenizer_is_trained_and_compared_with_the_models_own(
    folders: dict[str, Path], run: Run, corpus: str
) -> None:
    inputs = {
        "model": folders["model"],
        "corpus": _corpora(folders, corpus),
        "held_out": _corpora(folders, "documents"),
    }
    outcome = run("tokenizer", inputs, vocab_size=360)
    made = Tokenizer.from_folder(outcome.outputs["tokenizer"])
    old = old_tokenizer(OLD_SIZE)
    texts = [target for _, target in PAIRS]
    size = sum(len(text.encode()) for text in texts)
    for name in ("corpus", "held_out.documents"):
        new_rate = outcome.metrics[f"tokens_per_byte.{name}.new"]
        old_rate = outcome.metrics[f"tokens_per_byte.{name}.base"]
        assert new_rate == pytest.approx(sum(map(len, made.encode_batch(texts))) / size)
        assert old_rate == pytest.approx(sum(map(len, old.encode_batch(texts))) / size)
        assert outcome.metrics[f"fewer_tokens.{name}"] == pytest.approx(1 - new_rate / old_rate)
        assert outcome.metrics[f"not_restored.{name}"] == 0
    assert outcome.metrics["vocab_size"] == made.vocab_size <= 360
    assert made.special_tokens == old.special_tokens
    specials = run.report["tables"][1]["rows"]  # type: ignore[attr-defined]
    assert specials == [[t, str(old.id_of(t)), str(made.id_of(t))] for t in old.special_tokens]


def test_a_tokenizer_can_be_trained_without_a_model(folders: dict[str, Path], run: Run) -> None:
    outcome = run("tokenizer", {"corpus": _corpora(folders, "documents")}, vocab_size=300)
    assert "tokens_per_byte.corpus.base" not in outcome.metrics
    assert Tokenizer.from_folder(outcome.outputs["tokenizer"]).special_tokens == ["<|endoftext|>"]


def test_a_tokenizer_can_be_extended(folders: dict[str, Path], run: Run) -> None:
    inputs = {"model": folders["model"], "corpus": _corpora(folders, "documents")}
    outcome = run("tokenizer", inputs, method="extend", new_tokens=12)
    made = Tokenizer.from_folder(outcome.outputs["tokenizer"])
    assert made.vocab_size == old_tokenizer(OLD_SIZE).vocab_size + 12
    with pytest.raises(PunaError, match="takes the model it belongs to"):
        run("tokenizer", {"corpus": _corpora(folders, "documents")}, method="extend")


@pytest.mark.parametrize(
    "changed",
    [
        {"kind": "unigram"},
        {"vocab_size": 300},
        {"min_frequency": 300},
        {"method": "extend"},
        {"single_digits": True},
    ],
)
def test_every_setting_of_the_tokenizer_stage_changes_what_it_makes(
    folders: dict[str, Path], run: Run, changed: dict[str, Any]
) -> None:
    inputs = {"model": folders["model"], "corpus": _corpora(folders, "documents")}
    usual = {"vocab_size": 340} if changed.get("method") is None else {}
    # The old tokenizer splits digits, so that to split them is a change only against not to do so.
    first = run(
        "tokenizer", inputs, **usual, **({"single_digits": False} if "single_digits" in changed else {})
    )
    second = run("tokenizer", inputs, **{**usual, **changed})
    made = [Tokenizer.from_folder(outcome.outputs["tokenizer"]).fingerprint for outcome in (first, second)]
    assert made[0] != made[1]


def test_a_corpus_of_conversations_is_refused(folders: dict[str, Path], run: Run) -> None:
    with pytest.raises(PunaError, match="not trained on such a corpus") as error:
        run("tokenizer", {"corpus": _corpora(folders, "messages")}, vocab_size=300)
    assert error.value.found == "messages"
    with pytest.raises(PunaError, match="words are aligned in sentence pairs"):
        run("vocabulary", _inputs(folders, pairs="documents"))


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("tokenizer", {"new_tokens": 5}, "new_tokens means nothing with method 'train'"),
        ("tokenizer", {"method": "extend", "vocab_size": 999}, "vocab_size means nothing"),
        ("tokenizer", {"kind": "unigram", "min_frequency": 3}, "min_frequency means nothing"),
        ("vocabulary", {"builder": "random", "floor": 0.3}, "floor means nothing with builder 'random'"),
        ("vocabulary", {"copy_shared": True}, "copy_shared means nothing with builder 'alignment'"),
        ("vocabulary", {"builder": "global_mean", "seed": 3}, "seed means nothing"),
        ("vocabulary", {"fallback": "unk"}, "set evidence to 0"),
    ],
)
def test_a_setting_that_would_not_be_read_is_refused(
    name: str, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(PunaError, match=message):
        validate(get_stage(name).parameters, parameters, where=name)


def _inputs(folders: dict[str, Path], pairs: str | None = "pairs", tokenizer: bool = True) -> dict[str, Any]:
    inputs: dict[str, Any] = {"model": folders["model"]}
    if tokenizer:
        inputs["tokenizer"] = folders["tokenizer"]
    if pairs is not None:
        inputs["pairs"] = _corpora(folders, pairs)
    return inputs


def test_alignment_writes_model_map_and_counts(folders: dict[str, Path], run: Run) -> None:
    outcome = run("vocabulary", _inputs(folders), pad_to_multiple=64)
    model = pretrained.load(outcome.outputs["model"])
    mapping = VocabularyMap.load(outcome.outputs["mapping"])
    new = Tokenizer.from_folder(folders["tokenizer"])
    assert model.tokenizer is not None and model.tokenizer.vocabulary() == new.vocabulary()
    assert model.spec.vocab_size % 64 == 0
    assert outcome.metrics["vocab_size"] == model.spec.vocab_size
    assert mapping.new_size == new.vocab_size
    counted = sum(value for name, value in outcome.metrics.items() if name.startswith("rows."))
    assert counted == model.spec.vocab_size
    assert outcome.metrics["rows.aligned"] > 5
    assert outcome.metrics["row_sum_error"] <= 1e-6
    assert outcome.metrics["identity_difference"] == 0.0
    assert mapping.about["builder"] == "alignment"
    titles = [table["title"] for table in run.report["tables"]]  # type: ignore[attr-defined]
    assert titles == ["Rows of the new vocabulary", "Special tokens", "Some aligned tokens"]


def test_two_models_are_held_at_most(
    folders: dict[str, Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []

    def noted(*arguments: Any, **settings: Any) -> Any:
        gc.collect()
        assert not any(earlier() for earlier in made)
        mapped = apply_map(*arguments, **settings)
        made.append(weakref.ref(mapped))
        return mapped

    monkeypatch.setattr(job, "apply_map", noted)
    run("vocabulary", _inputs(folders, pairs=None), builder="mean_of_pieces")
    assert len(made) == 2


@pytest.mark.parametrize("builder", ["mean_of_pieces", "weighted_pieces", "random", "global_mean"])
def test_builders_without_pairs_fill_every_row(folders: dict[str, Path], run: Run, builder: str) -> None:
    outcome = run("vocabulary", _inputs(folders, pairs=None), builder=builder)
    model = pretrained.load(outcome.outputs["model"])
    assert model.spec.vocab_size == Tokenizer.from_folder(folders["tokenizer"]).vocab_size
    assert torch.isfinite(model.head_weight).all()


def test_identity_needs_no_tokenizer_and_writes_the_same_weights(folders: dict[str, Path], run: Run) -> None:
    outcome = run("vocabulary", _inputs(folders, pairs=None, tokenizer=False), builder="identity")
    before, after = pretrained.load(folders["model"]), pretrained.load(outcome.outputs["model"])
    assert before.spec == after.spec
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name])


def test_inputs_that_a_builder_lacks_or_would_not_read_are_refused(
    folders: dict[str, Path], run: Run
) -> None:
    for inputs, builder, message in (
        (_inputs(folders, pairs=None), "alignment", "'alignment' takes pairs"),
        (_inputs(folders), "mean_of_pieces", "'mean_of_pieces' takes no pairs"),
        (_inputs(folders, pairs=None, tokenizer=False), "weighted_pieces", "needs a tokenizer"),
        (_inputs(folders, pairs=None), "identity", "identity keeps the vocabulary"),
    ):
        with pytest.raises(PunaError, match=message):
            run("vocabulary", inputs, builder=builder)


@pytest.mark.parametrize(
    "changed",
    [
        {"fallback": "mean_of_pieces"},
        {"evidence": 30.0},
        {"floor": 0.9},
        {"position": 0.0},
        {"symmetrisation": "union"},
        {"iterations": 1},
        {"pad_to_multiple": 77},
        {"builder": "random", "copy_shared": True},
        {"builder": "random", "distribution": "matched"},
        {"builder": "random", "seed": 5},
        {"builder": "random", "run_seed": 5},
        {"dtype": "bfloat16"},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_every_setting_of_the_vocabulary_stage_changes_the_model(
    folders: dict[str, Path], run: Run, changed: dict[str, Any]
) -> None:
    random = changed.get("builder") == "random"
    inputs = _inputs(folders, pairs=None if random else "pairs")
    # Noisy settings, so that there is something to drop, to place and to join.
    usual = (
        {"builder": "random"}
        if random
        else {"floor": 0.0, "iterations": 2, "symmetrisation": "grow-diag-final-and"}
    )
    first = run("vocabulary", inputs, **usual)
    second = run("vocabulary", inputs, **{**usual, **changed})
    weights = [pretrained.load(outcome.outputs["model"]).head_weight for outcome in (first, second)]
    assert weights[0].shape != weights[1].shape or not torch.equal(*weights)


def test_plans_tell_the_new_number_of_rows(folders: dict[str, Path]) -> None:
    from types import SimpleNamespace

    spec = pretrained.load(folders["model"]).spec
    device = SimpleNamespace(read_seconds=lambda size: size / 1e9)
    shapes = SimpleNamespace(spec=spec, models={"model": spec}, tokens=2e5, device=device, dtype="float32")
    trained, extend = (
        get_stage("tokenizer").plan(validate(get_stage("tokenizer").parameters, values, where="x"), shapes)  # type: ignore[misc]
        for values in ({"vocab_size": 500}, {"method": "extend", "new_tokens": 8})
    )
    assert (trained.spec.vocab_size, extend.spec.vocab_size) == (500, spec.vocab_size + 8)
    assert trained.tokens == 2e5
    shapes.models["tokenizer"] = trained.spec
    parameters = validate(get_stage("vocabulary").parameters, {"pad_to_multiple": 64}, where="x")
    cost = get_stage("vocabulary").plan(parameters, shapes)  # type: ignore[misc]
    assert cost.spec.vocab_size == 512
    assert cost.memory == 4 * (spec.parameter_count() + cost.spec.parameter_count())
    few = validate(get_stage("tokenizer").parameters, {"vocab_size": 260}, where="x")
    shapes.models["tokenizer"] = get_stage("tokenizer").plan(few, shapes).spec  # type: ignore[misc]
    cost = get_stage("vocabulary").plan(validate(get_stage("vocabulary").parameters, {}, where="x"), shapes)  # type: ignore[misc]
    assert cost.memory == 4 * 2 * spec.parameter_count()  # the model under the identity map is larger
