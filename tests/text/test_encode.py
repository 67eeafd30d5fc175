from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_samples import (
    CONFIG,
    TEMPLATES,
    conversations,
    ordinary_text,
    train_core,
    tricky_text,
    visible_text,
)

from puna.core.errors import PunaError
from puna.text.encode import (
    Encoded,
    encode_document,
    encode_documents,
    encode_messages,
    encode_prompt,
    encode_rows,
)
from puna.text.template import CHATML, Template, template_for
from puna.text.tokenizer import Tokenizer

TemplateNamed = Callable[[str], Template]
Messages = Sequence[dict[str, Any]]
names = pytest.mark.parametrize("name", TEMPLATES)


def learnt(tokenizer: Tokenizer, encoded: Encoded) -> str:
    ids = [token for token, trained in zip(encoded.ids, encoded.trained, strict=True) if trained]
    return tokenizer.decode(ids, skip_special=False)


@names
@settings(max_examples=60)
@given(messages=conversations(visible_text))
def test_what_is_learnt_is_the_answers_with_their_ends(
    chat_tokenizer: Tokenizer, template_named: TemplateNamed, name: str, messages: Messages
) -> None:
    encoded = encode_messages(chat_tokenizer, template_named(name), messages)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    space = " " if name == "brackets" else ""  # its white space around an answer is written by the model too
    assert learnt(chat_tokenizer, encoded) == "".join(f"{space}{a}{space}<|im_end|>" for a in answers)


@settings(max_examples=100)
@given(messages=conversations(tricky_text))
def test_any_answer_is_learnt_to_the_letter(
    chat_tokenizer: Tokenizer, template_named: TemplateNamed, messages: Messages
) -> None:
    encoded = encode_messages(chat_tokenizer, template_named("chatml"), messages)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert learnt(chat_tokenizer, encoded) == "".join(f"{a}<|im_end|>" for a in answers)


@settings(max_examples=60)
@given(messages=conversations(tricky_text))
def test_no_content_can_write_a_control_token(
    chat_tokenizer: Tokenizer, template_named: TemplateNamed, messages: Messages
) -> None:
    encoded = encode_messages(chat_tokenizer, template_named("chatml"), messages)
    specials = [token for token in encoded.ids if token in chat_tokenizer.special_ids]
    assert specials == [1, 2] * len(messages)
    assert not encoded.trained[0]


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"trimming"}))
@settings(max_examples=40)
@given(messages=conversations(ordinary_text, ordinary_text))
def test_ids_equal_transformers(
    chat_tokenizer: Tokenizer, fast: Any, template_named: TemplateNamed, name: str, messages: Messages
) -> None:
    theirs = fast.apply_chat_template(messages, chat_template=TEMPLATES[name])["input_ids"]
    assert encode_messages(chat_tokenizer, template_named(name), messages).ids == theirs


@settings(max_examples=40)
@given(question=ordinary_text, answer=ordinary_text)
def test_an_answer_starts_where_the_prompt_ends_though_a_token_could_reach_over(
    chat_tokenizer: Tokenizer, fast: Any, template_named: TemplateNamed, question: str, answer: str
) -> None:
    # This template's prompt ends in two newlines: one token when the model is asked, two in the whole text.
    template = template_named("trimming")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    asked = fast.apply_chat_template(messages[:1], add_generation_prompt=True, chat_template=template.source)
    expected = asked["input_ids"] + fast.encode(answer + "<|im_end|>", add_special_tokens=False)
    assert encode_messages(chat_tokenizer, template, messages).ids == expected


@names
@settings(max_examples=40)
@given(messages=conversations(visible_text))
def test_a_prompt_is_the_beginning_of_what_was_trained(
    chat_tokenizer: Tokenizer, template_named: TemplateNamed, name: str, messages: Messages
) -> None:
    whole = encode_messages(chat_tokenizer, template_named(name), messages)
    prompt = encode_prompt(chat_tokenizer, template_named(name), messages[:-1])
    assert whole.ids[: len(prompt)] == prompt
    assert not any(whole.trained[len(prompt) - 1 : len(prompt)])
    assert whole.trained[len(prompt)]


def test_other_roles_can_be_learnt(chat_tokenizer: Tokenizer, template_named: TemplateNamed) -> None:
    messages = [{"role": "user", "content": "Hoi"}, {"role": "assistant", "content": "Dag"}]
    encoded = encode_messages(chat_tokenizer, template_named("chatml"), messages, train_on=("user",))
    assert learnt(chat_tokenizer, encoded) == "Hoi<|im_end|>"
    both = encode_messages(chat_tokenizer, template_named("chatml"), messages, train_on=("user", "assistant"))
    assert learnt(chat_tokenizer, both) == "Hoi<|im_end|>Dag<|im_end|>"
    assert encode_messages(chat_tokenizer, template_named("chatml"), messages, train_on=()).targets == 0


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("written", [False, True])
def test_there_is_one_bos_whoever_writes_it(adds_bos: bool, written: bool) -> None:
    tokenizer = Tokenizer(train_core(), {**CONFIG, "add_bos_token": adds_bos})
    template = Template(("{{ bos_token }}" if written else "") + CHATML, tokenizer.template_strings)
    messages = [{"role": "user", "content": "Hoi"}, {"role": "assistant", "content": "Dag"}]
    for ids in (
        encode_messages(tokenizer, template, messages).ids,
        encode_prompt(tokenizer, template, messages[:1]),
    ):
        assert ids.count(0) == (1 if adds_bos or written else 0)
        assert ids[0] == (0 if adds_bos or written else 1)


def test_documents_have_their_bos_and_learn_their_eos() -> None:
    tokenizer = Tokenizer(train_core(), {**CONFIG, "add_bos_token": True})
    encoded = encode_document(tokenizer, "De kat", source="d1")
    assert encoded.ids == [0, *tokenizer.encode("De kat"), 2]
    assert encoded.trained == [False] + [True] * (len(encoded.ids) - 1)
    assert (encoded.source, encoded.targets) == ("d1", len(encoded) - 1)
    plain = Tokenizer(train_core(), CONFIG)
    assert encode_document(plain, "De kat").ids == [*plain.encode("De kat"), 2]
    assert encode_document(plain, "").ids == [2]


@given(texts=st.lists(tricky_text, max_size=4))
def test_many_documents_are_encoded_like_each_alone(chat_tokenizer: Tokenizer, texts: list[str]) -> None:
    rows = [(f"r{number}", text) for number, text in enumerate(texts)]
    expected = [encode_document(chat_tokenizer, text, source=name) for name, text in rows]
    assert encode_documents(chat_tokenizer, rows) == expected


class TestRowsOfEachKind:
    messages = [{"role": "user", "content": "Hoi"}]  # noqa: RUF012
    answer = [{"role": "assistant", "content": "Dag"}]  # noqa: RUF012
    other = [{"role": "assistant", "content": "Nee"}]  # noqa: RUF012

    def test_documents(self, chat_tokenizer: Tokenizer) -> None:
        rows = [{"id": 7, "text": "De kat"}]
        assert encode_rows(rows, "documents", chat_tokenizer) == [
            encode_document(chat_tokenizer, "De kat", source="7")
        ]

    def test_messages(self, chat_tokenizer: Tokenizer, template_named: TemplateNamed) -> None:
        rows = [{"id": 7, "messages": [*self.messages, *self.answer]}]
        encoded = encode_rows(rows, "messages", chat_tokenizer, template_named("chatml"), total=1)
        assert [(row.source, learnt(chat_tokenizer, row)) for row in encoded] == [("7", "Dag<|im_end|>")]

    def test_only_the_last_turn_is_learnt_where_asked(
        self, chat_tokenizer: Tokenizer, template_named: TemplateNamed
    ) -> None:
        twice = [*self.messages, *self.answer, *self.messages, *self.other]
        rows = [{"id": 7, "messages": twice}, {"id": 8, "messages": [*twice, *self.messages]}]
        encoded = encode_rows(rows, "messages", chat_tokenizer, template_named("chatml"), last_only=True)
        assert [learnt(chat_tokenizer, row) for row in encoded] == ["Nee<|im_end|>"] * 2
        users = encode_rows(
            rows, "messages", chat_tokenizer, template_named("chatml"), train_on=("user",), last_only=True
        )
        assert [learnt(chat_tokenizer, row) for row in users] == ["Hoi<|im_end|>"] * 2
        assert [len(row.ids) for row in encoded] == [len(row.ids) for row in users]

    def test_preferences(self, chat_tokenizer: Tokenizer, template_named: TemplateNamed) -> None:
        rows = [{"id": 7, "prompt": self.messages, "chosen": self.answer, "rejected": self.other}]
        encoded = encode_rows(rows, "preferences", chat_tokenizer, template_named("chatml"))
        assert [(row.source, learnt(chat_tokenizer, row)) for row in encoded] == [
            ("7:chosen", "Dag<|im_end|>"),
            ("7:rejected", "Nee<|im_end|>"),
        ]

    def test_nothing_of_a_prompt_is_learnt_not_even_earlier_answers(
        self, chat_tokenizer: Tokenizer, template_named: TemplateNamed
    ) -> None:
        prompt = [*self.messages, *self.other, *self.messages]
        rows = [{"id": 7, "prompt": prompt, "chosen": self.answer, "rejected": self.other}]
        encoded = encode_rows(rows, "preferences", chat_tokenizer, template_named("chatml"))
        assert [learnt(chat_tokenizer, row) for row in encoded] == ["Dag<|im_end|>", "Nee<|im_end|>"]

    def test_sentence_pairs(self, chat_tokenizer: Tokenizer) -> None:
        rows = [{"id": 7, "source_text": "De kat", "target_text": "The cat"}]
        encoded = encode_rows(rows, "sentence_pairs", chat_tokenizer)
        assert [learnt(chat_tokenizer, row)[-11:] for row in encoded] == [
            " kat<|im_end|>"[-11:],
            " cat<|im_end|>"[-11:],
        ]

    def test_an_unknown_kind(self, chat_tokenizer: Tokenizer) -> None:
        with pytest.raises(PunaError, match=r"did you mean 'documents'"):
            encode_rows([], "document", chat_tokenizer)

    def test_conversations_without_a_template(self, chat_tokenizer: Tokenizer) -> None:
        with pytest.raises(PunaError, match="needs a chat template"):
            encode_rows([], "messages", chat_tokenizer)

    def test_a_bad_row_is_named(self, chat_tokenizer: Tokenizer, template_named: TemplateNamed) -> None:
        rows = [{"id": "row-9", "messages": [{"role": "user", "content": None}]}]
        with pytest.raises(PunaError, match="row row-9, message 0: a message's content is not text"):
            encode_rows(rows, "messages", chat_tokenizer, template_named("chatml"))


class TestRefusals:
    messages = [{"role": "user", "content": "Hoi"}, {"role": "assistant", "content": "Dag"}]  # noqa: RUF012

    def refuse(self, source: str, match: str, config: dict[str, Any] = CONFIG) -> None:
        tokenizer = Tokenizer(train_core(), config)
        with pytest.raises(PunaError, match=match):
            encode_messages(tokenizer, Template(source, tokenizer.template_strings), self.messages)

    def test_a_template_that_never_stops(self) -> None:
        self.refuse("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "no stop is learnt")

    def test_a_template_that_leaves_the_answer_out(self) -> None:
        source = "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}"
        self.refuse(source, "exactly once")

    def test_a_template_that_writes_the_answer_twice(self) -> None:
        source = "{% for m in messages %}{{ m.content }}<|im_end|>{{ m.content }}<|im_end|>{% endfor %}"
        self.refuse(source, "exactly once")

    @pytest.mark.parametrize("adds_bos", [False, True])
    @pytest.mark.parametrize("between", ["", " ", "\n"])
    def test_a_template_that_writes_the_bos_twice(self, adds_bos: bool, between: str) -> None:
        source = "{{ bos_token }}" + between + "{{ bos_token }}" + CHATML
        self.refuse(source, "begins with two BOS tokens", {**CONFIG, "add_bos_token": adds_bos})

    def test_a_template_that_writes_the_bos_after_white_space_where_the_tokenizer_adds_one(self) -> None:
        source = "\n\n{{ bos_token }}" + CHATML
        self.refuse(source, "begins with two BOS tokens", {**CONFIG, "add_bos_token": True})
        tokenizer = Tokenizer(train_core(), CONFIG)
        template = Template(source, tokenizer.template_strings)
        assert encode_messages(tokenizer, template, self.messages).ids.count(0) == 1

    @pytest.mark.parametrize("adds_bos", [False, True])
    def test_a_bos_of_every_turn_is_no_second_beginning(self, adds_bos: bool) -> None:
        tokenizer = Tokenizer(
            train_core(), {**CONFIG, "bos_token": "<|im_start|>", "add_bos_token": adds_bos}
        )
        template = Template(CHATML, tokenizer.template_strings)
        assert encode_messages(tokenizer, template, self.messages).ids.count(1) == 2
        said = [{"role": "user", "content": "<|im_start|>Hoi"}, self.messages[1]]  # text, and no BOS
        assert encode_messages(tokenizer, template, said).ids.count(1) == 2

    @pytest.mark.parametrize("text", ["<|endoftext|>De kat", "<|endoftext|>"])
    def test_a_document_that_begins_with_the_string_of_the_bos_has_one_bos(self, text: str) -> None:
        tokenizer = Tokenizer(train_core(), {**CONFIG, "add_bos_token": True})
        assert encode_document(tokenizer, text).ids.count(0) == 1

    def test_a_token_that_joins_markup_and_answer(self) -> None:
        tokenizer = Tokenizer(train_core(), CONFIG)
        source = "{% for m in messages %}{{ 'ka' + m.content }}<|im_end|>{% endfor %}"
        template = Template(source, tokenizer.template_strings)
        messages = [{"role": "user", "content": "Hoi"}, {"role": "assistant", "content": "t"}]
        assert tokenizer.tokens(tokenizer.encode("kat"))[-1].endswith("at")
        with pytest.raises(PunaError, match="a token joins"):
            encode_messages(tokenizer, template, messages)


@pytest.mark.smollm
def test_the_real_template_trains_answers_only(smollm_path: Any) -> None:
    tokenizer = Tokenizer.from_gguf(smollm_path)
    messages = [{"role": "user", "content": "<|im_end|>Hoi"}, {"role": "assistant", "content": " Dag 😀 12"}]
    encoded = encode_messages(tokenizer, template_for(tokenizer), messages)
    text = tokenizer.decode(encoded.ids, skip_special=False)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert learnt(tokenizer, encoded) == " Dag 😀 12<|im_end|>"
    assert encoded.ids.count(tokenizer.eos_id) == 3
