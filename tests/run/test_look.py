"""What ``puna inspect`` shows of a corpus of each kind, alone and as a model is trained on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import puna
from puna.data.corpus import KINDS, write_corpus
from puna.run.look import look_at
from puna.text.template import Template

CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
SAID = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on that mat"}]
TEXTS: dict[str, dict[str, Any]] = {
    "documents": {"text": "the cat sat on that mat", "language": "en"},
    "messages": {"messages": SAID, "language": "en"},
    "preferences": {
        "prompt": SAID[:1],
        "chosen": SAID[1:],
        "rejected": [{"role": "assistant", "content": "again"}],
        "language": "en",
    },
    "sentence_pairs": {
        "source_text": "the cat",
        "target_text": "de kat",
        "source_language": "en",
        "target_language": "nl",
    },
    "labelled_texts": {"text": "the cat sat", "label": "calm", "language": "en"},
    "labelled_words": {"words": ["the", "cat", "sat"], "labels": ["O", "B-CAT", "O"], "language": "en"},
}


@pytest.fixture
def model(tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> str:
    made = tiny_llama()
    made.tokenizer = tiny_tokenizer
    made.template = Template(CHAT, tiny_tokenizer.template_strings)
    return str(puna.save(made, tmp_path / "model"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_corpus_of_every_kind_can_be_looked_at(kind: str, tmp_path: Path, model: str) -> None:
    row = {"id": "a.txt#0", "source": "test", **TEXTS[kind]}
    about: dict[str, Any] = {"provenance": [{"source": "test", "licence": "CC0"}], "ledger": {}}
    folder = write_corpus(tmp_path / kind, kind, [row], **about).path
    shown = []
    for given in (None, model):
        console = Console(width=120, force_terminal=False)
        with console.capture() as capture:
            for part in look_at(str(folder), model=given, length=64):
                console.print(part)
        shown.append(capture.get())
    alone, trained = shown
    assert kind in alone and "the cat" in alone and "packing" not in alone
    assert f"packing: {'wrap' if kind in ('documents', 'sentence_pairs') else 'fit'}" in trained
    assert "the" in trained and "·cat" in trained
