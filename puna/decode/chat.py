"""A chat in the terminal, or over a pipe: one line in, one streamed answer out, or two side by side."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import yaml

from puna.core import assets
from puna.core.errors import PunaError, unknown_name
from puna.core.files import write_text
from puna.decode.engine import Engine
from puna.decode.sampling import Sampling
from puna.decode.strategy import resolve

if TYPE_CHECKING:
    from rich.table import Table

    from puna.decode.engine import Chosen
    from puna.decode.ticket import Completion, Event
    from puna.model.llama import Llama

COMMANDS = {
    "/system": "/system TEXT  set the system message and start anew (without TEXT: none)",
    "/reset": "/reset        forget the conversation",
    "/compare": "/compare MODEL  ask a second model too, side by side (without MODEL: no longer)",
    "/strategy": "/strategy NAME KEY=VALUE ...  decode by this method (without NAME: plainly)",
    "/save": "/save FILE    write the conversation to a .jsonl file, as a row that a corpus is made of",
    "/help": "/help         show this list",
    "/quit": "/quit         leave (also end of input)",
}
_REMEMBERED = 1000  # lines that the arrow keys bring back


@dataclass
class Side:
    """A model that answers, and the conversation with it."""

    name: str
    engine: Engine
    messages: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Pace:
    """How fast an answer came, and what it took."""

    start: float = field(default_factory=time.monotonic)
    first: float | None = None
    tokens: int = 0

    def note(self, event: Event) -> None:
        """Count what an event brought."""
        self.tokens += len(event.ids)
        if self.first is None and event.ids:
            self.first = time.monotonic() - self.start

    def line(self, completion: Completion) -> str:
        """A line of figures."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        parts = [f"{self.tokens} tokens", f"{self.tokens / seconds:.1f} tokens/s"]
        if self.first is not None:
            parts.append(f"first after {self.first:.2f} s")
        if completion.strategy != "plain":
            cost = sum(row.cost or 0.0 for row in completion.trace) / max(self.tokens, 1)
            kind = "lossless" if completion.lossless else "not lossless"
            parts.append(f"{completion.strategy}, {kind}: {cost:.2f} passes a token")
        return ", ".join(parts)


class Chat:
    """A conversation with a model, and with a second one if they are compared.

    ``models`` are further models that strategies use; ``layout`` is the engine's ``quantize`` and
    ``kernels``. Where ``out`` is a terminal each answer is followed by its pace.
    """

    def __init__(
        self,
        model: Llama,
        sampling: Sampling,
        *,
        system: str | None = None,
        out: TextIO,
        strategy: Chosen = None,
        models: Mapping[str, Llama] | None = None,
        layout: Mapping[str, Any] | None = None,
    ) -> None:
        self.sampling = sampling
        self.system = system
        self.out = out
        self.strategy = resolve(strategy)
        self._model = model
        self._models = models
        self._layout = layout or {}
        self.sides: list[Side] = []
        self.sides.append(self._side(model))
        self.reset()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation with the first model."""
        return self.sides[0].messages

    def reset(self) -> None:
        """Forget everything but the system message."""
        for side in self.sides:
            side.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str) -> str:
        """Answer one message, streaming to ``out``; a message that does not fit is not kept.

        Returns the first model's answer.
        """
        question = {"role": "user", "content": text}
        asked = [[*side.messages, question] for side in self.sides]
        said = self._alone(asked[0]) if len(self.sides) == 1 else self._side_by_side(asked)
        for side, messages, answer in zip(self.sides, asked, said, strict=True):
            side.messages = [*messages, {"role": "assistant", "content": answer}]
        return said[0]

    def compare(self, name: str) -> None:
        """Let the model ``name`` answer too, from the same conversation on; without a name no longer."""
        del self.sides[1:]
        if name:
            from puna.text.pretrained import load_merged

            kind, where = self._model.dtype, str(self._model.device)
            other = self._side(load_merged(name, dtype=kind, device=where), name)
            other.messages = list(self.messages)
            self.sides.append(other)

    def _side(self, model: Llama, name: str | None = None) -> Side:
        if model.template is None:
            raise PunaError(
                "the model has no chat template", where=model.source, fix="use a model that was tuned to chat"
            )
        like = self.sides[0].engine if self.sides else None
        engine = Engine(model, models=self._models, like=like, **self._layout)
        return Side(name or Path(str(model.source or "model")).name, engine)

    # ---- answers ---------------------------------------------------------------------------------

    def _alone(self, asked: Sequence[Mapping[str, str]]) -> list[str]:
        ticket = self.sides[0].engine.submit(asked, self.sampling, self.strategy)
        pace, said = Pace(), ""
        try:
            for event in ticket.events():
                pace.note(event)
                said += event.text
                self._write(event.text)
        finally:
            if not ticket.done:
                ticket.cancel()
        self._write("\n")
        self._aside(pace.line(ticket.completion))
        return [said]

    def _side_by_side(self, asked: Sequence[Sequence[Mapping[str, str]]]) -> list[str]:
        """Both answers at once: the engines take turns, step by step."""
        texts, paces, tickets = ["" for _ in asked], [Pace() for _ in asked], []

        def take(place: int, event: Event) -> None:
            paces[place].note(event)
            texts[place] += event.text

        def on_event(place: int) -> Any:
            return lambda event: take(place, event)

        try:
            for place, (side, messages) in enumerate(zip(self.sides, asked, strict=True)):
                tickets.append(
                    side.engine.submit(messages, self.sampling, self.strategy, on_event=on_event(place))
                )
            with self._drawing(texts) as draw:
                while not all(ticket.done for ticket in tickets):
                    for side in self.sides:
                        side.engine.step()
                    draw()
        finally:
            for ticket in tickets:
                if not ticket.done:
                    ticket.cancel()
        completions = [ticket.completion for ticket in tickets]  # raises what made one fail
        if not self.out.isatty():
            for side, text in zip(self.sides, texts, strict=True):
                self._write(f"{side.name}: {text}\n")
        for side, pace, completion in zip(self.sides, paces, completions, strict=True):
            self._aside(f"{side.name}: {pace.line(completion)}")
        return texts

    @contextlib.contextmanager
    def _drawing(self, texts: Sequence[str]) -> Any:
        """Gives a function that draws the texts side by side as they stand; nothing without a terminal."""
        if not self.out.isatty():
            yield lambda: None
            return
        from rich.console import Console
        from rich.live import Live

        names = [side.name for side in self.sides]
        with Live(_columns(names, texts), console=Console(file=self.out), refresh_per_second=12) as live:
            yield lambda: live.update(_columns(names, texts))
            live.update(_columns(names, texts), refresh=True)

    # ---- commands --------------------------------------------------------------------------------

    def command(self, line: str) -> bool:
        """Obey a line that starts with a slash; returns whether the chat goes on."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name not in COMMANDS:
            raise unknown_name("command", name, COMMANDS)
        if name == "/system":
            self.system = argument or None
            self.reset()
            self._aside("a new conversation, " + ("with" if argument else "without") + " a system message")
        elif name == "/reset":
            self.reset()
            self._aside("a new conversation")
        elif name == "/compare":
            self.compare(argument)
            self._aside(f"answering: {', '.join(side.name for side in self.sides)}")
        elif name == "/strategy":
            self.strategy = resolve(named_strategy(argument))
            self._aside(f"decoding: {self.strategy.name}")
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
        rows = [json.dumps({"messages": side.messages}, ensure_ascii=False) for side in self.sides]
        try:
            write_text(file, "\n".join(rows) + "\n")
        except OSError as error:
            raise PunaError("the conversation could not be saved", where=file, found=error.strerror) from None
        self._write(f"{len(self.messages)} messages saved to {file}\n")

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()

    def _aside(self, text: str) -> None:
        """Something beside the answers, for a person at a terminal alone."""
        if self.out.isatty():
            dim, plain = ("\x1b[2m", "\x1b[0m") if "NO_COLOR" not in os.environ else ("", "")
            self._write(f"{dim}{text}{plain}\n")


def _columns(names: Sequence[str], texts: Sequence[str]) -> Table:
    """Texts side by side under their names."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*(Text(text) for text in texts))
    return table


def named_strategy(argument: str) -> dict[str, Any] | None:
    """``NAME KEY=VALUE ...`` as a strategy and its settings, values typed as in YAML."""
    words = argument.split()
    if not words:
        return None
    chosen: dict[str, Any] = {"name": words[0]}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise PunaError("not a setting", where=f"strategy {words[0]}", found=word, expected="KEY=VALUE")
        try:
            chosen[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise PunaError("not a value", where=f"strategy {words[0]}", found=word) from None
    return chosen


def chat(
    model: Llama,
    *,
    sampling: Sampling | None = None,
    system: str | None = None,
    lines: Iterable[str] | None = None,
    out: TextIO | None = None,
    strategy: Chosen = None,
    models: Mapping[str, Llama] | None = None,
    layout: Mapping[str, Any] | None = None,
    compare: str | None = None,
) -> Sequence[dict[str, str]]:
    """Chat until ``/quit`` or the end of input; returns the conversation.

    ``lines`` are the user's lines (None: standard input); a prompt is shown only on a terminal, so
    that piped output holds the answers alone. Mistakes (an unknown command, a message longer than
    the context) are printed and the chat goes on; where standard input is a pipe or a file they make an
    error of its end. ``compare`` is a second model that answers too.
    """
    to = out or sys.stdout
    usual = sampling or Sampling(max_tokens=512)
    conversation = Chat(model, usual, system=system, out=to, strategy=strategy, models=models, layout=layout)
    if compare:
        conversation.compare(compare)
    interactive = lines is None and sys.stdin.isatty()
    engine = conversation.sides[0].engine
    form = (layout or {}).get("quantize") or str(model.dtype).removeprefix("torch.")
    mistakes = 0
    told = f"{conversation.sides[0].name}, {form}, {engine.kernels} kernels"
    for line in _typed(told) if interactive else (sys.stdin if lines is None else lines):
        text = line.strip()
        if not text:
            continue
        try:
            if not text.startswith("/"):
                conversation.answer(text)
            elif not conversation.command(text):
                break
        except PunaError as error:
            mistakes += 1
            print(error, file=sys.stderr)
        except KeyboardInterrupt:  # stops this answer; the question is forgotten with it
            print("\n(interrupted)", file=sys.stderr)
    if mistakes and lines is None and not interactive:
        raise PunaError("not every line was answered", found=f"{mistakes} with a mistake, told above")
    return conversation.messages


def _typed(told: str) -> Iterable[str]:
    """Lines as they are typed; the arrow keys bring back those of this chat and of earlier ones."""
    with _history():
        print(f"{told}. Type a message, or /help.", file=sys.stderr)
        while True:
            try:
                yield input("> ")
            except EOFError:
                return
            except KeyboardInterrupt:
                print(file=sys.stderr)


@contextlib.contextmanager
def _history() -> Any:
    """Editing of lines and their history, kept in the cache folder for its owner alone."""
    try:
        import readline
    except ImportError:
        yield
        return
    file = assets.cache_folder() / "chat_history"
    readline.set_history_length(_REMEMBERED)
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.write_history_file(file)
