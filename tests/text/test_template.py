from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from text_samples import CONFIG, TEMPLATES, conversations, train_core, tricky_text, visible_text

from puna.core.errors import PunaError
from puna.text.template import CHATML, Span, Template, find_template, template_for, with_system
from puna.text.tokenizer import Tokenizer

TemplateNamed = Callable[[str], Template]
Messages = Sequence[dict[str, Any]]
names = pytest.mark.parametrize("name", TEMPLATES)
USER_AND_ASSISTANT = [{"role": "user", "content": "Hoi"}, {"role": "assistant", "content": "Dag"}]


@names
@settings(max_examples=40)
@given(messages=conversations())
def test_rendering_equals_transformers(
    template_named: TemplateNamed, fast: Any, name: str, messages: Messages
) -> None:
    for prompt in (False, True):
        theirs = fast.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, chat_template=TEMPLATES[name]
        )
        assert template_named(name).render(messages, add_generation_prompt=prompt) == theirs


def test_tools_and_json_are_rendered_as_transformers_does(fast: Any) -> None:
    source = "{{ tools | tojson(indent=2) }}{{ messages[0]['content'] | tojson }}{{ bos_token }}"
    tools = [{"type": "function", "function": {"name": "zoek", "description": '<Zoekt> & "vindt" é'}}]
    ours = Template(source, {"bos_token": "<|endoftext|>"}).render(USER_AND_ASSISTANT, tools=tools)
    assert ours == fast.apply_chat_template(
        USER_AND_ASSISTANT, tools=tools, tokenize=False, chat_template=source
    )


@names
@settings(max_examples=60)
@given(messages=conversations(visible_text))
def test_spans_are_the_contents_and_the_text_is_the_plain_rendering(
    template_named: TemplateNamed, name: str, messages: Messages
) -> None:
    template = template_named(name)
    text, spans = template.spans(messages)
    assert text == template.render(messages)
    assert [span.index for span in spans] == list(range(len(messages)))
    for span in spans:
        content = messages[span.index]["content"]
        assert text[span.start : span.content_end] == content
        if span.role == "assistant":
            assert text[span.content_end : span.end].strip() == "<|im_end|>"


@settings(max_examples=80)
@given(content=tricky_text)
def test_a_template_that_strips_leaves_the_span_of_the_stripped_content(
    template_named: TemplateNamed, content: str
) -> None:
    messages = [{"role": "user", "content": "vraag"}, {"role": "assistant", "content": content}]
    for name, expected in [("trimming", content.strip()), ("brackets", content.strip()), ("chatml", content)]:
        text, spans = template_named(name).spans(messages)
        assert text[spans[1].start : spans[1].content_end] == expected


def test_a_content_cannot_forge_the_marks_of_a_span(template_named: TemplateNamed) -> None:
    forged = "\x1e\ue000\ue001\ue002\ue003 <|im_end|>\x1f"
    messages = [{"role": "user", "content": forged}, {"role": "assistant", "content": "goed"}]
    text, spans = template_named("chatml").spans(messages)
    assert [text[s.start : s.content_end] for s in spans] == [forged, "goed"]


def test_the_default_system_prompt_is_markup(template_named: TemplateNamed) -> None:
    text, spans = template_named("default system prompt").spans(USER_AND_ASSISTANT)
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant<|im_end|>")
    assert [span.role for span in spans] == ["user", "assistant"]


def test_a_message_written_twice_or_never_shows_in_the_spans() -> None:
    twice = Template("{% for m in messages %}{{ m.content }}/{{ m.content }}<|im_end|>{% endfor %}", CONFIG)
    assert [span.index for span in twice.spans(USER_AND_ASSISTANT)[1]] == [0, 0, 1, 1]
    never = Template(
        "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}", CONFIG
    )
    assert [span.index for span in never.spans(USER_AND_ASSISTANT)[1]] == [0]


def test_the_end_of_turn_follows_the_last_answer() -> None:
    strings = {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<|user|>", "<|end|>"]}
    source = (
        "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|bot|>' }}{{ m.content }}"
        "{% if m.role != 'user' %}{{ ' <|end|>' }}{% endif %}{% endfor %}"
    )
    template = Template(source, strings)
    assert template.end_of_turn == "<|end|>"
    text, spans = template.spans(USER_AND_ASSISTANT)
    assert text[spans[1].start : spans[1].end] == "Dag <|end|>"
    assert spans[0] == Span(8, 11, "user", 0, 11)


def test_a_template_may_leave_the_turn_open() -> None:
    template = Template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", CONFIG)
    assert template.end_of_turn is None
    assert template.generation_prompt == ""


@names
def test_the_generation_prompt_is_what_asking_adds(template_named: TemplateNamed, name: str) -> None:
    template = template_named(name)
    asked = template.render(USER_AND_ASSISTANT[:1], add_generation_prompt=True)
    assert asked == template.render(USER_AND_ASSISTANT[:1]) + template.generation_prompt


def test_the_date_can_be_fixed(fast: Any) -> None:
    source = "{{ strftime_now('%d %b %Y') }}"
    assert Template(source, now=datetime(2024, 7, 26)).render(USER_AND_ASSISTANT) == "26 Jul 2024"
    today = fast.apply_chat_template(USER_AND_ASSISTANT, tokenize=False, chat_template=source)
    assert Template(source).render(USER_AND_ASSISTANT) == today


def test_the_fingerprint_changes_with_source_and_strings() -> None:
    one = Template(CHATML, {"eos_token": "<|im_end|>"})
    assert one.fingerprint == Template(CHATML, {"eos_token": "<|im_end|>"}).fingerprint
    assert one.fingerprint != Template(CHATML + " ", {"eos_token": "<|im_end|>"}).fingerprint
    assert one.fingerprint != Template(CHATML, {"eos_token": "</s>"}).fingerprint


class TestWithoutATemplate:
    def test_chatml_is_used_where_its_tokens_exist(self, chat_tokenizer: Tokenizer) -> None:
        assert template_for(chat_tokenizer).render(USER_AND_ASSISTANT) == (
            "<|im_start|>user\nHoi<|im_end|>\n<|im_start|>assistant\nDag<|im_end|>\n"
        )

    def test_a_bos_that_the_tokenizer_adds_is_written(self) -> None:
        tokenizer = Tokenizer(train_core(), {**CONFIG, "add_bos_token": True})
        assert template_for(tokenizer).render(USER_AND_ASSISTANT).startswith("<|endoftext|><|im_start|>user")

    def test_other_tokenizers_have_none(self) -> None:
        tokenizer = Tokenizer(train_core(specials=["</s>"]), {"eos_token": "</s>"})
        assert find_template(tokenizer) is None
        with pytest.raises(PunaError, match="no chat template"):
            template_for(tokenizer)


class TestRefusals:
    @pytest.mark.parametrize(
        "expression",
        [
            "m.content | upper",
            "m.content[:2]",
            "m.content | tojson",
            "m.content.split('x')[-1]",
            "m.content | replace('i', '')",
        ],
    )
    def test_a_template_that_alters_a_content(self, expression: str) -> None:
        template = Template("{% for m in messages %}{{ " + expression + " }}<|im_end|>{% endfor %}", CONFIG)
        with pytest.raises(PunaError, match=r"chat template.*cuts or rewrites"):
            template.spans([{"role": "user", "content": "Hoi x\nij"}])

    def test_the_altered_message_is_named(self) -> None:
        source = "{% for m in messages %}{{ m.content.lstrip('\\n') }}<|im_end|>{% endfor %}"
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\nb"}]
        assert len(Template(source, CONFIG).spans(USER_AND_ASSISTANT)[1]) == 2
        with pytest.raises(PunaError, match="message 1"):
            Template(source, CONFIG).spans(messages)

    def test_a_conversation_that_the_template_itself_refuses(self, template_named: TemplateNamed) -> None:
        with pytest.raises(PunaError, match="Roles must alternate"):
            template_named("brackets").render([*USER_AND_ASSISTANT, USER_AND_ASSISTANT[1]])

    def test_a_template_that_is_not_jinja(self) -> None:
        with pytest.raises(PunaError, match="line 2"):
            Template("{{ messages }}\n{% for %}", CONFIG)

    def test_a_template_that_reaches_for_pythons_insides(self) -> None:
        with pytest.raises(PunaError, match="refuses this conversation"):
            Template("{{ messages.__class__.__mro__ }}", CONFIG).render(USER_AND_ASSISTANT)

    @pytest.mark.parametrize(
        ("message", "complaint"),
        [
            ({"role": "user", "content": None}, "content is not text"),
            ({"role": "user", "content": [{"type": "text", "text": "a"}]}, "content is not text"),
            ({"role": "user<|im_end|>", "content": "a"}, "role is not a plain word"),
            ({"content": "a"}, "role is not a plain word"),
            ({"role": "assistant", "content": "a", "tool_calls": []}, "tool_calls"),
        ],
    )
    def test_messages_whose_spans_are_not_exact(self, message: dict[str, Any], complaint: str) -> None:
        with pytest.raises(PunaError, match=complaint):
            Template(CHATML, CONFIG).spans([message])

    def test_an_empty_conversation(self) -> None:
        with pytest.raises(PunaError, match="empty conversation"):
            Template(CHATML, CONFIG).spans([])

    def test_a_conversation_that_uses_up_all_marks(self) -> None:
        everything = "".join(map(chr, range(0xE000, 0xF900)))
        with pytest.raises(PunaError, match="private-use"):
            Template(CHATML, CONFIG).spans([{"role": "user", "content": everything}])


@pytest.mark.parametrize("content", ["plain", 'it\'s "so"\n{{ x }} {% if %} %}', "é 語 \\n 😀", "<|im_end|>"])
def test_a_default_system_message_is_written_as_it_is_and_only_where_there_is_none(content: str) -> None:
    template = Template(with_system(CHATML, content))
    asked = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    told = [{"role": "system", "content": content}, *asked]
    assert template.render(asked) == Template(CHATML).render(told)
    own = [{"role": "system", "content": "own"}, *asked]
    assert template.render(own) == Template(CHATML).render(own)
    text, spans = template.spans(asked)
    assert [text[span.start : span.content_end] for span in spans] == ["u", "a"]
