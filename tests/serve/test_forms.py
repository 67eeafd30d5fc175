"""Answers that must have a form: JSON schemas, expressions, demanded calls."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serve.little_server import Live

pytest.importorskip("llguidance")

HELLO: Any = [{"role": "user", "content": "the cat"}]
SCHEMA = {
    "type": "object",
    "properties": {"town": {"enum": ["Puno", "Cusco"]}, "cold": {"type": "boolean"}},
    "required": ["town", "cold"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "The weather.", "parameters": SCHEMA},
    },
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "maxProperties": 0}}},
]


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_follows_a_schema(client: openai.OpenAI, temperature: float) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
    found = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        response_format=form,
        temperature=temperature,
        max_tokens=200,
        seed=1,
        n=2,
    )
    for choice in found.choices:
        said = json.loads(choice.message.content or "")
        assert set(said) == {"town", "cold"} and said["town"] in ("Puno", "Cusco")
        assert choice.finish_reason == "stop"


def test_an_answer_is_an_object_or_matches_an_expression(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=HELLO, response_format={"type": "json_object"}, temperature=0, max_tokens=100
    )
    assert (found.choices[0].message.content or "").lstrip().startswith("{")
    expression = r"(yes|no), [0-9]{2} llamas"
    found = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        temperature=1,
        seed=2,
        extra_body={"response_format": {"type": "regex", "regex": expression}},
    )
    assert re.fullmatch(expression, found.choices[0].message.content or "")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_demanded_call_is_made(client: openai.OpenAI, choice: Any) -> None:
    asked: Any = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "tool_choice": choice}
    asked |= {"temperature": 0, "max_tokens": 200}
    found = client.chat.completions.create(**asked).choices[0]
    assert found.finish_reason == "tool_calls"
    assert found.message.content is None
    (call,) = found.message.tool_calls or ()
    assert call.type == "function"
    arguments = json.loads(call.function.arguments)
    assert (call.function.name, set(arguments)) in [("weather", {"town", "cold"}), ("clock", set())]
    if choice != "required":
        assert call.function.name == "weather"
    streamed = list(client.chat.completions.create(**asked, stream=True))
    calls = [one for chunk in streamed for one in chunk.choices[0].delta.tool_calls or ()]
    assert [(one.function.name, one.function.arguments) for one in calls if one.function] == [
        (call.function.name, call.function.arguments)
    ]
    assert streamed[-1].choices[0].finish_reason == "tool_calls"


def test_a_model_that_may_choose_can_say_something_else(client: openai.OpenAI) -> None:
    for choice in ("auto", "none"):
        found = client.chat.completions.create(
            model="tiny", messages=HELLO, tools=TOOLS, tool_choice=choice, temperature=0, max_tokens=6
        ).choices[0]
        assert found.message.content and not found.message.tool_calls
        assert found.finish_reason == "length"


def test_a_conversation_with_calls_and_results_goes_on(client: openai.OpenAI) -> None:
    call: Any = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"town": "Puno", "cold": true}'},
    }
    messages: Any = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "snow"},
    ]
    found = client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, max_tokens=2)
    plain = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2)
    assert found.usage and plain.usage and found.usage.prompt_tokens > plain.usage.prompt_tokens


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 5}}}},
            "response_format",
        ),
        ({"response_format": {"type": "regex", "regex": "("}}, "response_format"),
        ({"response_format": {"type": "regex", "regex": "a" * 70_000}}, "response_format"),
        ({"tool_choice": "required"}, None),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, None),
        ({"tools": [TOOLS[0], TOOLS[0]]}, None),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, None),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.user.content"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.tool.tool_call_id"),
        ({"messages": [{"role": "assistant"}]}, "messages.0.assistant"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages.0.user.name"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, None),
    ],
)
def test_forms_that_cannot_be_are_refused(server: Live, body: dict[str, Any], param: str | None) -> None:
    answer = server.post("/v1/chat/completions", **{"model": "tiny", "messages": HELLO, **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text
