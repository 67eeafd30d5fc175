"""Small vocabularies, well-known chat templates, and texts and conversations for hypothesis."""

from __future__ import annotations

from typing import Any

import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from puna.text.template import CHATML

CORPUS = [
    "De kat zit op de mat en kijkt naar buiten, want het regent al 3 dagen.",
    "The cat sat on the mat and the dog didn't care about it at all.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n",
    "Zoë's café: €12,50 per persoon 😀 voor 25 mensen\n\n",
] * 20
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONFIG = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}

# Templates in the manner of well-known models: they strip, put the system prompt into the first
# user message, check that roles alternate, or write the date.
TEMPLATES = {
    "chatml": CHATML,
    "default system prompt": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "trimming": (
        "{% for message in messages %}"
        "{% set content = '<|im_start|>' + message['role'] + '\n\n' "
        "+ message['content'] | trim + '<|im_end|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
        "{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
    ),
    "brackets": (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
        "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
        "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}"
        "{% if loop.index0 == 0 and system != false %}"
        "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "generation blocks": """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""",
}


def train_core(
    pre_tokenizer: Any | None = None, *, size: int = 360, specials: list[str] | None = None, **model: Any
) -> tokenizers.Tokenizer:
    """A byte-level BPE trained on the little corpus."""
    core = tokenizers.Tokenizer(models.BPE(**model))
    core.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIALS if specials is None else specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return core


def sentencepiece_vocabulary() -> tuple[list[str], list[int], list[float]]:
    """Tokens, types and scores of a little sentencepiece vocabulary, as a GGUF file holds them."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=260, show_progress=False))
    learnt = [token for token, _ in sorted(core.get_vocab().items(), key=lambda item: item[1])]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt]
    types = [2, 3, 3, *[6] * 256, *[1] * len(learnt)]
    return tokens, types, [0.0] * 259 + [-float(rank) for rank in range(len(learnt))]


# Surrogates cannot be encoded; the tested vocabularies hold every other character.
plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
TRICKY = [
    "<|im_start|>",
    "<|im_end|>",
    "<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>",
    "<|im_",
    "end|>",
    "\x1e",
    "\x1f",
    "\ue000",
    "\ue001\ue000",
    " ",
    "\n",
    "\u2028",
    "[/INST]",
    "{{ messages }}",
    "Hallo wereld 25",
    "it's",
    "👩‍👩‍👧",
]
tricky_text = st.lists(st.sampled_from(TRICKY) | plain_text, max_size=5).map("".join)
visible_text = tricky_text.map(lambda text: "a" + text + "b")


ordinary_text = st.from_regex(r"[A-Za-zé0-9 ,.!?]{1,20}[.?]", fullmatch=True).map(str.strip)


@st.composite
def conversations(
    draw: st.DrawFn,
    content: st.SearchStrategy[str] = tricky_text,
    system: st.SearchStrategy[str] = visible_text,
) -> list[dict[str, Any]]:
    """One to three exchanges, with or without a system prompt."""
    messages = [{"role": "system", "content": draw(system)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": role, "content": draw(content)} for role in ("user", "assistant")]
    return messages
