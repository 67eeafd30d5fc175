"""The stage ``forgetting``: versions of a model in the order of time, everything paired, one report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import puna
from puna.core.errors import PunaError
from puna.core.stage import Context, get_stage, validate
from puna.data.corpus import write_corpus
from puna.evaluate import responses
from puna.evaluate.distances import distances
from puna.model.adapter_files import write_adapter
from puna.model.adapters import LoraSettings, add_lora
from puna.text import stored_weights
from puna.text.encode import encode_rows
from puna.text.stored_weights import Weights
from puna.text.template import Template

CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
ABOUT: dict[str, Any] = {"provenance": [{"source": "s", "licence": "CC0"}], "ledger": {}}
TEXTS = ["the cat sat on the mat", "and then it went in", "that other cat", "on it in the end"]
ANSWERS = ["cat", "mat", "cat", "the end", "mat", "cat"]


def talk(number: int, answer: str) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": f"what sat on the mat {'again ' * number}"},
        {"role": "assistant", "content": answer},
    ]
    return {"id": f"c{number}", "messages": messages, "source": "s", "language": "en"}


@pytest.fixture
def inputs(tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> dict[str, Any]:
    """Versions whose weights drift from the first one's by 3% and 10%; documents and conversations."""
    models = {}
    for name, drift in (("before", 0.0), ("middle", 0.03), ("after", 0.1)):
        model = tiny_llama(max_position_embeddings=128)
        with torch.no_grad():
            for parameter, other in zip(model.parameters(), tiny_llama(seed=5).parameters(), strict=True):
                parameter.mul_(20.0 if parameter.ndim > 1 else 1.0).add_(20 * drift * other)
        model.tokenizer = tiny_tokenizer
        model.template = Template(CHAT, tiny_tokenizer.template_strings)
        models[name] = str(puna.save(model, tmp_path / name))
    rows = [{"id": f"d{n}", "text": text, "source": "s", "language": "en"} for n, text in enumerate(TEXTS)]
    talks = [talk(number, answer) for number, answer in enumerate(ANSWERS)]
    corpora = {
        "pages": str(write_corpus(tmp_path / "pages", "documents", rows, **ABOUT).path),
        "quiz": str(write_corpus(tmp_path / "quiz", "messages", talks, **ABOUT).path),
    }
    return {"models": models, "corpora": corpora}


def run(tmp_path: Path, inputs: dict[str, Any], **settings: Any) -> tuple[dict[str, float], dict[str, Any]]:
    stage = get_stage("forgetting")
    (tmp_path / "out").mkdir(exist_ok=True)
    context = Context("forgetting", tmp_path / "out", inputs, dtype="float32")
    parameters = validate(stage.parameters, {"draws": 100, **settings}, where="test")
    return stage.function(context, parameters).metrics, context.report


def test_versions_are_compared_with_the_first_and_with_the_one_before(
    tmp_path: Path, inputs: dict[str, Any]
) -> None:
    found, report = run(
        tmp_path, inputs, tasks={"quiz": []}, untouched=["pages"], prompts=["the cat"], sample_tokens=4
    )
    assert found["forgetting.after"] == found["change.pages.after"]
    assert found["change.pages.after.vs.middle"] == pytest.approx(
        found["bpb.pages.after"] / found["bpb.pages.middle"] - 1
    )
    for pair, (old, new) in {"after": ("before", "after"), "after.vs.middle": ("middle", "after")}.items():
        fell = found[f"accuracy.quiz.{old}"] - found[f"accuracy.quiz.{new}"]
        assert fell == pytest.approx(found[f"nfr.quiz.{pair}"] - found[f"pfr.quiz.{pair}"])
        assert found[f"nfr_mc.quiz.{pair}"] >= found[f"nfr.quiz.{pair}"]
        ratio = found[f"response_loss.quiz.{new}"] / found[f"response_loss.quiz.{old}"]
        assert found[f"response_change.quiz.{pair}"] == pytest.approx(ratio - 1)
        assert found[f"risen.pages.{pair}"] == found[f"better.pages.{pair}"]
    assert 0 < found["distance.middle"] < found["distance.after"]
    titles = [table["title"] for table in report["tables"]]
    assert titles[0] == "Before and after" and titles[-1] == "Distance of the weights from before"
    assert {"Conversations", "Flips", "Forgetting"} < set(titles)
    assert all(len(row) == len(table["columns"]) for table in report["tables"] for row in table["rows"])
    curves = {curve["title"]: curve for curve in report["curves"]}
    assert [part["name"] for part in curves["Distance from before by layer"]["series"]] == ["middle", "after"]
    over_time = curves["Bits per byte over time"]
    assert over_time["x"] == "0 before, 1 middle, 2 after"
    assert over_time["series"][0]["y"] == [
        found[f"bpb.pages.{name}"] for name in ("before", "middle", "after")
    ]
    assert list(report["samples"][0]["outputs"]) == ["before", "middle", "after"]
    assert json.loads(json.dumps(report)) == report
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["quiz"]["choices"] == ["cat", "mat", "the end"]
    said, gold = scores["quiz"]["models"]["after"]["said"], scores["quiz"]["gold"]
    right = [one == other for one, other in zip(said, gold, strict=True)]
    assert sum(right) / len(right) == pytest.approx(found["accuracy.quiz.after"])


def test_a_version_beside_itself_has_forgotten_nothing(tmp_path: Path, inputs: dict[str, Any]) -> None:
    same = {"models": {"one": inputs["models"]["after"], "same": inputs["models"]["after"]}}
    found, _ = run(tmp_path, {**inputs, **same}, tasks={"quiz": []}, tokens={"one": 0, "same": 1e6})
    for name in ("change.pages", "response_change.quiz", "nfr.quiz", "pfr.quiz", "nfr_mc.quiz"):
        assert found[f"{name}.same"] == found[f"{name}.same.low"] == found[f"{name}.same.high"] == 0
    for name in ("distance", "risen.quiz", "fallen.pages", "gain.pages", "regression.quiz"):
        assert found[f"{name}.same"] == 0
    assert "change.pages.same.vs.one" not in found


def test_conversations_alone_make_a_report(tmp_path: Path, inputs: dict[str, Any]) -> None:
    talks = {**inputs, "corpora": {"quiz": inputs["corpora"]["quiz"]}}
    found, report = run(
        tmp_path, talks, conversations=4, distances=False, tokens={"before": 0, "middle": 5, "after": 9}
    )
    assert not any(name.startswith(("distance", "bpb", "accuracy")) for name in found)
    assert [item["title"] for item in report["intervals"]] == ["Loss of answers"]
    assert len(json.loads((tmp_path / "out" / "scores.json").read_text())["quiz"]["ids"]) == 4
    (curve,) = report["curves"]
    assert curve["x"] == "tokens trained on" and curve["series"][0]["x"] == [0, 5, 9]


@pytest.mark.parametrize("window", [16, 512])
def test_the_loss_of_answers_is_that_of_a_forward_pass(inputs: dict[str, Any], window: int) -> None:
    model = puna.load(inputs["models"]["after"], dtype="float32")
    rows = [talk(n, answer) for n, answer in enumerate(ANSWERS)]
    found = responses.measure(model, rows, window=window, batch_tokens=64, label="test")
    assert model.tokenizer is not None
    encoded = encode_rows(rows, "messages", model.tokenizer, model.template)
    assert found.tokens.tolist() == [row.targets for row in encoded]
    for number, row in enumerate(encoded):
        with torch.no_grad():
            logs = model(torch.tensor([row.ids]))[0].log_softmax(-1)
        learnt = [place for place, trained in enumerate(row.trained) if trained]
        nats = -sum(float(logs[place - 1, row.ids[place]]) for place in learnt)
        if window > len(row.ids):
            assert found.nats[number] == pytest.approx(nats, rel=1e-5)
        else:  # less is seen of what stands before
            assert found.nats[number] > 0


def test_distances_are_the_norms_of_whole_tensors(
    inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_weights, "PART", 300)
    first, last = (puna.load(inputs["models"][name]) for name in ("before", "after"))
    found = distances(*(Weights.open(inputs["models"][name]) for name in ("before", "after")))
    moved = norm = 0.0
    for name, weight in first.model.layers[1].named_parameters():
        other = last.model.layers[1].get_parameter(name)
        moved += float((other - weight).detach().double().square().sum())
        norm += float(weight.detach().double().square().sum())
    assert found.groups["layers.1"] == pytest.approx((moved / norm) ** 0.5, rel=1e-6)
    assert set(found.groups) == {"embedding", "layers.0", "layers.1", "norm"} and not found.unlike
    assert min(found.groups.values()) <= found.whole <= max(found.groups.values())


def test_layers_stand_in_their_order(tmp_path: Path, tiny_llama: Callable[..., Any]) -> None:
    places = [puna.save(tiny_llama(seed, num_hidden_layers=11), tmp_path / str(seed)) for seed in (0, 1)]
    found = distances(*(Weights.open(place) for place in places))
    assert list(found.groups)[-11:] == [f"layers.{number}" for number in range(11)]


def test_an_adapter_has_the_distance_of_its_product(tmp_path: Path, inputs: dict[str, Any]) -> None:
    model = puna.load(inputs["models"]["before"])
    add_lora(model, LoraSettings(r=2, alpha=4.0, target=("q_proj",)), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    write_adapter(model, tmp_path / "adapter", base_name=inputs["models"]["before"])
    found = distances(Weights.open(inputs["models"]["before"]), Weights.open(tmp_path / "adapter"))
    assert found.groups["embedding"] == 0 and found.groups["layers.0"] > 0


def test_what_has_no_counterpart_has_no_distance(tmp_path: Path, tiny_llama: Callable[..., Any]) -> None:
    puna.save(tiny_llama(), tmp_path / "a")
    puna.save(tiny_llama(vocab_size=330), tmp_path / "grown")
    found = distances(Weights.open(tmp_path / "a"), Weights.open(tmp_path / "grown"))
    assert found.unlike == ("embedding",) and "embedding" not in found.groups
    puna.save(tiny_llama(hidden_size=24, head_dim=6), tmp_path / "other")
    with pytest.raises(PunaError, match="no layer of the same shape"):
        distances(Weights.open(tmp_path / "a"), Weights.open(tmp_path / "other"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": {"pages": []}}, "needs a corpus of conversations"),
        ({"tasks": {"quiz": ["cat", "mat"]}}, "none of the choices"),
        ({"tasks": {"quiz": ["cat", "cat"]}}, "two or more different choices"),
        ({"untouched": ["quiz"]}, "cannot show what was forgotten"),
        ({"tokens": {"before": 0}}, "no place in time"),
        ({"tokens": {"bfore": 0}}, "bfore"),
        ({"baseline": "start"}, "start"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, inputs: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(PunaError, match=message):
        run(tmp_path, inputs, **settings)
