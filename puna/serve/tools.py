"""Tools in a conversation: how a model is told of them, and how its calls are found in what it writes.

A chat template that knows tools writes them itself. Otherwise, and for calls and results in earlier
messages, the convention of the Hermes models is used, which many open models follow: tools as JSON between
``<tools>`` marks in the system message, a call as JSON between ``<tool_call>`` marks, a result between
``<tool_response>`` marks. Calls are also found where the whole answer is a JSON object or list of
calls, as Llama 3 writes them. A demanded call is not hoped for: the answer is constrained to it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

import jinja2
import jinja2.meta

from puna.serve.requests import AssistantMessage, ChatMessage, Tool
from puna.text.template import Template

OPENING, CLOSING = "<tool_call>", "</tool_call>"
_TOLD = (
    "You may call functions to help with the user's request. Their signatures are between the marks:\n"
    "<tools>\n{tools}\n</tools>\n"
    'To call one, answer with a JSON object of its "name" and "arguments" between marks:\n'
    f'{OPENING}\n{{{{"name": "...", "arguments": {{{{...}}}}}}}}\n{CLOSING}'
)


def template_knows_tools(template: Template) -> bool:
    """Whether the chat template reads the variable ``tools``."""
    return "tools" in jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(template.source))


def plain_messages(
    messages: Sequence[ChatMessage], tools: Sequence[Tool], *, told_by_template: bool
) -> list[dict[str, str]]:
    """The conversation as roles and texts, tools and calls written out."""
    plain = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        text = message.text
        if isinstance(message, AssistantMessage) and message.tool_calls:
            calls = [
                _written_call(call.function.name, call.function.arguments) for call in message.tool_calls
            ]
            text = "\n".join([*([text] if text else []), *calls])
        elif role == "tool":
            # Few templates know the role "tool"; a user's turn is where a result comes from.
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
        plain.append({"role": role, "content": text})
    if tools and not told_by_template:
        told = _TOLD.format(tools="\n".join(json.dumps(described(tool)) for tool in tools))
        if plain[0]["role"] == "system":
            plain[0] = {"role": "system", "content": f"{plain[0]['content']}\n\n{told}"}
        else:
            plain.insert(0, {"role": "system", "content": told})
    return plain


def described(tool: Tool) -> dict[str, Any]:
    """A tool as a template or a prompt shows it."""
    return {"type": "function", "function": tool.function.model_dump(exclude_none=True, exclude={"strict"})}


def schema_of_a_call(tools: Sequence[Tool]) -> dict[str, Any]:
    """The JSON schema of one call of one of ``tools``."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def call_of(value: Any, names: Sequence[str]) -> dict[str, Any] | None:
    """What OpenAI's interface makes of a written call; None if it calls none of the tools."""
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, dict):
        return None
    function = {"name": value["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


class CallFinder:
    """Splits an answer, as it grows, into text and calls; what turns out to be no call stays text.

    ``demanded``: the whole answer is one call. Text that may begin a call waits until it is clear.
    """

    def __init__(self, names: Sequence[str], *, demanded: bool) -> None:
        self.calls: list[dict[str, Any]] = []
        self._names = names
        self._demanded = demanded
        self._waiting = ""
        self._begun = False  # whether any text was given out

    def push(self, text: str) -> str:
        """Take more of the answer; returns what is plain text by now."""
        self._waiting += text
        if self._demanded or self._may_be_bare():
            return ""
        given = []
        while True:
            start = self._waiting.find(OPENING)
            if start < 0:
                held = _beginning(self._waiting, OPENING)
                given.append(self._waiting[: len(self._waiting) - held])
                self._waiting = self._waiting[len(self._waiting) - held :]
                break
            end = self._waiting.find(CLOSING, start)
            if end < 0:
                given.append(self._waiting[:start])
                self._waiting = self._waiting[start:]
                break
            whole = self._waiting[start : end + len(CLOSING)]
            inner = whole[len(OPENING) : -len(CLOSING)]
            given.append(self._waiting[:start] + ("" if self._take(inner) else whole))
            self._waiting = self._waiting[end + len(CLOSING) :]
        return self._given("".join(given))

    def finish(self) -> str:
        """The answer has ended; returns the text that was still held back."""
        rest, self._waiting = self._waiting, ""
        inner = rest.removeprefix(OPENING) if rest.startswith(OPENING) else rest
        if (self._demanded or not self._begun or inner is not rest) and self._take(inner):
            return ""
        return self._given(rest)

    def _may_be_bare(self) -> bool:
        return not self._begun and not self.calls and self._waiting.lstrip()[:1] in ("{", "[")

    def _take(self, text: str) -> bool:
        """Whether ``text`` is a call or a list of calls; they are kept then."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        calls = [call_of(part, self._names) for part in (value if isinstance(value, list) else [value])]
        found = [call for call in calls if call is not None]
        if not found or len(found) < len(calls):
            return False
        self.calls += found
        return True

    def _given(self, text: str) -> str:
        self._begun = self._begun or bool(text.strip())
        return text


def _written_call(name: str, arguments: str) -> str:
    try:
        value = json.loads(arguments)
    except ValueError:
        value = arguments
    written = json.dumps({"name": name, "arguments": value}, ensure_ascii=False)
    return f"{OPENING}\n{written}\n{CLOSING}"


def _beginning(text: str, mark: str) -> int:
    """Length of the longest proper beginning of ``mark`` with which ``text`` ends."""
    return next(
        (length for length in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:length])), 0
    )
