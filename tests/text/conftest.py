"""A small chat tokenizer, its templates, and transformers' view of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from text_samples import CONFIG, TEMPLATES, train_core

from puna.text.template import CHATML, Template
from puna.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def chat_tokenizer() -> Tokenizer:
    """Byte-level BPE with ChatML's tokens; its pad token is another than its EOS."""
    return Tokenizer(train_core(), CONFIG)


@pytest.fixture(scope="session")
def template_named(chat_tokenizer: Tokenizer) -> Callable[[str], Template]:
    """``template_named(name)``: one of :data:`TEMPLATES` for the chat tokenizer."""
    return lambda name: Template(TEMPLATES[name], chat_tokenizer.template_strings)


@pytest.fixture(scope="session")
def fast(chat_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer of the same files."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("chat-tokenizer")
    chat_tokenizer.save(folder, template=CHATML)
    return transformers.AutoTokenizer.from_pretrained(str(folder))
