import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from text_samples import CONFIG, TEMPLATES, train_core

import puna
from puna.core.errors import PunaError
from puna.model.adapters import LoraSettings, add_lora
from puna.text import pretrained
from puna.text.encode import encode_messages
from puna.text.template import CHATML, Template
from puna.text.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "Hoi, 12?"}, {"role": "assistant", "content": "Dag, €5."}]


@pytest.fixture
def model(tiny_llama: Callable[..., Any]) -> Any:
    """A tiny chat model whose template ends turns with another token than the EOS."""
    made = tiny_llama(vocab_size=384)
    made.tokenizer = Tokenizer(train_core(), {**CONFIG, "eos_token": "<|endoftext|>"})
    made.template = Template(TEMPLATES["default system prompt"], made.tokenizer.template_strings)
    return made.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.tensor([[1, 5, 9, 200, 30]]))
    return result


def same(loaded: Any, model: Any) -> None:
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.tokenizer.fingerprint == model.tokenizer.fingerprint
    assert loaded.template.fingerprint == model.template.fingerprint


def test_a_saved_folder_opens_as_the_same_model(model: Any, tmp_path: Path) -> None:
    assert puna.save(model, tmp_path / "out") == tmp_path / "out"
    loaded = puna.load(tmp_path / "out")
    same(loaded, model)
    assert loaded.source == str(tmp_path / "out")
    assert (loaded.spec.bos_id, loaded.spec.eos_ids, loaded.spec.pad_id) == (0, (0, 2), 0)
    assert loaded.tokenizer.stop_ids == (0, 2)


def test_transformers_opens_the_folder_with_the_same_ids_chat_and_logits(model: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    puna.save(model, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype=torch.float32)
    fast = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(torch.tensor([[1, 5, 9, 200, 30]])).logits, logits(model), atol=1e-5, rtol=0
        )
    assert fast.apply_chat_template(MESSAGES, tokenize=False) == model.template.render(MESSAGES)
    ours = encode_messages(model.tokenizer, model.template, MESSAGES).ids
    assert fast.apply_chat_template(MESSAGES)["input_ids"] == ours
    assert theirs.generation_config.eos_token_id == [0, 2]
    assert (theirs.generation_config.bos_token_id, theirs.generation_config.pad_token_id) == (0, 0)


def test_a_gguf_opens_with_the_same_tokenizer_and_template(model: Any, tmp_path: Path) -> None:
    file = puna.save(model, tmp_path / "out", "gguf", kind="f16")
    assert file == tmp_path / "out" / "model-f16.gguf"
    assert puna.save(model, tmp_path / "named.gguf", "gguf") == tmp_path / "named.gguf"
    loaded = puna.load(file)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-3, rtol=0)
    text = "Zoë's café: €12,50\n\n  <|im_end|>"
    assert loaded.tokenizer.encode(text) == model.tokenizer.encode(text)
    assert loaded.tokenizer.strings == model.tokenizer.strings
    assert loaded.template.source == model.template.source
    assert loaded.spec.eos_ids == (0, 2)


@pytest.mark.parametrize("relative", [False, True])
def test_an_adapter_opens_on_its_base(model: Any, tmp_path: Path, relative: bool) -> None:
    puna.save(model, tmp_path / "base")
    tuned = puna.load(tmp_path / "base")
    add_lora(tuned, LoraSettings(r=2, alpha=4, dropout=0.0), seed=1)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(5))
    puna.save(tuned, tmp_path / "adapter", "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    if relative:
        config["base_model_name_or_path"] = "../base"
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    loaded = puna.load(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(tuned), atol=1e-6, rtol=0)
    assert not torch.equal(logits(loaded), logits(model))
    assert loaded.source == str(tmp_path / "adapter")
    assert loaded.template.fingerprint == model.template.fingerprint
    again = puna.save(loaded, tmp_path / "again", "adapter")
    assert json.loads((again / "adapter_config.json").read_text()) == config


def adapter_on_a_saved_base(model: Any, base: Path) -> Any:
    puna.save(model, base)
    tuned = puna.load(base)
    add_lora(tuned, LoraSettings(r=2, alpha=4, dropout=0.0), seed=1)
    return tuned


def test_a_run_with_a_base_and_its_adapter_can_be_moved(model: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tuned = adapter_on_a_saved_base(model, run / "swap" / "model")
    puna.save(tuned, run / "lora" / "adapter", "adapter", within=run)
    run.rename(tmp_path / "moved")
    loaded = puna.load(tmp_path / "moved" / "lora" / "adapter")
    assert torch.equal(logits(loaded), logits(tuned))
    puna.save(loaded, tmp_path / "elsewhere" / "adapter", "adapter")  # named from there now
    assert torch.equal(logits(puna.load(tmp_path / "elsewhere" / "adapter")), logits(tuned))


def test_a_base_outside_the_run_is_named_by_its_whole_path(model: Any, tmp_path: Path) -> None:
    tuned = adapter_on_a_saved_base(model, tmp_path / "base")
    puna.save(tuned, tmp_path / "run" / "adapter", "adapter", within=tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert pretrained.base_of(tmp_path / "moved" / "adapter") == tmp_path / "base"


@pytest.mark.parametrize("within", [True, False])
def test_a_base_that_is_gone_is_told_with_where_it_was_looked_for(
    model: Any, tmp_path: Path, within: bool
) -> None:
    tuned = adapter_on_a_saved_base(model, tmp_path / "base")
    puna.save(tuned, tmp_path / "adapter", "adapter", within=tmp_path if within else None)
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(PunaError, match="the base model of this adapter is not there") as error:
        puna.load(tmp_path / "adapter")
    assert f"looked for {tmp_path / 'base'}" in str(error.value.found)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "no/such/base"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(PunaError, match="the base model of this adapter is not there") as error:
        puna.load(tmp_path / "adapter")
    assert f"looked for {tmp_path / 'adapter' / 'no/such/base'}; tried it as" in str(error.value.found)


def test_an_adapter_keeps_the_stop_tokens_of_its_base(model: Any, tmp_path: Path) -> None:
    model.tokenizer = model.tokenizer.with_stop_tokens(["<|im_start|>"])
    tuned = adapter_on_a_saved_base(model, tmp_path / "base")
    assert tuned.spec.eos_ids == (0, 1, 2)
    puna.save(tuned, tmp_path / "adapter", "adapter")
    assert puna.load(tmp_path / "adapter").spec.eos_ids == (0, 1, 2)


def test_stop_tokens_of_the_config_count_where_there_is_no_generation_config(
    model: Any, tmp_path: Path
) -> None:
    puna.save(model, tmp_path / "out")
    (tmp_path / "out" / "generation_config.json").unlink()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "eos_token_id": [0, 1, 2]}))
    loaded = puna.load(tmp_path / "out")
    assert loaded.spec.eos_ids == loaded.tokenizer.stop_ids == (0, 1, 2)
    puna.save(loaded, tmp_path / "again")
    assert puna.load(tmp_path / "again").spec.eos_ids == (0, 1, 2)


@pytest.mark.parametrize("as_adapter", [False, True])
def test_special_ids_can_be_given_on_loading(model: Any, tmp_path: Path, as_adapter: bool) -> None:
    tuned = adapter_on_a_saved_base(model, tmp_path / "out")
    puna.save(tuned, tmp_path / "adapter", "adapter")
    source = tmp_path / ("adapter" if as_adapter else "out")
    loaded = puna.load(source, eos_ids=(1, 5), pad_id=2, bos_id=1)
    for _ in range(2):  # saving changes nothing
        spec, tokenizer = loaded.spec, loaded.tokenizer
        assert (spec.bos_id, spec.eos_ids, spec.pad_id) == (1, (1, 5), 2)
        assert (tokenizer.bos_id, tokenizer.stop_ids, tokenizer.pad_id) == (1, (1, 5), 2)
        puna.save(loaded, tmp_path / "saved", "adapter" if as_adapter else "hf")
    assert tokenizer.encode("<|im_start|> kat") == model.tokenizer.encode("<|im_start|> kat")
    assert puna.load(source, eos_ids=(0,)).spec.eos_ids == (0,)
    assert puna.load(source, pad_id=None).spec.pad_id == 0  # the EOS pads
    if not as_adapter:
        again = puna.load(tmp_path / "saved")
        assert again.spec.bos_id == 1 and again.spec.pad_id == 2 and {1, 5} <= set(again.spec.eos_ids)
    with pytest.raises(PunaError, match="needs a token to end with"):
        puna.load(source, eos_ids=())
    with pytest.raises(PunaError, match="not a token of this"):
        puna.load(source, pad_id=383)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_bos_can_be_changed_or_taken_away(adds_bos: bool) -> None:
    tokenizer = Tokenizer(train_core(), {**CONFIG, "add_bos_token": adds_bos})
    other, without = (tokenizer.with_special_ids({"bos_id": token}) for token in (1, None))
    assert (other.bos_id, other.adds_bos, without.bos_id, without.adds_bos) == (1, adds_bos, None, False)
    for made, expected in ((other, [1] if adds_bos else []), (without, [])):
        core = type(made.core).from_str(made.to_json())  # what transformers makes of the file
        assert core.encode("", add_special_tokens=True).ids == expected
    assert tokenizer.with_special_ids({}) is tokenizer


def test_a_template_beside_an_adapter_takes_precedence(model: Any, tmp_path: Path) -> None:
    puna.save(model, tmp_path / "base")
    tuned = puna.load(tmp_path / "base")
    add_lora(tuned, LoraSettings(r=2, alpha=4, dropout=0.0), seed=1)
    tuned.template = Template(CHATML, tuned.tokenizer.template_strings)
    puna.save(tuned, tmp_path / "adapter", "adapter")
    assert puna.load(tmp_path / "adapter").template.source == CHATML


def test_a_folder_without_a_tokenizer_gives_a_model_without_one(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    bare = tiny_llama()
    puna.save(bare, tmp_path / "bare")
    loaded = puna.load(str(tmp_path / "bare"))
    assert loaded.tokenizer is None
    assert loaded.template is None
    assert loaded.spec == bare.spec
    with pytest.raises(PunaError, match="needs a tokenizer"):
        puna.save(loaded, tmp_path / "x.gguf", "gguf")


def test_a_path_comes_before_an_asset_of_its_name(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained.assets, "fetch", lambda name: tmp_path / "fetched" / name)
    name = "smollm2-135m-instruct"
    assert pretrained.locate(name) == tmp_path / "fetched" / name
    puna.save(model, tmp_path / name)
    assert pretrained.locate(name) == Path(name)
    assert puna.load(name).source == str(tmp_path / name)


def test_a_template_is_not_invented_without_its_tokens(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    plain = tiny_llama(vocab_size=384)
    plain.tokenizer = Tokenizer(train_core(specials=["</s>"]), {"eos_token": "</s>"})
    puna.save(plain, tmp_path / "plain")
    loaded = puna.load(tmp_path / "plain")
    assert loaded.template is None
    assert loaded.spec.eos_ids == (0,)
    assert loaded.spec.bos_id is None


def test_dtype_and_spec_can_be_chosen(model: Any, tmp_path: Path) -> None:
    puna.save(model, tmp_path / "out")
    assert puna.load(tmp_path / "out", dtype="bfloat16").dtype == torch.bfloat16
    assert puna.load(tmp_path / "out", dtype=torch.float16).dtype == torch.float16
    assert puna.load(tmp_path / "out", max_positions=64).spec.max_positions == 64


def test_saving_again_replaces_the_checkpoint_whole(model: Any, tmp_path: Path) -> None:
    puna.save(model, tmp_path / "out")
    (tmp_path / "out" / "left over.txt").write_text("old")
    puna.save(model, tmp_path / "out")
    assert not (tmp_path / "out" / "left over.txt").exists()
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }


def test_a_checkpoint_with_folders_beside_it_is_not_replaced(model: Any, tmp_path: Path) -> None:
    puna.save(model, tmp_path / "out")
    (tmp_path / "out" / "thesis").mkdir()
    with pytest.raises(PunaError, match="would be replaced"):
        puna.save(model, tmp_path / "out")
    assert (tmp_path / "out" / "thesis").is_dir()


@pytest.mark.smollm
def test_the_asset_opens_with_everything_set(smollm: Any) -> None:
    assert smollm.source == "smollm2-135m-instruct"
    assert smollm.tokenizer.vocab_size == smollm.spec.vocab_size == 49152
    assert smollm.template.end_of_turn == "<|im_end|>"
    assert (smollm.spec.bos_id, smollm.spec.eos_ids, smollm.spec.pad_id) == (1, (2,), 2)


class TestHub:
    """The hub's client is stood in for; what is tested is what is asked of it and made of its answer."""

    def test_a_hub_id_is_downloaded(
        self, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        huggingface_hub = pytest.importorskip("huggingface_hub")
        puna.save(model, tmp_path / "snapshot")
        asked: list[tuple[str, list[str]]] = []

        def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
            asked.append((name, allow_patterns))
            return str(tmp_path / "snapshot")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        loaded = puna.load("someone/some-model")
        same(loaded, model)
        assert loaded.source == "someone/some-model"
        assert asked[0][0] == "someone/some-model"
        assert not any(pattern.endswith((".bin", ".pt")) for pattern in asked[0][1])

    def test_without_an_answer_the_error_says_what_was_tried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        huggingface_hub = pytest.importorskip("huggingface_hub")

        def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
            raise ConnectionError("no route to the hub")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        with pytest.raises(
            PunaError, match=r"as a path .* as an asset and on a model hub \(ConnectionError: no route"
        ):
            puna.load("someone/some-model")
        with pytest.raises(PunaError, match="did you mean 'smollm2-135m-instruct'"):
            puna.load("smollm2-135m-instuct")


class TestRefusals:
    @pytest.mark.parametrize("source", [Path("nowhere"), "nowhere.gguf", "a/b/c", "./nowhere"])
    def test_a_source_that_is_nowhere(self, source: Any) -> None:
        with pytest.raises(PunaError, match=r"no model '(\./)?(nowhere|a/b/c)"):
            puna.load(source)

    def test_a_tokenizer_larger_than_the_embedding(self, model: Any, tmp_path: Path) -> None:
        puna.save(model, tmp_path / "out")
        Tokenizer(train_core(specials=[f"<{n}>" for n in range(300)], size=600), {"eos_token": "<0>"}).save(
            tmp_path / "out"
        )
        with pytest.raises(PunaError, match="tokenizer is larger than the embedding"):
            puna.load(tmp_path / "out")

    def test_an_unknown_dtype_or_format(self, model: Any, tmp_path: Path) -> None:
        puna.save(model, tmp_path / "out")
        with pytest.raises(PunaError, match="did you mean 'float32'"):
            puna.load(tmp_path / "out", dtype="flot32")
        with pytest.raises(PunaError, match="unknown format"):
            puna.save(model, tmp_path / "out", "onnx")  # type: ignore[arg-type]

    def test_a_folder_that_holds_something_else_is_not_replaced(self, model: Any, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("mine")
        with pytest.raises(PunaError, match="would be replaced"):
            puna.save(model, tmp_path)
        with pytest.raises(PunaError, match="a file of this name"):
            puna.save(model, tmp_path / "thesis.tex")
        assert (tmp_path / "thesis.tex").read_text() == "mine"

    def test_an_adapter_of_a_model_from_nowhere(self, model: Any, tmp_path: Path) -> None:
        add_lora(model, LoraSettings(r=2, alpha=4, dropout=0.0), seed=1)
        with pytest.raises(PunaError, match="must name its base"):
            puna.save(model, tmp_path / "adapter", "adapter")

    def test_an_adapter_that_names_no_base(self, model: Any, tmp_path: Path) -> None:
        folder = tmp_path / "adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        with pytest.raises(PunaError, match="does not say which model"):
            pretrained.load(folder)
