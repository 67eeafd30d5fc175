"""A chat in the terminal, or over a pipe: one line in, one streamed answer out."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from puna.core.errors import PunaError, unknown_name
from puna.core.files import write_text
from puna.decode.engine import Engine
from puna.decode.sampling import Sampling

if TYPE_CHECKING:
    from puna.model.llama import Llama

COMMANDS = {
    "/system": "/system TEXT  set the system message and start anew (without TEXT: none)",
    "/reset": "/reset        forget the conversation",
    "/save": "/save FILE    write the conversation to a .jsonl file, as a row that a corpus is made of",
    "/help": "/help         show this list",
    "/quit": "/quit         leave (also end of input)",
}


class Chat:
    """A conversation: the messages so far and an engine that continues them."""

    def __init__(self, model: Llama, sampling: Sampling, *, system: str | None = None, out: TextIO) -> None:
        if model.template is None:
            raise PunaError(
                "the model has no chat template", where=model.source, fix="use a model that was tuned to chat"
            )
        self.engine = Engine(model)
        self.sampling = sampling
        self.system = system
        self.out = out
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str) -> str:
        """Answer one message, streaming to ``out``; a message that does not fit is not kept."""
        asked = [*self.messages, {"role": "user", "content": text}]
        said = ""
        for piece in self.engine.stream(asked, self.sampling):
            said += piece
            self._write(piece)
        self._write("\n")
        self.messages = [*asked, {"role": "assistant", "content": said}]
        return said

    def command(self, line: str) -> bool:
        """Obey a line that starts with a slash; returns whether the chat goes on."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name not in COMMANDS:
            raise unknown_name("command", name, COMMANDS)
        if name == "/system":
            self.system = argument or None
            self.reset()
        elif name == "/reset":
            self.reset()
        elif name == "/save":
            self._save(argument)
        elif name == "/help":
            self._write("\n".join(COMMANDS.values()) + "\n")
        return name != "/quit"

    def _save(self, name: str) -> None:
        if not name:
            raise PunaError("/save needs a file name", expected="/save FILE")
        file = Path(name).expanduser()
        file = file if file.suffix else file.with_suffix(".jsonl")
        if file.suffix != ".jsonl":
            raise PunaError(
                "a conversation is saved as a row of a .jsonl file",
                found=name,
                fix=f"/save {file.with_suffix('.jsonl')}",
            )
        if not self.messages:
            raise PunaError("there is nothing to save yet")
        try:
            write_text(file, json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise PunaError("the conversation could not be saved", where=file, found=error.strerror) from None
        self._write(f"{len(self.messages)} messages saved to {file}\n")

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def chat(
    model: Llama,
    *,
    sampling: Sampling | None = None,
    system: str | None = None,
    lines: Iterable[str] | None = None,
    out: TextIO | None = None,
) -> Sequence[dict[str, str]]:
    """Chat until ``/quit`` or the end of input; returns the conversation.

    ``lines`` are the user's lines (None: standard input); a prompt is shown only on a terminal, so
    that piped output holds the answers alone. Mistakes (an unknown command, a message longer than
    the context) are printed and the chat goes on.
    """
    to = out or sys.stdout
    conversation = Chat(model, sampling or Sampling(max_tokens=512), system=system, out=to)
    interactive = lines is None and sys.stdin.isatty()
    for line in _typed() if interactive else (sys.stdin if lines is None else lines):
        text = line.strip()
        if not text:
            continue
        try:
            if not text.startswith("/"):
                conversation.answer(text)
            elif not conversation.command(text):
                break
        except PunaError as error:
            print(error, file=sys.stderr)
        except KeyboardInterrupt:  # stops this answer; the question is forgotten with it
            print("\n(interrupted)", file=sys.stderr)
    return conversation.messages


def _typed() -> Iterable[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() editing and history)
    print("Type a message, or /help.", file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
