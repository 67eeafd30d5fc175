from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import puna
from puna.core.errors import PunaError
from puna.core.stage import Context, get_stage, validate
from puna.data.corpus import Corpus
from puna.decode.chat import Chat, chat
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
    # A script that pipes a question in must learn that there was no answer.
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\nthe cat\n"))
    with pytest.raises(PunaError, match="not every line was answered\n  found:    2 with a mistake"):
        chat(model, sampling=SHORT, strategy="speculative")
    told = capsys.readouterr()
    assert told.out == ""
    assert "strategy 'speculative': unknown model of the engine 'draft'" in told.err
    assert "--companion draft=MODEL" in told.err


def test_a_model_without_a_template_cannot_chat(model: Any) -> None:
    model.template = None
    with pytest.raises(PunaError, match="no chat template"):
        talk(model, "a")


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    """The model as a folder, to be opened by its path."""
    return puna.save(model, tmp_path / "second")


def test_two_models_answer_from_one_conversation_and_go_on_apart(model: Any, saved: Path) -> None:
    messages, printed = talk(model, "the cat", f"/compare {saved}", "on the mat", "/compare", "the end")
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3
    lines = printed.splitlines()
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert f"second: {answers[1]}" in printed  # the same model, so the same answer
    assert printed.count("second: ") == 1
    assert lines[0] == answers[0].splitlines()[0]
    with pytest.raises(PunaError, match="no model"):
        chat(model, lines=[], out=io.StringIO(), compare=str(saved / "nothing.gguf"))


def test_a_model_that_cannot_be_compared_is_told_and_the_chat_goes_on(
    model: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    messages, _ = talk(model, f"/compare {tmp_path / 'none'}", "the cat")
    assert "no model" in capsys.readouterr().err
    assert len(messages) == 2


def test_a_strategy_is_chosen_by_its_name(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    expected = talk(model, "the cat")[0]
    assert talk(model, "/strategy plain", "the cat")[0] == expected
    assert talk(model, "the cat", strategy="plain")[0] == expected
    assert (
        talk(model, "/strategy plane", "/strategy plain speed=5", "/strategy plain speed", "the cat")[0]
        == expected
    )
    errors = capsys.readouterr().err
    assert "unknown strategy 'plane'" in errors
    assert "speed" in errors and "KEY=VALUE" in errors


def test_saving_a_comparison_writes_a_row_for_each_model(model: Any, saved: Path, tmp_path: Path) -> None:
    talk(model, f"/compare {saved}", "the cat", f"/save {tmp_path / 'both'}")
    assert len((tmp_path / "both.jsonl").read_text().splitlines()) == 2


class Terminal(io.StringIO):
    """Output that is shown to a person."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_is_shown_the_pace_and_columns(
    model: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    messages = chat(model, sampling=SHORT, lines=["the cat", f"/compare {saved}", "the end"], out=out)
    shown = out.getvalue()
    assert shown.count("6 tokens, ") == 3
    assert "tokens/s, first after" in shown
    assert "second" in shown
    assert len(messages) == 4


def test_an_answer_that_is_interrupted_is_forgotten_and_frees_its_cache(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Chat(model, Sampling(max_tokens=50, ignore_eos=True), out=io.StringIO())
    written: list[str] = []

    def interrupted(text: str) -> None:
        written.append(text)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(conversation, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        conversation.answer("the cat")
    assert conversation.messages == []
    statistics = conversation.sides[0].engine.statistics
    assert (statistics.running, statistics.blocks_used) == (0, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_the_arrow_keys_bring_lines_back_in_this_chat_and_the_next(saved: Path, tmp_path: Path) -> None:
    import pty

    def typed(keys: bytes) -> bytes:
        """What a chat in a terminal of its own shows when these keys are typed once it is ready."""
        child, terminal = pty.fork()
        if child == 0:
            words = [sys.executable, "-m", "puna.cli", "chat", str(saved), "--max-tokens", "2"]
            os.execve(sys.executable, words, {**os.environ, "PUNA_CACHE": str(tmp_path), "TERM": "xterm"})
        shown, asked = b"", 0
        waiting = [*(key + b"\r" for key in keys.split(b"\r")[:-1]), b"\x04"]
        while True:
            try:
                shown += os.read(terminal, 4096)
            except OSError:  # the chat has ended
                break
            if waiting and shown.count(b"> ") > asked:
                asked += 1
                os.write(terminal, waiting.pop(0))
        os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, shown
        return shown

    first = typed(b"the cat sat\r\x1b[A\r")
    assert first.count(b"the cat sat") == 2
    assert first.count(b"tokens/s") == 2
    assert typed(b"\x1b[A\r").count(b"the cat sat") == 1
    assert (tmp_path / "chat_history").stat().st_mode & 0o077 == 0
