"""Chat templates, rendered once, with the exact characters of every message.

The source is the Jinja template of a Hugging Face checkpoint and the text equals that of
transformers' ``apply_chat_template``. To know which characters of the text come from which
message, each message's content is wrapped in marks before rendering and the marks are taken out of
the text afterwards. A template that changes a message's content itself has no exact spans and is
refused with the message it changed.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from puna.core import files
from puna.core.errors import PunaError

if TYPE_CHECKING:
    from puna.text.tokenizer import Tokenizer

Message = Mapping[str, Any]

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The template of a tokenizer that has none but has ChatML's tokens: no default system prompt."""

# Marks around a content's outer white space are themselves white space to Python, so that a
# template's strip() or trim takes them away together with it.
_LEADING, _TRAILING = "\x1e", "\x1f"
_PRIVATE_USE = (0xE000, 0xF8FF)
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class Span:
    """Where message ``index`` stands in the rendered text.

    ``text[start:content_end]`` is its content, ``text[content_end:end]`` the end-of-turn token
    after it with the white space between (nothing if the template ends the turn with no token).
    """

    start: int
    end: int
    role: str
    index: int
    content_end: int


class Template:
    """A chat template.

    ``tokenizer_strings`` gives the strings the template may write (``bos_token``, ``eos_token``
    ...) and under ``additional_special_tokens`` the other special tokens; see
    :attr:`Tokenizer.template_strings`. ``now`` is the time that a template sees which writes the
    date; without it the clock's.
    """

    def __init__(
        self, source: str, tokenizer_strings: Mapping[str, Any] | None = None, *, now: datetime | None = None
    ) -> None:
        strings = dict(tokenizer_strings or {})
        self.source = source
        self.now = now
        self.specials = tuple(strings.pop("additional_special_tokens", ())) + tuple(strings.values())
        self.strings = strings
        try:
            self._compiled = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise PunaError(
                "the chat template is not valid Jinja",
                where=f"chat template, line {error.lineno}",
                found=error.message,
            ) from None

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the template or the tokenizer's strings."""
        return files.fingerprint([self.source, self.strings])

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text of a conversation; a template's own complaint becomes a :class:`PunaError`."""
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        return self._render(plain, add_generation_prompt, tools, self.now or datetime.now())

    def spans(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[str, list[Span]]:
        """The rendered text and, in the order of the text, where each message's content stands.

        A message that the template leaves out has no span; one that it writes twice has two.
        A template that alters a content (or decides by it in a way that marks disturb) is refused.
        """
        contents = [_content(message, index) for index, message in enumerate(messages)]
        marks = _Marks.beside([self.source, *self.specials, *contents], len(contents))
        now = self.now or datetime.now()
        plain = [
            {"role": m["role"], "content": content} for m, content in zip(messages, contents, strict=True)
        ]
        marked = [{**message, "content": marks.wrap(i, contents[i])} for i, message in enumerate(plain)]
        text = self._render(plain, add_generation_prompt, tools, now)
        found, places = marks.unwrap(self._render(marked, add_generation_prompt, tools, now), contents)
        if found != text:
            self._refuse(plain, contents, self._render(plain, False, None, now), now)
        ends = [*(start for _, start, _ in places[1:]), len(text)]
        spans = []
        for (index, start, stop), limit in zip(places, ends, strict=True):
            turn = self._turn_pattern.match(text, stop, limit)
            spans.append(Span(start, turn.end() if turn else stop, str(messages[index]["role"]), index, stop))
        return text, spans

    @functools.cached_property
    def end_of_turn(self) -> str | None:
        """The special token that the template writes after an assistant's last message, if any."""
        for opening in ([], [{"role": "system", "content": "s"}]):
            probe = [*opening, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
            marks = _Marks.beside([self.source, *self.specials], len(probe))
            marked = [
                {**message, "content": marks.wrap(i, message["content"])} for i, message in enumerate(probe)
            ]
            try:
                text, places = marks.unwrap(
                    self._render(marked, False, None, self.now or datetime.now()),
                    [m["content"] for m in probe],
                )
            except PunaError:
                continue
            if places and places[-1][0] == len(probe) - 1:
                after = _any_of(self.specials).match(text, places[-1][2])
                return after.group(1) if after else None
        return None

    @functools.cached_property
    def generation_prompt(self) -> str:
        """What the template writes to make the assistant answer; empty if it writes nothing."""
        for opening in ([], [{"role": "system", "content": "s"}]):
            probe = [*opening, {"role": "user", "content": "u"}]
            now = self.now or datetime.now()
            try:
                asked = self._render(probe, True, None, now)
                told = self._render(probe, False, None, now)
            except PunaError:
                continue
            if asked.startswith(told):
                return asked[len(told) :]
        return ""

    @functools.cached_property
    def _turn_pattern(self) -> re.Pattern[str]:
        return _any_of([token for token in (self.end_of_turn, self.strings.get("eos_token")) if token])

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        now: datetime,
    ) -> str:
        if not messages:
            raise PunaError("an empty conversation cannot be rendered")
        try:
            return self._compiled.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=now.strftime,
                **self.strings,
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
        ) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise PunaError(
                f"the chat template refuses this conversation: {error}",
                where="chat template",
                found=f"roles {roles}",
            ) from None

    def _refuse(
        self, plain: Sequence[Message], contents: Sequence[str], text: str, now: datetime
    ) -> NoReturn:
        """Name the message whose content the template alters: marks around it alone change the text."""
        for index, content in enumerate(contents):
            marks = _Marks.beside([self.source, *self.specials, *contents], len(contents))
            wrapped = [
                {**m, "content": marks.wrap(i, content)} if i == index else m for i, m in enumerate(plain)
            ]
            if marks.unwrap(self._render(wrapped, False, None, now), contents)[0] != text:
                _altered(index)
        _altered(None)


def find_template(tokenizer: Tokenizer) -> Template | None:
    """The tokenizer's own chat template; ChatML if it has none but has ChatML's tokens; else None."""
    source = tokenizer.chat_template
    if source is None:
        if not set(CHATML_TOKENS) <= set(tokenizer.special_tokens):
            return None
        source = ("{{ bos_token }}" if tokenizer.adds_bos else "") + CHATML
    return Template(source, tokenizer.template_strings)


def template_for(tokenizer: Tokenizer) -> Template:
    """:func:`find_template`, where a model without a chat template is an error."""
    template = find_template(tokenizer)
    if template is None:
        raise PunaError(
            "this model has no chat template",
            found=f"a tokenizer without {' and '.join(CHATML_TOKENS)}",
            expected="chat_template.jinja beside the tokenizer, or ChatML's tokens in it",
            fix="put the chat template that the model is to be trained and used with beside its tokenizer",
        )
    return template


def with_system(source: str, content: str) -> str:
    """A chat template that gives conversations without a system message this one; others stay as they are.

    ``source`` is the template as it was. Its text is a Jinja string here, so any content goes.
    """
    opening = "[{'role': 'system', 'content': " + json.dumps(content, ensure_ascii=False) + "}]"
    asked = "messages and messages[0]['role'] != 'system'"
    return f"{{%- if {asked} -%}}{{%- set messages = {opening} + messages -%}}{{%- endif -%}}{source}"


@dataclass(frozen=True)
class _Marks:
    """Private-use characters that occur in none of a conversation's strings, two per message."""

    first: int

    @classmethod
    def beside(cls, texts: Sequence[str], count: int) -> _Marks:
        low, high = _PRIVATE_USE
        used = {ord(character) for text in texts for character in set(text) if low <= ord(character) <= high}
        first = low
        for taken in sorted(used):
            if taken - first >= 2 * count:
                break
            first = taken + 1
        if first + 2 * count - 1 > high:
            raise PunaError(
                "this conversation leaves no private-use characters to mark its messages with",
                found=f"{count} messages, {len(used)} private-use characters in them",
                fix="split the conversation, or take the private-use characters out of it",
            )
        return cls(first)

    def wrap(self, index: int, content: str) -> str:
        body = content.strip()
        before, after = _outer_space(content, body)
        start, end = chr(self.first + 2 * index), chr(self.first + 2 * index + 1)
        return f"{_LEADING}{before}{start}{body}{end}{after}{_TRAILING}"

    def unwrap(self, marked: str, contents: Sequence[str]) -> tuple[str, list[tuple[int, int, int]]]:
        """The text without marks, and (message, start, end) of every content in it."""
        parts: list[str] = []
        places: list[tuple[int, int, int]] = []
        length = position = 0
        for index, start, end in self._pairs(marked, len(contents)):
            body = contents[index].strip()
            before, after = _outer_space(contents[index], body)
            if marked[start + 1 : end] != body:
                _altered(index)
            markup = marked[position:start]
            kept = markup.endswith(_LEADING + before)
            if kept:
                markup = markup[: len(markup) - len(before) - 1]
            content = (before if kept else "") + body
            position = end + 1
            if marked.startswith(after + _TRAILING, position):
                content += after
                position += len(after) + 1
            parts += [markup, content]
            places.append((index, length + len(markup), length + len(markup) + len(content)))
            length += len(markup) + len(content)
        parts.append(marked[position:])
        return "".join(parts), places

    def _pairs(self, marked: str, count: int) -> Iterator[tuple[int, int, int]]:
        """(message, place of its start mark, place of its end mark), in the order of the text."""
        marks = re.compile(f"[{chr(self.first)}-{chr(self.first + 2 * count - 1)}]")
        found = [(ord(match.group()) - self.first, match.start()) for match in marks.finditer(marked)]
        for opening, closing in zip(found[::2], [*found[1::2], (-1, 0)], strict=False):
            if opening[0] % 2 or closing[0] != opening[0] + 1:
                _altered(opening[0] // 2)
            yield opening[0] // 2, opening[1], closing[1]


def _altered(index: int | None) -> NoReturn:
    raise PunaError(
        "the chat template cuts or rewrites a message's content, so its characters cannot be told exactly",
        where="chat template" if index is None else f"chat template, message {index}",
        expected="a template that writes contents unchanged or only strips the white space around them",
        fix="remove from the message what the template cuts out or rewrites, or use a simpler template",
    )


def _outer_space(content: str, body: str) -> tuple[str, str]:
    """The white space before and after ``body`` (all of it before, if there is no body)."""
    if not body:
        return content, ""
    start = len(content) - len(content.lstrip())
    return content[:start], content[start + len(body) :]


def _content(message: Message, index: int) -> str:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise PunaError("a message's role is not a plain word", where=f"message {index}", found=repr(role))
    if not isinstance(content, str):
        raise PunaError(
            "a message's content is not text", where=f"message {index}", found=type(content).__name__
        )
    more = sorted(
        key for key, value in message.items() if key not in ("role", "content") and value is not None
    )
    if more:
        raise PunaError(
            "exact spans are known for messages of a role and a content only",
            where=f"message {index}",
            found=f"also {', '.join(more)}",
        )
    return content


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """White space, then one of the tokens as group 1; matches nothing if there are none."""
    longest_first = sorted(dict.fromkeys(tokens), key=len, reverse=True)
    return re.compile(rf"\s*({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` blocks, with which some templates mark the assistant's text, as plain blocks."""

    tags = {"generation"}  # noqa: RUF012  # the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Take the block's body as it is, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


_to_json: Callable[..., str] = functools.partial(json.dumps, ensure_ascii=False)
