"""The stage ``task_mixture``: exact numbers by source, every task, nothing cut, mistakes told."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from puna.core.errors import PunaError
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import Corpus, write_corpus

ABOUT = [{"source": "made", "licence": "CC0-1.0"}]


def write(folder: Path, tasks: dict[str, int], *, answer: str = "yes") -> Path:
    """A corpus of conversations, so many of each task, no two alike."""
    rows = [
        {
            "id": f"{task}/{number}",
            "messages": [
                {"role": "user", "content": f"{task} question {number}"},
                {"role": "assistant", "content": answer},
            ],
            "source": task,
            "language": "en",
        }
        for task, count in tasks.items()
        for number in range(count)
    ]
    return write_corpus(folder, "messages", rows, provenance=ABOUT, ledger={}).path


def run(folder: Path, inputs: dict[str, Any], *, seed: int = 0, **settings: Any) -> Outcome:
    definition = get_stage("task_mixture")
    out = folder / f"out-{len(list(folder.iterdir()))}"
    context = Context("mixture", out, inputs, seed=seed)
    return definition.function(context, validate(definition.parameters, settings, where="test"))


def drawn(outcome: Outcome) -> Counter[str]:
    return Counter(row["source"] for row in Corpus.open(outcome.outputs["corpus"]).rows())


def test_every_source_gives_what_its_cap_says_and_every_task_has_its_turn(tmp_path: Path) -> None:
    corpora = {
        "large": write(tmp_path / "large", {"a": 200, "b": 30, "c": 2}),
        "small": write(tmp_path / "small", {"d": 5}),
    }
    caps = {"large": {"rows": 22, "task_rows": 12}, "small": {"rows": 5}}
    outcome = run(tmp_path, {"corpora": corpora}, caps=caps)
    assert drawn(outcome) == {"a": 10, "b": 10, "c": 2, "d": 5}
    metrics = outcome.metrics
    assert metrics["rows"] == 27 and metrics["rows.large"] == 22 and metrics["off_cap"] == 0
    assert metrics["tasks"] == 4 and metrics["tasks_missing"] == 0 and metrics["fewest_of_a_task"] == 2
    assert metrics["dropped.over_the_cap"] == 210


def test_a_small_task_is_there_without_a_cap_by_task(tmp_path: Path) -> None:
    corpora = {"one": write(tmp_path / "one", {"big": 500, "tiny": 1})}
    for seed in range(5):
        outcome = run(tmp_path, {"corpora": corpora}, caps={"one": {"rows": 3}}, seed=seed)
        assert drawn(outcome) == {"big": 2, "tiny": 1}


def test_the_draw_follows_the_seed(tmp_path: Path) -> None:
    corpora = {"one": write(tmp_path / "one", {"a": 60, "b": 60})}

    def ids(seed: int) -> list[str]:
        outcome = run(tmp_path, {"corpora": corpora}, caps={"one": {"rows": 20}}, seed=seed)
        return [row["id"] for row in Corpus.open(outcome.outputs["corpus"]).rows()]

    assert ids(3) == ids(3) != ids(4)


@pytest.fixture
def tiny_chat(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """A model's folder with a chat template of a few marks."""
    from puna.model.llama import Llama
    from puna.model.spec import BlockSpec, LlamaSpec
    from puna.text import pretrained
    from puna.text.template import Template

    block = BlockSpec(heads=2, kv_heads=2, head_dim=4, width=8)
    model = Llama(LlamaSpec(vocab_size=320, hidden_size=8, blocks=(block,), tied=True))
    model.tokenizer = tiny_tokenizer
    written = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
    model.template = Template(written, tiny_tokenizer.template_strings)
    return pretrained.save(model, tmp_path / "model")


def test_what_is_too_long_is_left_out_before_the_table_is_made(tmp_path: Path, tiny_chat: Path) -> None:
    short, long = {"a": 8}, write(tmp_path / "long", {"a": 4}, answer="word " * 40)
    rows = [*Corpus.open(write(tmp_path / "short", short)).rows(), *Corpus.open(long).rows()]
    rows = [{**row, "id": f"{place}"} for place, row in enumerate(rows)]
    both = write_corpus(tmp_path / "both", "messages", rows, provenance=ABOUT, ledger={}).path
    inputs = {"corpora": {"one": both}, "model": tiny_chat}
    outcome = run(tmp_path, inputs, caps={"one": {"rows": 8}}, max_length=60)
    assert all(
        len(row["messages"][1]["content"]) < 10 for row in Corpus.open(outcome.outputs["corpus"]).rows()
    )
    assert outcome.metrics["dropped.too_long"] == 4 and outcome.metrics["rows"] == 8
    with pytest.raises(PunaError, match="nothing is left of task 'a'"):
        run(
            tmp_path, {"corpora": {"one": long}, "model": tiny_chat}, caps={"one": {"rows": 1}}, max_length=60
        )


def test_what_shares_words_with_held_out_conversations_is_left_out(tmp_path: Path) -> None:
    shared = "one two three four five six seven eight nine ten eleven twelve thirteen"
    corpora = {
        "one": write(tmp_path / "one", {"a": 3}),
        "two": write(tmp_path / "two", {"b": 3}, answer=shared),
    }
    held_out = {"apart": write(tmp_path / "apart", {"c": 1}, answer=shared)}
    caps = {"one": {"rows": 3}, "two": {"rows": 3}}
    inputs = {"corpora": corpora, "held_out": held_out}
    with pytest.raises(PunaError, match="nothing is left of task 'b'"):
        run(tmp_path, inputs, caps=caps)
    with pytest.raises(PunaError, match="13 words in a row"):
        run(tmp_path, inputs, caps=caps, leak="error")
    reported = run(tmp_path, inputs, caps=caps, leak="report")
    assert reported.metrics["leak.rows"] == 3 and reported.metrics["rows"] == 6


def test_mistakes_are_told(tmp_path: Path) -> None:
    corpora = {"one": write(tmp_path / "one", {"a": 3})}
    with pytest.raises(PunaError, match="source 'one' has fewer rows than its cap says") as error:
        run(tmp_path, {"corpora": corpora}, caps={"one": {"rows": 4}})
    assert error.value.found == "3 rows within the limits" and error.value.expected == "4"
    taken = run(tmp_path, {"corpora": corpora}, caps={"one": {"rows": 4}}, when_short="take")
    assert taken.metrics["rows"] == 3 and taken.metrics["off_cap"] == 1
    with pytest.raises(PunaError, match="unknown source 'on'"):
        run(tmp_path, {"corpora": corpora}, caps={"on": {"rows": 1}})
    with pytest.raises(PunaError, match="source 'two' has no cap"):
        two = {"two": write(tmp_path / "two", {"b": 1})}
        run(tmp_path, {"corpora": corpora | two}, caps={"one": {"rows": 1}})
    with pytest.raises(PunaError, match="tokens are counted by a model's tokenizer"):
        run(tmp_path, {"corpora": corpora}, caps={"one": {"rows": 1}}, max_length=10)
