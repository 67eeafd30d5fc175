from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from rich.console import Console, RenderableType
from text_samples import CONFIG, CORPUS, tricky_text
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers, trainers

from puna.core.errors import PunaError
from puna.text.encode import encode_document
from puna.text.inspect import (
    LEARNT,
    NOT_LEARNT,
    SPECIAL,
    inspect_corpus,
    inspect_model,
    marked,
    show_tokens,
)
from puna.text.packing import NO_TARGET
from puna.text.template import Template
from puna.text.tokenizer import Tokenizer

TemplateNamed = Callable[[str], Template]
VISIBLE = {code: chr(0x2400 + code) for code in range(32)} | {n: f"\\x{n:02x}" for n in range(127, 160)}
VISIBLE |= {0x20: "·", 0x0A: "⏎\n", 0x09: "⇥", 0xA0: "⍽"}
ROWS = [
    {
        "id": f"row{number}",
        "messages": [
            {"role": "user", "content": "De kat?"},
            {"role": "assistant", "content": "Ja, de kat.\n"},
        ],
    }
    for number in range(3)
]


def printed(view: RenderableType, **options: Any) -> str:
    console = Console(width=160, **{"force_terminal": False, **options})
    with console.capture() as capture:
        console.print(view)
    return capture.get()


def test_learnt_tokens_have_one_colour_and_the_rest_another(
    chat_tokenizer: Tokenizer, template_named: TemplateNamed
) -> None:
    inspection = inspect_corpus(
        ROWS, "messages", chat_tokenizer, template_named("chatml"), length=64, mode="off"
    )
    encoded = inspection.encoded[0]
    text = show_tokens(chat_tokenizer, encoded.ids, encoded.trained)
    assert len(text.spans) == len(encoded)
    learnt = "".join(text.plain[span.start : span.end] for span in text.spans if LEARNT in str(span.style))
    rest = "".join(text.plain[span.start : span.end] for span in text.spans if NOT_LEARNT in str(span.style))
    assert learnt == "Ja,·de·kat.⏎\n<|im_end|>"
    assert rest == "<|im_start|>user⏎\nDe·kat?<|im_end|>⏎\n<|im_start|>assistant⏎\n⏎\n"
    specials = [text.plain[span.start : span.end] for span in text.spans if SPECIAL in str(span.style)]
    assert specials == ["<|im_start|>", "<|im_end|>"] * 2


TERMINAL = {"force_terminal": True, "color_system": "truecolor"}


@pytest.mark.parametrize("options", [{}, {**TERMINAL, "no_color": True}])
def test_without_colours_learnt_tokens_stand_in_brackets(
    chat_tokenizer: Tokenizer, template_named: TemplateNamed, options: dict[str, Any]
) -> None:
    view = inspect_corpus(
        ROWS[:2], "messages", chat_tokenizer, template_named("chatml"), length=128, mode="fit"
    ).view
    shown = printed(view, **options)
    assert "⟦learnt⟧ not learnt" in shown
    assert shown.count("⟦Ja,·de·kat.⏎") == 2
    assert "⟧⏎" in shown and "⟦<|im_start|>" not in shown
    assert shown.count("⟦") == shown.count("⟧") == 3
    coloured = printed(view, **TERMINAL)
    assert "⟦" not in coloured and "learnt" in coloured


def test_a_run_of_learnt_tokens_has_one_pair_of_brackets(chat_tokenizer: Tokenizer) -> None:
    ids = chat_tokenizer.encode("De kat zit")
    for trained, expected in (
        ([True] * len(ids), "⟦De·kat·zit⟧"),
        ([False] * len(ids), "De·kat·zit"),
        ([True, *[False] * (len(ids) - 1)], None),
    ):
        shown = show_tokens(chat_tokenizer, ids, trained)
        plain = marked(shown).plain.plain
        assert plain.replace("⟦", "").replace("⟧", "") == shown.plain
        assert expected is None or plain == expected
        assert plain.count("⟦") == int(any(trained))


@given(text=tricky_text.filter(lambda text: "\ufffd" not in text and "‥" not in text))
def test_every_character_is_shown_once(chat_tokenizer: Tokenizer, text: str) -> None:
    ids = chat_tokenizer.encode(text)
    shown = show_tokens(chat_tokenizer, ids, [False] * len(ids)).plain
    assert shown.replace("‥", "") == text.translate(VISIBLE)


def test_a_corpus_cannot_steer_the_terminal(chat_tokenizer: Tokenizer) -> None:
    ids = chat_tokenizer.encode("\x1b[2J \x9b")
    assert show_tokens(chat_tokenizer, ids, [True] * len(ids)).plain == "␛[2J·\\x9b‥"


def test_the_spaces_of_a_sentencepiece_vocabulary_are_shown() -> None:
    core = Core(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False)
    )
    tokenizer = Tokenizer(core, {"eos_token": "</s>", "unk_token": "<unk>"})
    encoded = encode_document(tokenizer, "de kat zit")
    assert show_tokens(tokenizer, encoded.ids, encoded.trained).plain == "de·kat·zit</s>"


def test_the_table_says_where_rows_and_tokens_went(
    chat_tokenizer: Tokenizer, template_named: TemplateNamed
) -> None:
    silent = {"id": "silent", "messages": [{"role": "user", "content": "Hallo?"}]}
    inspection = inspect_corpus(
        [*ROWS, silent], "messages", chat_tokenizer, template_named("chatml"), length=1024, mode="wrap"
    )
    shown = printed(inspection.view)
    report = inspection.packed.report
    assert report.dropped == {NO_TARGET: 1}
    assert "row 0: row0 to row2" in shown
    assert shown.count("next document") == 2
    for line in (f"dropped: {NO_TARGET}", "cut off at 1024", f"{report.tokens_in:,}", f"{report.targets:,}"):
        assert line in shown


def test_a_corpus_is_packed_as_training_packs_its_kind(
    chat_tokenizer: Tokenizer, template_named: TemplateNamed
) -> None:
    documents = [{"id": "0", "text": "De kat"}]
    for rows, kind, mode in ((ROWS, "messages", "fit"), (documents, "documents", "wrap")):
        inspection = inspect_corpus(rows, kind, chat_tokenizer, template_named("chatml"), length=64)
        assert inspection.packed.report.mode == mode


def test_only_so_many_rows_are_looked_at(chat_tokenizer: Tokenizer) -> None:
    rows = ({"id": number, "text": "De kat"} for number in range(1000))
    inspection = inspect_corpus(rows, "documents", chat_tokenizer, length=64, mode="fit", limit=5, samples=0)
    assert inspection.packed.report.rows_in == 5
    assert next(rows)["id"] == 5


def test_a_corpus_in_which_nothing_is_learnt_is_an_error(
    chat_tokenizer: Tokenizer, template_named: TemplateNamed
) -> None:
    with pytest.raises(PunaError, match="no row has anything to learn"):
        inspect_corpus(
            ROWS,
            "messages",
            chat_tokenizer,
            template_named("chatml"),
            length=64,
            mode="fit",
            train_on=("tool",),
        )


def test_a_model_shows_its_layers_its_stops_and_its_template(
    chat_tokenizer: Tokenizer, template_named: TemplateNamed, tiny_llama: Callable[..., Any]
) -> None:
    spec = tiny_llama(vocab_size=384).spec
    shown = printed(
        inspect_model(spec, chat_tokenizer.with_stop_tokens(["<|endoftext|>"]), template_named("chatml"))
    )
    for words in (
        "360 of 384",
        "<|im_end|> (2), <|endoftext|> (0)",
        chat_tokenizer.fingerprint,
        "Hi·there.<|im_end|>",
    ):
        assert words in shown
    assert "stops at" not in printed(inspect_model(spec))


def test_a_template_that_cannot_be_trained_with_is_said_so(
    chat_tokenizer: Tokenizer, tiny_llama: Callable[..., Any]
) -> None:
    template = Template("{% for m in messages %}{{ m.content }}\n{% endfor %}", CONFIG)
    assert "no stop is learnt" in printed(inspect_model(tiny_llama().spec, chat_tokenizer, template))
