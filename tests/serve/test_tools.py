from __future__ import annotations

import json
from typing import Any

import pydantic
import pytest

from puna.serve.requests import ChatMessage, Tool
from puna.serve.tools import CallFinder, plain_messages, schema_of_a_call, template_knows_tools
from puna.text.template import CHATML, Template

WEATHER = Tool.model_validate(
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a town.",
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string"}},
                "required": ["town"],
            },
        },
    }
)
CLOCK = Tool.model_validate({"type": "function", "function": {"name": "clock"}})
CALL = '{"name": "weather", "arguments": {"town": "Puno"}}'


def message(role: str, content: Any = None, **more: Any) -> ChatMessage:
    return pydantic.TypeAdapter(ChatMessage).validate_python({"role": role, "content": content, **more})


def split(text: str, size: int, *, demanded: bool = False) -> tuple[str, list[tuple[str, Any]]]:
    """Text and calls found when the answer comes in pieces of ``size``."""
    finder = CallFinder(["weather", "clock"], demanded=demanded)
    given = "".join(finder.push(text[start : start + size]) for start in range(0, len(text), size))
    given += finder.finish()
    calls = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in finder.calls]
    return given, calls


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_calls_are_found_however_the_answer_comes(size: int) -> None:
    town = ("weather", {"town": "Puno"})
    marked = f"<tool_call>\n{CALL}\n</tool_call>"
    assert split(f"Let me look.\n{marked}", size) == ("Let me look.\n", [town])
    assert split(marked + "\n" + marked.replace("Puno", "Cusco"), size) == (
        "\n",
        [town, ("weather", {"town": "Cusco"})],
    )
    assert split(f"<tool_call>{CALL}", size) == ("", [town])  # ended before the closing mark
    assert split(CALL, size) == ("", [town])  # as Llama 3 writes them
    assert split(CALL.replace("arguments", "parameters"), size) == ("", [town])
    assert split(f"[{CALL}, {{'name'}}]".replace("'", '"'), size)[1] == []
    assert split(f'[{CALL}, {{"name": "clock", "arguments": {{}}}}]', size) == ("", [town, ("clock", {})])


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "plain text, a < b and <tool",
        "<tool_call>not JSON</tool_call> and on",
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '{"weather": "fine"}',
        "{ braces } of no meaning",
        f"first text, then {CALL}",
        '<tool_call>{"name": "weather", "arguments": "Puno"}</tool_call>',
        "",
    ],
)
def test_what_is_no_call_stays_text(text: str, size: int) -> None:
    assert split(text, size) == (text, [])


def test_text_is_given_out_as_soon_as_it_cannot_begin_a_call() -> None:
    finder = CallFinder(["weather"], demanded=False)
    assert finder.push("Hello <to") == "Hello "
    assert finder.push("ast> and <tool_call>") == "<toast> and "


def test_a_demanded_call_is_the_whole_answer() -> None:
    assert split(CALL, 4, demanded=True) == ("", [("weather", {"town": "Puno"})])
    assert split(CALL[:-3], 4, demanded=True) == (CALL[:-3], [])  # cut by max_tokens: nothing is lost


def test_the_schema_of_a_call_names_tools_and_arguments() -> None:
    one = schema_of_a_call([WEATHER])
    assert one["properties"]["name"] == {"const": "weather"}
    assert one["properties"]["arguments"]["required"] == ["town"]
    both = schema_of_a_call([WEATHER, CLOCK])
    assert [call["properties"]["name"]["const"] for call in both["anyOf"]] == ["weather", "clock"]


def test_tools_calls_and_results_are_written_into_the_conversation() -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"town": "Puno"}'},
    }
    messages = [
        message("developer", "Be brief."),
        message("user", [{"type": "text", "text": "How is it "}, {"type": "text", "text": "in Puno?"}]),
        message("assistant", None, tool_calls=[call]),
        message("tool", "cold", tool_call_id="call_1"),
    ]
    plain = plain_messages(messages, [WEATHER], told_by_template=False)
    assert [one["role"] for one in plain] == ["system", "user", "assistant", "user"]
    assert plain[0]["content"].startswith("Be brief.\n\n")
    assert '"name": "weather"' in plain[0]["content"] and "{{" not in plain[0]["content"]
    assert plain[1]["content"] == "How is it in Puno?"
    assert plain[2]["content"] == f"<tool_call>\n{CALL}\n</tool_call>"
    assert plain[3]["content"] == "<tool_response>\ncold\n</tool_response>"
    assert split(plain[2]["content"], 5)[1] == [("weather", {"town": "Puno"})]  # what is written is read
    without = plain_messages(messages[1:2], [WEATHER], told_by_template=False)
    assert [one["role"] for one in without] == ["system", "user"]
    assert plain_messages(messages[1:2], [WEATHER], told_by_template=True) == [plain[1]]


def test_a_template_that_reads_tools_is_known() -> None:
    assert not template_knows_tools(Template(CHATML))
    assert template_knows_tools(Template("{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML))
