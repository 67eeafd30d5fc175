"""What heads learn from: chances of acceptance, mistakes in text; and the stages that train them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import write_corpus
from puna.decode import acceptance
from puna.decode.acceptance import Places, batches, collect, split
from puna.decode.compare import between, largest_deviation
from puna.decode.heads import load_head
from puna.decode.judge import collect as collect_judged
from puna.decode.mistakes import Passage, spoil
from puna.decode.sampling import Sampling, make_law
from puna.edit.shorten import shorten
from puna.text import pretrained
from puna.text.encode import Encoded
from puna.text.template import Template

CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
WORDS = ["the", "cat", "sat", "that", "mat", "went", "again", "other", "then", "end"]


@pytest.fixture(scope="module")
def target(tiny_tokenizer: Any) -> Any:
    from puna.core.seeds import torch_generator
    from puna.model.llama import Llama
    from puna.model.spec import BlockSpec, LlamaSpec

    block = BlockSpec(heads=4, kv_heads=2, head_dim=12, width=96)
    spec = LlamaSpec(320, 48, (block,) * 3, tied=True, max_positions=128)
    model = Llama(spec, generator=torch_generator(0, "tiny")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5.0)
    model.tokenizer, model.template = tiny_tokenizer, Template(CHAT, tiny_tokenizer.template_strings)
    return model


@pytest.fixture(scope="module")
def draft(target: Any) -> Any:
    return shorten(target, (0, 2))


@pytest.fixture(scope="module")
def texts() -> list[Encoded]:
    generator = numpy_generator(0, "texts")
    found = []
    for number, length in enumerate((12, 9, 20, 15, 12, 11)):
        ids = generator.integers(4, 320, length).tolist()
        found.append(Encoded(ids, [place >= 4 for place in range(length)], f"text{number}"))
    return found


def test_labels_are_the_chances_of_acceptance_and_states_those_of_what_was_drawn(
    target: Any, draft: Any, texts: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed: list[list[list[int]]] = []
    read = acceptance.read_together

    def watched(model: Any, rows: Any) -> Any:
        mixed.append([list(row) for row in rows])
        return read(model, rows)

    monkeypatch.setattr(acceptance, "read_together", watched)
    sampling = Sampling(temperature=0.7)
    found = collect(target, draft, texts, sampling, mix=0.3, batch_tokens=40, seed=1)
    order = [number for batch in batches(texts, 40) for number in batch]
    drawn = dict(zip(order, [row for rows in mixed[2::3] for row in rows], strict=True))
    kept = [0, 0]
    place = 0
    for number in order:
        ids = torch.tensor(texts[number].ids)
        with torch.inference_mode():
            wanted, given = target(ids[None])[0], draft(ids[None])[0]
            states = draft.hidden(torch.tensor([drawn[number]]))[0]
        assert drawn[number][:4] == texts[number].ids[:4]
        for position in range(4, len(ids)):
            token = drawn[number][position]
            laws = (make_law(row[position - 1], sampling) for row in (wanted, given))
            p, q = (float(law.probabilities[token]) for law in laws)
            here = place < len(found.labels) and torch.allclose(
                found.features[place], states[position], atol=1e-5
            )
            kept[int(here)] += 1
            if not here:  # the target's own token: nothing is learnt there
                assert token == texts[number].ids[position]
                continue
            assert found.labels[place] == pytest.approx(min(1.0, p / q), abs=1e-4)
            assert found.texts[place] == number
            place += 1
    assert place == len(found.labels) and kept[0] > 5 and kept[1] > 30


def test_a_draft_that_is_the_target_is_always_accepted(target: Any, texts: list[Encoded]) -> None:
    found = collect(target, target, texts, Sampling(temperature=1.0), mix=0.0)
    assert found.labels.min() > 0.999
    assert len(found.labels) == sum(sum(text.trained) for text in texts)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 3}])
def test_other_samplings_have_their_own_chances(
    target: Any, draft: Any, texts: list[Encoded], settings: dict[str, Any]
) -> None:
    found = collect(target, draft, texts, Sampling(**settings), mix=0.0)
    certain = (found.labels == 0) | (found.labels == 1)
    assert bool(certain.all()) == (settings["temperature"] == 0)


def test_held_out_places_are_of_other_texts() -> None:
    places = Places(torch.zeros(40, 2), torch.zeros(40), torch.arange(40) // 4)
    learnt, held = split(places, 0.3, seed=0)
    assert len(learnt.labels) == 28 and len(held.labels) == 12
    assert not set(learnt.texts.tolist()) & set(held.texts.tolist())
    with pytest.raises(PunaError, match="too few texts"):
        split(places, 0.01, seed=0)


def test_a_mistake_is_one_word_or_number_of_its_kind(tiny_tokenizer: Any) -> None:
    passages = [
        Passage(
            [1, 70 + n], f"The cat number {10 + n} went in again. Then the OTHER mat, ANOTHER, sat on that."
        )
        for n in range(40)
    ]
    found = spoil(passages, tiny_tokenizer, tokens=200, seed=0)
    assert len(found) == 40
    for pair, passage in zip(found, passages, strict=True):
        text, changed = passage.text.split(), tiny_tokenizer.decode(pair.wrong[pair.start :]).split()
        different = [(a.strip(".,"), b.strip(".,")) for a, b in zip(text, changed, strict=True) if a != b]
        ((before, after),) = different
        assert before.isdigit() == after.isdigit() == pair.number
        assert (before.istitle(), before.isupper()) == (after.istitle(), after.isupper())
        assert len(before) == len(after) if pair.number else abs(len(before) - len(after)) <= 2
        first, last = pair.mistaken
        assert pair.right[:first] == pair.wrong[:first] and pair.right[first] != pair.wrong[first]
        assert pair.right[: pair.start] == passage.before
        put_in = tiny_tokenizer.decode(pair.wrong[first:last])
        assert after.endswith(put_in.strip()) and put_in.strip()
        rest = tiny_tokenizer.decode(pair.wrong[last:])
        assert passage.text.endswith(rest)
    assert {pair.number for pair in found} == {True, False}
    assert [pair.wrong for pair in spoil(passages, tiny_tokenizer, tokens=200, seed=0)] == [
        pair.wrong for pair in found
    ]


def test_texts_without_a_spot_are_left_out_and_long_ones_are_cut(tiny_tokenizer: Any) -> None:
    passages = [Passage([1], "cat"), Passage([1], "a b c"), Passage([1], "the cat sat " * 30)]
    found = spoil(passages, tiny_tokenizer, tokens=20, seed=0)
    assert len(found) == 1 and len(found[0].right) <= 21 and len(found[0].wrong) <= 21


def test_right_tokens_are_learnt_in_the_right_text_and_mistakes_in_the_wrong_one(
    target: Any, tiny_tokenizer: Any
) -> None:
    passages = [Passage([1], f"the cat sat on that mat and then the {word}") for word in WORDS]
    spoilt = spoil(passages, tiny_tokenizer, tokens=60, seed=0)
    found = collect_judged(target, spoilt, batch_tokens=64)
    for number, pair in enumerate(spoilt):
        mine = found.texts == number
        right, wrong = mine & (found.labels == 1), mine & (found.labels == 0)
        first, last = pair.mistaken
        assert int(right.sum()) == len(pair.right) - pair.start and int(wrong.sum()) == last - first
        assert int((right & found.spot).sum()) == int((wrong & found.spot).sum()) == 1
        with torch.inference_mode():
            states = target.hidden(torch.tensor([pair.wrong]))[0]
        torch.testing.assert_close(found.at[wrong], states[first:last], atol=1e-5, rtol=0)
        torch.testing.assert_close(found.before[wrong], states[first - 1 : last - 1], atol=1e-5, rtol=0)
        # One token before the mistake the two versions are the same.
        at_spot = found.before[mine & found.spot]
        torch.testing.assert_close(at_spot[0], at_spot[1], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, target: Any, draft: Any) -> dict[str, Path]:
    """The two models, conversations and documents."""
    root = tmp_path_factory.mktemp("head-stages")
    pretrained.save(target, root / "target")
    pretrained.save(draft, root / "draft")
    generator = numpy_generator(0, "places")
    about: dict[str, Any] = {"provenance": [{"source": "test", "licence": "CC0"}], "ledger": {}}

    def sentence(words: int) -> str:
        return " ".join(generator.choice(WORDS, words))

    talks = (
        {
            "id": f"talk{n}",
            "messages": [
                {"role": "user", "content": sentence(2)},
                {"role": "assistant", "content": f"{sentence(3)} {10 + n}"},
            ],
            "source": "test",
            "language": "en",
        }
        for n in range(12)
    )
    documents = ({"id": f"d{n}", "text": sentence(8), "source": "test", "language": "en"} for n in range(16))
    write_corpus(root / "talks", "messages", talks, **about)
    write_corpus(root / "documents", "documents", documents, **about)
    return {name: root / name for name in ("target", "draft", "talks", "documents")}


def run(verb: str, out: Path, inputs: dict[str, Any], **parameters: Any) -> tuple[Outcome, Context]:
    stage = get_stage(verb)
    context = Context(verb, out, inputs, dtype="float32")
    return stage.function(context, validate(stage.parameters, parameters, where="test")), context


def test_the_acceptance_stage_leaves_a_head_that_strategies_take(
    places: dict[str, Path], tmp_path: Path
) -> None:
    inputs = {"target": places["target"], "draft": places["draft"], "corpus": {"talks": places["talks"]}}
    settings = {"epochs": 2, "batch_texts": 4, "held_out_share": 0.25}
    outcome, context = run("acceptance_head", tmp_path / "one", inputs, **settings)
    head = load_head(outcome.outputs["head"], kind="acceptance")
    assert (head.spec.blocks, head.spec.shared, head.spec.ways) == (3, False, 2)
    metrics = outcome.metrics
    assert metrics["texts"] == 12 and 0 < metrics["acceptance"] < 1 and metrics["parameters"] > 3 * 48 * 48
    assert metrics["kl"] >= 0 and metrics["kl.constant"] >= 0
    assert len(context.report["curves"][0]["series"][0]["y"]) == 2 * 3
    again, _ = run("acceptance_head", tmp_path / "two", inputs, **settings)
    assert again.metrics == metrics
    for changed in (
        {"shared": True},
        {"mix": 0.9},
        {"rejection_weight": 1.0},
        {"temperature": 0.5},
        {"draft_vocabulary": 99},
    ):
        other, _ = run("acceptance_head", tmp_path / "other", inputs, **{**settings, **changed})
        assert other.metrics != metrics, changed


def test_the_judge_stage_leaves_a_judge(places: dict[str, Path], tmp_path: Path) -> None:
    inputs = {"model": places["target"], "corpus": {"a": places["documents"], "b": places["talks"]}}
    outcome, _ = run("judge_head", tmp_path / "one", inputs, epochs=2, texts=12)
    head = load_head(outcome.outputs["head"], kind="judge")
    assert (head.spec.blocks, head.spec.ways) == (0, 1)
    metrics = outcome.metrics
    assert metrics["texts"] + metrics["without_a_spot"] == 24
    assert all(0 <= metrics[name] <= 1 for name in ("auc", "auc.before", "auc.matched", "kept.right"))
    assert all(0 <= metrics[f"auc{part}.in.{name}"] <= 1 for part in ("", ".before") for name in "ab")
    for changed in ({"balance": False}, {"tokens": 8}, {"learning_rate": 0.1}):
        other, _ = run("judge_head", tmp_path / "other", inputs, **{"epochs": 2, "texts": 12, **changed})
        assert other.metrics != metrics, changed


def test_a_model_answers_conversations_anew(places: dict[str, Path], tmp_path: Path) -> None:
    from puna.data.corpus import Corpus

    inputs = {"model": places["target"], "corpus": places["talks"]}
    outcome, context = run("respond", tmp_path / "one", inputs, max_tokens=6, rows=5)
    asked = list(Corpus.open(places["talks"]).rows())
    rows = list(Corpus.open(outcome.outputs["corpus"]).rows())
    assert outcome.metrics["rows"] + outcome.metrics["dropped"] == 5
    assert [row["id"] for row in rows] != [f"talk{n}" for n in range(len(rows))]  # drawn, not the first
    for row in rows:
        original = next(other for other in asked if other["id"] == row["id"])
        assert row["messages"][:-1] == original["messages"][:-1]
        assert row["messages"][-1]["role"] == "assistant"
        assert row["messages"][-1] != original["messages"][-1]
    assert context.report["samples"]
    other, _ = run("respond", tmp_path / "other", inputs, max_tokens=6, skip=5, rows=4)
    more = list(Corpus.open(other.outputs["corpus"]).rows())
    assert more and not {row["id"] for row in rows} & {row["id"] for row in more}
    with pytest.raises(PunaError, match="no question is left"):
        run("respond", tmp_path / "none", inputs, skip=12)
    strung, _ = run("respond", tmp_path / "strung", inputs, max_tokens=6, rows=5, answers_per_document=3)
    texts = [row["text"] for row in Corpus.open(strung.outputs["corpus"]).rows()]
    said = [row["messages"][-1]["content"] for row in rows]
    assert texts == [" ".join(said[:3]), *([" ".join(said[3:])] if said[3:] else [])]
    assert strung.metrics["dropped"] == outcome.metrics["dropped"]
    with pytest.raises(PunaError, match="corpus of messages"):
        run("respond", tmp_path / "two", {**inputs, "corpus": places["documents"]})


def test_a_question_is_asked_once(tmp_path: Path) -> None:
    from puna.data.corpus import Corpus
    from puna.decode.respond import questions

    rows = (
        {
            "id": f"t{n}",
            "messages": [
                {
                    "role": "user",
                    "content": f"Who  is number {n // 2}?" if n % 2 else f"who is number {n // 2}?",
                },
                {"role": "assistant", "content": f"answer {n}"},
            ],
            "source": "test",
            "language": "en",
        }
        for n in range(20)
    )
    about: dict[str, Any] = {"provenance": [{"source": "test", "licence": "CC0"}], "ledger": {}}
    corpus = Corpus.open(write_corpus(tmp_path / "twice", "messages", rows, **about).path)
    parts = [questions(corpus, skip=skip, rows=4, seed=3) for skip in (0, 4, 8)]
    numbers = [int(row["id"][1:]) // 2 for part in parts for row in part]
    assert sorted(numbers) == list(range(10)) != numbers


def test_strategies_are_counted_on_the_same_prompts(places: dict[str, Path], tmp_path: Path) -> None:
    head, _ = run(
        "acceptance_head",
        tmp_path / "head",
        {"target": places["target"], "draft": places["draft"], "corpus": {"talks": places["talks"]}},
    )
    inputs = {
        "target": places["target"],
        "models": {"draft": places["draft"]},
        "heads": {"acceptance": head.outputs["head"]},
        "corpus": places["talks"],
    }
    compared = {
        "plain": {"name": "plain"},
        "alone": {"name": "plain", "model": "draft"},
        "self": {"name": "speculative", "draft": "target", "draft_tokens": 3},
        "k2": {"name": "speculative", "draft_tokens": 2},
        "head": {"name": "specdec-pp", "head": "acceptance", "draft_tokens": 5},
    }
    outcome, context = run(
        "strategies",
        tmp_path / "one",
        inputs,
        strategies=compared,
        baseline="plain",
        rows=6,
        max_tokens=8,
        temperature=0.0,
        ignore_eos=True,
        answers=r"\d+",
    )
    metrics = outcome.metrics
    assert [label for label in compared if metrics[f"same.{label}"] < 1] == ["alone"]
    assert 0 < metrics["cost.alone"] < 1 and metrics["lossless.alone"] == 0 < metrics["lossless.head"]
    assert metrics["tokens.plain"] == metrics["target_passes.plain"] == 48 and metrics["cost.plain"] == 1.0
    # Drafting for itself, the target reads once for every four tokens, and drafts the other three.
    assert metrics["target_passes.self"] == 12 and metrics["draft_passes.self"] == 36
    assert metrics["cost.self"] == 1.0 and metrics["accepted_length.self"] == 3.0
    share = metrics["draft_passes.k2"] * 0.01
    assert metrics["cost.k2"] > (metrics["target_passes.k2"] + share) / 48
    assert metrics["cost.head"] > metrics["target_passes.head"] / 48
    assert 0 <= metrics["correct.plain"] <= 1
    assert [row[0] for row in context.report["tables"][0]["rows"]] == list(compared)
    settings = {"rows": 2, "max_tokens": 4, "strategies": compared, "answers": r"\d+"}
    outcome, _ = run("strategies", tmp_path / "two", inputs, rivals={"head": ["self", "k2"]}, **settings)
    assert 0 <= outcome.metrics["rivals_correct.head"] <= 1
    with pytest.raises(PunaError, match="by right answers"):
        run("strategies", tmp_path / "two", inputs, rivals={"head": ["k2"]}, strategies=compared)
    with pytest.raises(PunaError, match="not among the inputs"):
        run("strategies", tmp_path / "two", {**inputs, "heads": {}}, strategies=compared, rows=1)
    with pytest.raises(PunaError, match="'x' is none of"):
        run("strategies", tmp_path / "two", inputs, strategies=compared, baseline="x")
    with pytest.raises(PunaError, match="no answer to check by"):
        run("strategies", tmp_path / "two", inputs, strategies=compared, answers="zebra")


def test_a_line_is_read_off_between_its_points() -> None:
    points = [(4.0, 0.2), (1.0, 0.8), (2.0, 0.6)]
    assert [between(place, points) for place in (1.0, 1.5, 3.0, 4.0)] == pytest.approx([0.8, 0.7, 0.4, 0.2])
    assert between(0.5, points) == 0.8 and between(9.0, points) == 0.2


def test_a_strategys_law_is_tested_and_a_lossy_one_is_found_out(
    places: dict[str, Path], tmp_path: Path
) -> None:
    head, _ = run(
        "judge_head",
        tmp_path / "head",
        {"model": places["target"], "corpus": {"a": places["documents"]}},
        epochs=1,
    )
    outcome, _ = run(
        "sampled_law",
        tmp_path / "law",
        {
            "target": places["target"],
            "models": {"draft": places["draft"]},
            "heads": {"judge": head.outputs["head"]},
        },
        strategies={
            "exact": {"name": "speculative"},
            "lossy": {"name": "judge-decoding", "head": "judge", "threshold": 0.0},
        },
        draws=600,
        prompt="the cat",
        top_k=3,
    )
    assert outcome.metrics["cells"] == 9
    assert outcome.metrics["p_value.exact"] > 1e-3 > outcome.metrics["p_value.lossy"]
    assert outcome.metrics["deviation.exact"] < 4 < outcome.metrics["deviation.lossy"]


def test_the_largest_deviation_is_of_first_tokens_in_standard_deviations() -> None:
    law = {(0, 0): 0.25, (0, 1): 0.25, (1, 0): 0.5}
    assert largest_deviation([30.0, 30.0, 40.0, 0.0], law) == pytest.approx(2.0)  # 60 for 50 +- 5
    assert largest_deviation([0.0, 50.0, 50.0, 0.0], law) == 0.0
