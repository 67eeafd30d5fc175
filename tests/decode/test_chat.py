from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from puna.core.errors import PunaError
from puna.core.stage import Context, get_stage, validate
from puna.data.corpus import Corpus
from puna.decode.chat import chat
from puna.decode.engine import Engine
from puna.decode.sampling import Sampling
from puna.text.template import CHATML, Template

SHORT = Sampling(max_tokens=6)


@pytest.fixture
def model(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Any:
    built = tiny_llama(tie_word_embeddings=False)
    for parameter in built.parameters():
        parameter.data.mul_(4)
    built.tokenizer = tiny_tokenizer
    built.template = Template(CHATML, tiny_tokenizer.template_strings)
    return built


def talk(model: Any, *lines: str, **settings: Any) -> tuple[list[dict[str, str]], str]:
    out = io.StringIO()
    return list(chat(model, sampling=SHORT, lines=lines, out=out, **settings)), out.getvalue()


def test_answers_are_those_of_the_engine_for_the_whole_history(model: Any) -> None:
    messages, printed = talk(model, "the cat\n", "\n", "on the mat\n")
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
    first = Engine(model).generate([messages[:1]], SHORT)[0].text
    second = Engine(model).generate([messages[:3]], SHORT)[0].text
    assert (messages[1]["content"], messages[3]["content"]) == (first, second)
    assert printed == f"{first}\n{second}\n"


def test_the_system_message_stays_and_the_rest_is_forgotten(model: Any) -> None:
    messages, _ = talk(model, "the cat", "/reset", "the end", system="that")
    assert [message["content"] for message in messages[:2]] == ["that", "the end"]
    assert len(messages) == 3
    messages, _ = talk(model, "a", "/system it sat", "the end")
    assert messages[0] == {"role": "system", "content": "it sat"}
    assert len(messages) == 3
    assert talk(model, "/system", system="that")[0] == []


@pytest.mark.parametrize("name", ["one", "one.jsonl"])
def test_quit_ends_and_save_writes_what_a_corpus_is_made_of(model: Any, tmp_path: Path, name: str) -> None:
    file = tmp_path / "chats" / name
    messages, printed = talk(model, "the cat\u2028 sat", f"/save {file}", "/quit", "never said", system="é")
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert f"3 messages saved to {tmp_path / 'chats' / 'one.jsonl'}" in printed
    stage = get_stage("corpus")
    settings = {"kind": "messages", "sources": [{"path": str(tmp_path / "chats" / "*.jsonl")}]}
    outcome = stage.function(
        Context("talks", tmp_path / "talks", {}), validate(stage.parameters, settings, where="test")
    )
    rows = list(Corpus.open(outcome.outputs["train"]).rows())
    assert [row["messages"] for row in rows] == [messages]


def test_mistakes_are_told_and_the_chat_goes_on(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    mistakes = ("/rest", "/save", "/save a.json", "/save a", "the cat " * 200)
    messages, printed = talk(model, *mistakes, "/help", "a cat")
    errors = capsys.readouterr().err
    assert "did you mean '/reset'" in errors
    assert "/save needs a file name" in errors
    assert "/save a.jsonl" in errors
    assert "nothing to save yet" in errors
    assert "does not fit the model's context" in errors
    assert [message["content"] for message in messages if message["role"] == "user"] == ["a cat"]
    assert "/system TEXT" in printed


def test_standard_input_is_read_where_there_is_no_terminal(
    model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
    messages = chat(model, sampling=SHORT)
    assert capsys.readouterr().out == messages[1]["content"] + "\n"


def test_a_model_without_a_template_cannot_chat(model: Any) -> None:
    model.template = None
    with pytest.raises(PunaError, match="no chat template"):
        talk(model, "a")
