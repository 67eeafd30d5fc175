from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import puna
from puna.core.errors import PunaError
from puna.core.hardware import release_memory
from puna.decode.feed_forward_skipping import write_plan
from puna.decode.sampling import Sampling
from puna.model.adapters import LoraSettings, add_lora
from puna.model.feed_forward_skip import SkipPlan
from puna.model.llama import Llama
from puna.model.spec import BlockSpec, LlamaSpec
from puna.serve.catalog import open_catalog
from puna.serve.heads import Heads
from tests.serve.little_server import live, tiny_model

OPEN: dict[str, Any] = {"dtype": "float32", "device": "cpu", "engine": {"cache_tokens": 2048}}


@pytest.fixture(scope="module")
def saved(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model and an adapter of it, as folders."""
    root = tmp_path_factory.mktemp("models")
    model = tiny_model(tiny_tokenizer)
    puna.save(model, root / "base")
    model = puna.load(root / "base")
    add_lora(model, LoraSettings(r=4), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    puna.save(model, root / "adapter", format="adapter")
    return {"base": str(root / "base"), "adapter": str(root / "adapter")}


def test_adapters_answer_under_their_own_names(saved: dict[str, str]) -> None:
    catalog = open_catalog({"base": saved["base"]}, {"dutch": saved["adapter"]}, {}, **OPEN)
    expected = {
        name: puna.Engine(puna.load(saved[source])).generate(["the cat"], Sampling(max_tokens=8))[0].text
        for name, source in (("base", "base"), ("dutch", "adapter"))
    }
    assert expected["base"] != expected["dutch"]
    with live(catalog) as server:
        cards = server.http.get("/v1/models").json()["data"]
        assert [(card["id"], card["parent"]) for card in cards] == [("base", None), ("dutch", "base")]
        for name, text in expected.items():
            assert server.completion(model=name)["choices"][0]["text"] == text
        # Everything but the seven projections of each layer is held once.
        base, dutch = cards
        assert base["weight_bytes"] == dutch["weight_bytes"] == base["held_bytes"] > dutch["held_bytes"]
        told = server.http.get("/metrics").text
        assert f'puna_engine_held_bytes{{model="dutch"}} {float(dutch["held_bytes"])}' in told


def test_what_an_adapter_was_added_to_is_let_go_once_it_is_packed(saved: dict[str, str]) -> None:
    """The base stays as a whole, and so does what the plain stepper runs on."""
    catalog = open_catalog(
        {"base": saved["base"]}, {"dutch": saved["adapter"]}, {"draft": saved["base"]}, **OPEN
    )
    for served in catalog.values():
        target, draft = served.engine.models.values()
        gone = {name for name, parameter in target.model.named_parameters() if parameter.is_meta}
        adapted = {name for name, _ in target.model.named_parameters() if "_proj." in name}
        packed = served.parent is not None and served.engine.kernels == "native"
        assert gone == (adapted if packed else set())
        assert not any(parameter.is_meta for parameter in draft.model.parameters())
    settings = {**OPEN, "engine": {**OPEN["engine"], "kernels": "plain"}}
    plain = open_catalog({"base": saved["base"]}, {"dutch": saved["adapter"]}, {}, **settings)
    for served in plain.values():
        assert not any(parameter.is_meta for parameter in served.engine.model.parameters())
    assert plain["dutch"].engine.held_bytes < plain["base"].engine.held_bytes


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells what a process has")
def test_adapters_take_the_memory_that_they_are_said_to_hold(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """What each was merged into goes back to the system: kept, it would be the whole model four times."""
    block = BlockSpec(heads=8, kv_heads=8, head_dim=64, width=1536)
    model = Llama(LlamaSpec(tiny_tokenizer.vocab_size, 512, (block,) * 6, tied=True, max_positions=256))
    model.tokenizer = tiny_tokenizer
    whole = sum(parameter.nbytes for parameter in model.parameters())
    puna.save(model, tmp_path / "base")
    model = puna.load(tmp_path / "base")
    add_lora(model, LoraSettings(r=1), seed=0)
    puna.save(model, tmp_path / "adapter", format="adapter")
    del model
    release_memory()
    before = resident()
    adapters = {name: str(tmp_path / "adapter") for name in "abcd"}
    settings = {**OPEN, "engine": {"cache_tokens": 256, "quantize": "int4"}}
    catalog = open_catalog({"base": str(tmp_path / "base")}, adapters, {}, **settings)
    if catalog["a"].engine.kernels != "native":
        pytest.skip("without a compiler the merged matrices are what runs")
    held = sum(served.engine.held_bytes for served in catalog.values())
    assert held < whole
    assert resident() - before < whole + held + 0.5 * whole


@pytest.mark.parametrize(
    ("models", "adapters", "says"),
    [
        (["base"], {"base": "adapter"}, "same name"),
        (["base"], {"dutch": "base"}, "adapter"),
        (["base"], {"dutch": "nowhere"}, "adapter"),
        ([], {}, "no model"),
    ],
)
def test_what_cannot_be_served_is_told_before_it_is_served(
    saved: dict[str, str], models: list[str], adapters: dict[str, str], says: str
) -> None:
    with pytest.raises(PunaError, match=says):
        open_catalog(
            {name: saved[name] for name in models},
            {name: saved.get(source, source) for name, source in adapters.items()},
            {},
            **OPEN,
        )


def test_a_strategy_uses_its_companion_and_its_head(saved: dict[str, str], tmp_path: Path) -> None:
    """Drafts of the same model are all taken; the accounting says so, and the text is the plain one."""
    from puna.decode.acceptance import KIND
    from puna.decode.heads import Head, HeadSpec, save_head

    head = save_head(Head(HeadSpec(48), about={"kind": KIND}), tmp_path / "head.safetensors")
    catalog = open_catalog({"base": saved["base"]}, {}, {"draft": saved["base"]}, **OPEN)
    with live(catalog, heads={"accept": str(head)}) as server:
        cards = {card["name"]: card for card in server.http.get("/v1/strategies").json()["data"]}
        lacking = {name for name, card in cards.items() if card["missing"]}
        assert lacking == {"entropy-switching", "nudging", "judge-decoding"}
        assert cards["specdec-pp"]["example"] == {"head": "accept"}
        plain = server.completion(model="base", max_tokens=12)["choices"][0]
        for chosen in (
            "speculative",
            {"name": "speculative", "settings": {"draft_tokens": 3}},
            {"name": "specdec-pp", "settings": {"head": "accept"}},
        ):
            found = server.completion(model="base", max_tokens=12, strategy=chosen, trace=True)["choices"][0]
            told = found["puna"]
            assert found["text"] == plain["text"]
            assert told["lossless"] is True
            assert told["accounting"]["accepted"] == told["accounting"]["judged"] > 0
            assert set(told["accounting"]["sources"]) == {"draft", "target"}
            assert {token["source"] for token in told["trace"]} == {"draft", "target"}
        refused = server.post(
            "/v1/completions",
            model="base",
            prompt="a",
            strategy={"name": "speculative", "settings": {"draft": "other"}},
        )
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert "unknown model of the engine 'other'" in error["message"]
        assert "--companion other=MODEL" in error["message"]
        assert error["param"] == "strategy"


def test_each_strategy_is_offered_the_files_that_fit_it_and_no_error_tells_where_they_are(
    saved: dict[str, str], tmp_path: Path
) -> None:
    from puna.decode.heads import Head, HeadSpec, save_head

    files = {"skips": str(write_plan(SkipPlan(None, 0.0, (), "nothing to skip"), tmp_path / "plan.json"))}
    for kind in ("acceptance", "judge"):
        file = save_head(Head(HeadSpec(48), about={"kind": kind}), tmp_path / f"{kind}.safetensors")
        files[f"my-{kind}"] = str(file)
    catalog = open_catalog({"base": saved["base"]}, {}, {"draft": saved["base"]}, **OPEN)
    with live(catalog, heads=files) as server:
        cards = {card["name"]: card for card in server.http.get("/v1/strategies").json()["data"]}
        for name, key, fitting in (
            ("specdec-pp", "head", ["my-acceptance"]),
            ("judge-decoding", "head", ["my-judge"]),
            ("feed-forward-skip", "plan", ["skips", None]),
        ):
            assert cards[name]["settings"]["properties"][key]["enum"] == fitting
            assert cards[name]["example"] == {key: fitting[0]}
            for given in files:
                chosen = {"name": name, "settings": {key: given}}
                answer = server.post(
                    "/v1/completions", model="base", prompt="a", max_tokens=3, strategy=chosen
                )
                assert answer.status_code == (200 if given in fitting else 400)
                assert str(tmp_path) not in answer.text
                if given not in fitting:
                    message = f"unknown {key} of {name} '{given}'"
                    assert message in answer.json()["error"]["message"]


def test_a_file_that_no_strategy_reads_is_told_when_the_server_starts(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    for file in ("other.json", "nothing"):
        with pytest.raises(PunaError, match="no strategy can use this file") as caught:
            Heads({"mine": str(tmp_path / file)})
        assert str(caught.value.where) == f"--head mine={tmp_path / file}"


def test_the_commands_start_and_stop_a_server(saved: dict[str, str], tmp_path: Path) -> None:
    """``puna ui`` in a process of its own: it says where it is, answers, and ends with 0."""
    import re
    import subprocess
    import sys

    import httpx

    words = [sys.executable, "-m", "puna.cli", "ui", f"mine={saved['base']}", "--port", "0"]
    words += ["--adapter", f"dutch={saved['adapter']}", "--runs", str(tmp_path), "--set", "max_tokens=5"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    try:
        told = process.stdout.readline() + process.stdout.readline()
        found = re.search(r"serving mine, dutch at (http://127\.0\.0\.1:\d+)/v1\n.* (\S+/ui/)\n", told)
        assert found is not None, told + process.stderr.read()
        assert httpx.get(found[2]).status_code == 200
        assert [card["id"] for card in httpx.get(f"{found[1]}/v1/models").json()["data"]] == ["mine", "dutch"]
        body = {"model": "mine", "prompt": "a", "max_tokens": 6}
        assert httpx.post(f"{found[1]}/v1/completions", json=body).json()["error"]["code"] == "beyond_bound"
    finally:
        process.terminate()
    assert process.wait(20) == 0, process.stderr.read()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["serve", "mine=nowhere.gguf"], "no model 'nowhere.gguf'"),
        (["serve", "smollm2-135m-instruct", "--set", "max_queue=none"], "max_queue"),
        (["serve", "smollm2-135m-instruct", "--adapter", "dutch"], "NAME=path"),
        (["serve", "smollm2-135m-instruct", "--port", "99999"], "port"),
        (["ui", "smollm2-135m-instruct", "--host", "no.such.host.invalid"], "cannot listen"),
    ],
)
def test_mistakes_on_the_command_line(
    words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from puna import cli

    monkeypatch.setattr("sys.argv", ["puna", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from puna.serve.run import need_extra

    find: Callable[[str], Any] = lambda name: None  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", find)
    with pytest.raises(PunaError, match="not installed") as caught:
        need_extra()
    assert "puna[serve]" in str(caught.value.fix)
