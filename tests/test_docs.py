"""The documentation: links lead somewhere, examples run, and the tests, commands and keys it names exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main

import puna
from puna.cli import app
from puna.core import assets, stage
from puna.data.curate import operator
from puna.model.gguf_header import STORAGE
from puna.model.spec import RopeKind
from puna.run import docs
from puna.run.recipe import Claim, Header, Scale

ROOT = Path(puna.__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
READ = [*PAGES, *(file for file in [ROOT / "README.md"] if file.is_file())]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAMED_TEST = re.compile(r"tests/[\w/]+\.py(?:::\w+)*")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """Line and text of each code block in a language."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        if match[1] == language:
            yield text.count("\n", 0, match.start(2)) + 1, match[2]


@cache
def anchors(page: Path) -> set[str]:
    """The fragments under which GitHub shows a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", READ, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    """A page that `make docs` writes counts; tests/run/test_docs_generated.py asks if it is fresh."""
    generated = docs.pages()
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() or target in generated, f"{link} leads nowhere"
        if fragment and target.is_file() and target.suffix == ".md":
            assert fragment in anchors(target), f"{link}: no such heading"


def test_the_map_leads_to_every_page() -> None:
    linked = set(LINK.findall(prose(ROOT / "docs" / "index.md")))
    missing = [page.name for page in PAGES if page.parent.name == "docs" and page.name not in linked]
    assert missing == ["index.md"]


@pytest.mark.parametrize("page", READ, ids=name_of)
def test_every_test_that_is_named_exists(page: Path) -> None:
    for named in NAMED_TEST.findall(page.read_text(encoding="utf-8")):
        file, *parts = named.split("::")
        assert (ROOT / file).is_file(), f"{named}: no such file"
        text = (ROOT / file).read_text(encoding="utf-8")
        for part in parts:
            assert re.search(rf"^\s*(?:def|class) {part}\b", text, re.MULTILINE), f"{named}: no such test"


@pytest.mark.parametrize("page", READ, ids=name_of)
def test_every_command_can_be_parsed(page: Path) -> None:
    """Verbs, options and the number of arguments are those of the command line; nothing is run."""
    group: Any = typer.main.get_command(app)
    for line, text in blocks(page, "sh"):
        for command in text.replace("\\\n", " ").splitlines():
            words = shlex.split(command, comments=True)
            if words[:1] != ["puna"]:
                continue
            context, current = group.make_context("puna", ["doctor"]), group
            rest = words[1:]
            while hasattr(current, "commands"):
                found = current.get_command(context, rest[0]) if rest else None
                assert found is not None, f"line {line}: {command}"
                current, rest = found, rest[1:]
            current.make_context(words[1], rest)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, where the asset of a real model is a tiny one that chats."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from puna.model.llama import Llama
    from puna.model.spec import BlockSpec, LlamaSpec
    from puna.text.template import CHATML_TOKENS, find_template
    from puna.text.tokenizer import Tokenizer

    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", *CHATML_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the cat sat on the mat, and the other cat sat on that hat"] * 9, trainer)
    start, end = CHATML_TOKENS
    roles = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": "<|endoftext|>"}
    tokenizer = Tokenizer(core, roles)
    block = BlockSpec(heads=4, kv_heads=2, head_dim=16, width=96)
    spec = LlamaSpec(tokenizer.vocab_size, 64, (block, block), tied=True, max_positions=256)
    model: Any = Llama(spec)
    model.tokenizer, model.template = tokenizer, find_template(tokenizer)
    puna.save(model, tmp_path / "asset")
    monkeypatch.setattr(assets, "fetch", lambda name: tmp_path / "asset")
    # What an example registers goes with it.
    monkeypatch.setattr(stage, "_STAGES", stage.all_stages())
    operator.all_operators()  # Puna's own are registered once, for good.
    monkeypatch.setattr(operator, "_OPERATORS", dict(operator._OPERATORS))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def examples(page: Path) -> list[tuple[int, str]]:
    return [(line, text) for line, text in blocks(page, "python") if text.startswith("# tested\n")]


@pytest.mark.parametrize("page", [page for page in READ if examples(page)], ids=name_of)
def test_examples_run(page: Path, place: Path) -> None:
    """The examples of a page run one after another, as somebody would who types them in."""
    names: dict[str, Any] = {"__name__": "example"}
    for line, text in examples(page):
        code = compile("\n" * (line - 1) + text, name_of(page), "exec")
        exec(code, names)


def test_recipes_explains_every_key() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for model in (Header, Scale, Claim):
        for key in model.model_fields:
            assert f"| `{key}` |" in text, f"{model.__name__}.{key}"


def test_support_names_everything_that_can_be_chosen() -> None:
    from puna.data.sources import SOURCES
    from puna.text.gguf_vocabulary import RULES
    from puna.train.objectives import OBJECTIVES

    text = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    formats = [source.format for source in SOURCES.values()]
    storage = [kind.name for kind in STORAGE.values()]
    rules = [rule.names[0] for rule in RULES]
    stages = [
        name for name, found in stage.all_stages().items() if found.function.__module__.startswith("puna.")
    ]  # without those that other tests registered
    names = [*formats, *storage, *rules, *get_args(RopeKind), *OBJECTIVES, *stages]
    missing = [name for name in names if f"`{name}`" not in text]
    assert not missing
