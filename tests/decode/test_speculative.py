"""Speculative strategies in the engine: the target's text whatever drafts, and the target's law."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.decode.engine import Engine
from puna.decode.goodness import chi_square
from puna.decode.heads import Head, HeadSpec, save_head
from puna.decode.sampling import Sampling, make_law
from puna.decode.short_head import pass_weights, short_head
from puna.decode.speculative import Round, Speculative
from puna.decode.strategy import resolve
from puna.edit.shorten import shorten

PROMPTS = ["the cat sat on", "and the other", "in the end it went in again and then"]
MARKED = "<Context>the cat sat. the other cat went in again.</Context>the cat"
Strategy = dict[str, Any]


def livelier(model: Any, factor: float) -> Any:
    """A fresh tiny model is nearly indifferent; this one has favourites."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(factor)
    return model


@pytest.fixture(scope="module")
def models(tiny_tokenizer: Any) -> dict[str, Any]:
    """A target, a draft cut out of it, a draft that knows nothing of it."""
    from puna.core.seeds import torch_generator
    from puna.model.llama import Llama
    from puna.model.spec import BlockSpec, LlamaSpec

    def build(seed: int) -> Any:
        block = BlockSpec(heads=4, kv_heads=2, head_dim=12, width=96)
        spec = LlamaSpec(320, 48, (block,) * 4, tied=True, max_positions=128)
        model = livelier(Llama(spec, generator=torch_generator(seed, "tiny")), 5.0)
        model.tokenizer = tiny_tokenizer
        return model.eval()

    target = build(0)
    return {"target": target, "draft": shorten(target, (0, 1, 3)), "stranger": build(1)}


@pytest.fixture(scope="module")
def engine(models: dict[str, Any]) -> Engine:
    others = {name: model for name, model in models.items() if name != "target"}
    return Engine(models["target"], models=others, cache_tokens=4096)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An untrained head of each kind: what they say is arbitrary, and must not matter."""
    folder = tmp_path_factory.mktemp("heads")
    made = {}
    for kind, spec in (("acceptance", HeadSpec(48, 2, ways=2)), ("judge", HeadSpec(48))):
        made[kind] = str(save_head(Head(spec, seed=3, about={"kind": kind}), folder / f"{kind}.safetensors"))
    return made


def lossless(heads: dict[str, str]) -> list[Strategy]:
    return [
        {"name": "speculative"},
        {"name": "speculative", "draft": "stranger", "draft_tokens": 1},
        {"name": "speculative", "draft": "target", "draft_tokens": 7},
        {"name": "speculative", "confidence": 0.3, "draft_vocabulary": 90},
        {"name": "specdec-pp", "head": heads["acceptance"]},
        {"name": "judge-decoding", "head": heads["judge"], "threshold": 1.0},
        {"name": "rapid", "eta": 0.0, "begin": "the", "end": "t"},
    ]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_greedy_text_is_the_targets_for_any_draft_head_threshold_and_bounds(
    engine: Engine, heads: dict[str, str], data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(["speculative", "specdec-pp", "judge-decoding", "rapid"]))
    drafts = st.sampled_from(["draft", "stranger", "target"])
    chosen: Strategy = {
        "name": kind,
        "draft": data.draw(drafts),
        "draft_tokens": data.draw(st.integers(1, 20)),
    }
    if data.draw(st.booleans()):
        chosen["draft_vocabulary"] = data.draw(st.integers(1, 400))
    if kind == "speculative":
        chosen["confidence"] = data.draw(st.one_of(st.none(), st.floats(0.01, 1)))
    elif kind == "specdec-pp":
        chosen |= {"head": heads["acceptance"], "threshold": data.draw(st.floats(0, 1))}
        chosen["least"] = data.draw(st.integers(1, 9))
    elif kind == "judge-decoding":
        chosen |= {"head": heads["judge"], "threshold": data.draw(st.floats(1, 9))}
    else:  # at temperature 0 the moved law is the target's
        chosen |= {"eta": data.draw(st.floats(0, 50)), "chunk_tokens": data.draw(st.integers(1, 40))}
        chosen["residual"] = data.draw(st.sampled_from(["exact", "released"]))
    prompts = [MARKED] if kind == "rapid" else PROMPTS
    sampling = Sampling(max_tokens=data.draw(st.integers(1, 24)))
    expected = engine.generate(prompts, sampling)
    found = engine.generate(prompts, sampling, chosen)
    assert [one.ids for one in found] == [one.ids for one in expected]
    assert [one.text for one in found] == [one.text for one in expected]
    assert [one.finish_reason for one in found] == [one.finish_reason for one in expected]
    assert all(one.strategy == kind for one in found)
    assert engine.statistics.blocks_used == 0


@pytest.mark.parametrize("number", range(6))
def test_two_sampled_tokens_follow_the_targets_law(
    engine: Engine, models: dict[str, Any], heads: dict[str, str], number: int
) -> None:
    """All pairs of tokens, enumerated: their counts in 1500 texts against the target's own law."""
    chosen = lossless(heads)[number]
    sampling = Sampling(max_tokens=4, temperature=0.8, top_k=4, seed=number, n=1500)
    found = engine.generate([PROMPTS[0]], sampling, chosen)
    target, prompt = models["target"], engine.encode(PROMPTS[0])
    law: dict[tuple[int, ...], float] = {}
    with torch.inference_mode():
        first = make_law(target(torch.tensor([prompt]))[0, -1], sampling).probabilities
        for token in first.nonzero()[:, 0].tolist():
            second = make_law(target(torch.tensor([[*prompt, token]]))[0, -1], sampling).probabilities
            if token in target.tokenizer.stop_ids:
                law[(token,)] = float(first[token])
                continue
            for after in second.nonzero()[:, 0].tolist():
                law[token, after] = float(first[token] * second[after])
    cells = list(law)
    counts = torch.zeros(len(cells))
    for completion in found:
        counts[cells.index(tuple(completion.ids[:2]))] += 1
    assert chi_square(counts, torch.tensor([law[cell] for cell in cells]))[1] > 1e-3
    assert all(completion.lossless for completion in found)


def test_another_model_may_write_alone_and_says_so(engine: Engine, models: dict[str, Any]) -> None:
    sampling = Sampling(max_tokens=12, temperature=0.8, seed=2)
    found = engine.generate(PROMPTS, sampling, {"name": "plain", "model": "draft"})
    alone = Engine(models["draft"], cache_tokens=1024).generate(PROMPTS, sampling)
    assert [c.ids for c in found] == [c.ids for c in alone]
    assert not any(c.lossless for c in found)
    assert {row.source for c in found for row in c.trace} == {"draft"}


def test_penalties_reach_draft_and_target_alike(engine: Engine) -> None:
    sampling = Sampling(max_tokens=20, repetition_penalty=1.4, frequency_penalty=0.5)
    expected = engine.generate(PROMPTS, sampling)
    assert [c.ids for c in engine.generate(PROMPTS, sampling, "speculative")] == [c.ids for c in expected]


def test_a_text_is_the_same_alone_and_in_a_mixture_of_strategies(
    engine: Engine, heads: dict[str, str]
) -> None:
    sampling = Sampling(max_tokens=12, temperature=0.9, seed=5)
    every = lossless(heads)[:6]
    alone = [engine.generate([PROMPTS[0]], sampling, chosen)[0] for chosen in every]
    tickets = [engine.submit(PROMPTS[0], sampling, chosen) for chosen in every]
    while engine.step():
        pass
    assert [ticket.completion.ids for ticket in tickets] == [one.ids for one in alone]
    assert engine.statistics.blocks_used == 0


def test_a_draft_that_is_the_target_always_stands(engine: Engine) -> None:
    rounds: list[Round] = []
    strategy = resolve({"name": "speculative", "draft": "target", "draft_tokens": 3})
    assert isinstance(strategy, Speculative)
    strategy.on_round = lambda _, round_: rounds.append(round_)
    found = engine.generate([PROMPTS[0]], Sampling(max_tokens=12, ignore_eos=True), strategy)[0]
    assert rounds == [Round(3, 3, 4)] * 3
    assert [row.source for row in found.trace] == ["draft", "draft", "draft", "target"] * 3
    assert [row.accepted for row in found.trace] == [True, True, True, None] * 3
    # Of each round: three drafted tokens read by the drafter and four by the target; both read the last.
    assert sum(row.cost or 0 for row in found.trace) == pytest.approx(3 * (4 + 3) + 2)


def test_rapid_without_a_shift_is_standard_speculative_decoding(engine: Engine) -> None:
    """Token by token, sampled too, where the drafter's chunks are the whole document; shifted it is not."""
    sampling = Sampling(max_tokens=20, temperature=0.9, seed=3, n=4, ignore_eos=True)
    standard = {"name": "speculative", "draft": "draft", "draft_tokens": 6}
    rapid = {"name": "rapid", "draft": "draft", "draft_tokens": 6, "budget": 1000}
    wanted = [text.ids for text in engine.generate([MARKED], sampling, standard)]
    for residual in ("exact", "released"):
        unmoved = engine.generate([MARKED], sampling, {**rapid, "eta": 0.0, "residual": residual})
        assert [text.ids for text in unmoved] == wanted and all(text.lossless for text in unmoved)
        moved = engine.generate([MARKED], sampling, {**rapid, "eta": 20.0, "residual": residual})
        assert [text.ids for text in moved] != wanted and not any(text.lossless for text in moved)


def test_the_trace_says_what_was_refused(engine: Engine) -> None:
    found = engine.generate(
        PROMPTS, Sampling(max_tokens=24, ignore_eos=True), {"name": "speculative", "draft": "stranger"}
    )
    rows = [row for completion in found for row in completion.trace]
    assert {(row.source, row.accepted) for row in rows} >= {("target", False)}
    assert all(row.accepted is True for row in rows if row.source == "draft")
    assert [row.token for row in rows] == [token for completion in found for token in completion.ids]


def test_a_stop_token_inside_a_draft_ends_the_text_there(engine: Engine) -> None:
    plain = engine.generate([PROMPTS[0]], Sampling(max_tokens=12, ignore_eos=True))[0]
    stop = plain.ids[5]
    end = plain.ids.index(stop)
    sampling = Sampling(max_tokens=12, ignore_eos=True, stop_ids=[stop])
    rounds: list[Round] = []
    strategy = resolve({"name": "speculative", "draft": "target", "draft_tokens": 11})
    assert isinstance(strategy, Speculative)
    strategy.on_round = lambda _, round_: rounds.append(round_)
    found = engine.generate([PROMPTS[0]], sampling, strategy)[0]
    assert found.ids == plain.ids[: end + 1] and found.finish_reason == "stop"
    assert rounds == [Round(end + 1, end + 1, end + 1)]  # the drafter ended its draft with it


def test_stop_strings_and_log_probabilities_are_those_of_plain_decoding(engine: Engine) -> None:
    plain = engine.generate([PROMPTS[0]], Sampling(max_tokens=12, ignore_eos=True))[0]
    stop = plain.text[3:6]
    for sampling in (
        Sampling(max_tokens=12, ignore_eos=True, stop=[stop]),
        Sampling(max_tokens=12, ignore_eos=True, logprobs=3),
    ):
        expected = engine.generate([PROMPTS[0]], sampling)[0]
        found = engine.generate([PROMPTS[0]], sampling, "speculative")[0]
        assert (found.text, found.ids, found.finish_reason) == (
            expected.text,
            expected.ids,
            expected.finish_reason,
        )
        if expected.logprobs is not None:
            assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_texts_end_at_the_context_of_either_model(models: dict[str, Any], tiny_tokenizer: Any) -> None:
    """The target's context ends the text; a shorter one of the drafter only ends the drafting."""
    narrow = shorten(models["target"], (0, 3))
    narrow.spec = narrow.spec.replace(max_positions=20)
    engine = Engine(models["target"], models={"draft": narrow}, cache_tokens=1024)
    sampling = Sampling(max_tokens=500, ignore_eos=True)
    prompt = list(range(4, 20))
    expected = engine.generate([prompt], sampling)[0]
    found = engine.generate([prompt], sampling, "speculative")[0]
    assert found.ids == expected.ids and len(found.ids) == 128 - 16
    assert found.finish_reason == "length"


@pytest.mark.parametrize(("name", "kind"), [("specdec-pp", "acceptance"), ("judge-decoding", "judge")])
def test_a_head_of_another_models_states_is_refused(
    engine: Engine, tmp_path: Path, name: str, kind: str
) -> None:
    file = save_head(Head(HeadSpec(7), about={"kind": kind}), tmp_path / "head.safetensors")
    with pytest.raises(PunaError, match="another model's hidden states\n  found:    width 7"):
        engine.generate(PROMPTS[:1], Sampling(max_tokens=4), {"name": name, "head": str(file)})


def test_a_judge_says_so_in_every_result(engine: Engine, heads: dict[str, str]) -> None:
    chosen = {"name": "judge-decoding", "head": heads["judge"], "threshold": 0.0, "draft_tokens": 11}
    found = engine.generate(PROMPTS, Sampling(max_tokens=12, ignore_eos=True), chosen)
    assert not any(completion.lossless for completion in found)


def test_a_judge_that_takes_everything_writes_the_drafts_text(
    engine: Engine, models: dict[str, Any], heads: dict[str, str]
) -> None:
    sampling = Sampling(max_tokens=12, ignore_eos=True)
    drafts = Engine(models["draft"], cache_tokens=1024).generate(PROMPTS, sampling)
    chosen = {"name": "judge-decoding", "head": heads["judge"], "threshold": 0.0, "draft_tokens": 11}
    found = engine.generate(PROMPTS, sampling, chosen)
    assert [c.ids[:11] for c in found] == [c.ids[:11] for c in drafts]  # the last token is the target's


def test_a_short_head_drafts_frequent_and_special_tokens_alone(
    engine: Engine, models: dict[str, Any]
) -> None:
    draft = models["draft"]
    head = short_head(draft, 70)
    assert short_head(draft, 70) is head
    hidden = torch.randn(3, 48)
    found, whole = head.logits(hidden), draft.logits(hidden)
    assert torch.isinf(found[:, 70:]).all() and draft.tokenizer.special_ids <= set(range(70))
    torch.testing.assert_close(found[:, :70], whole[:, :70])
    assert pass_weights(draft, 70) == pass_weights(draft) - (320 - 70) * 48
    rounds: list[list[int]] = []
    strategy = resolve({"name": "speculative", "draft_vocabulary": 70})
    assert isinstance(strategy, Speculative)
    verify = strategy.verifier.verify
    strategy.verifier.verify = lambda request, draft, result: (  # type: ignore[method-assign]
        rounds.append(draft.tokens) or verify(request, draft, result)
    )
    engine.generate(PROMPTS, Sampling(max_tokens=12, temperature=1.0), strategy)
    assert max(token for tokens in rounds for token in tokens) < 70


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"name": "speculative", "draft": "nobody"}, "nobody"),
        ({"name": "specdec-pp"}, "key 'head' is missing"),
        ({"name": "specdec-pp", "head": "nowhere.safetensors"}, "there is no head"),
        ({"name": "judge-decoding", "head": "acceptance"}, "of another kind"),
        ({"name": "speculative", "draft_tokens": 0}, "draft_tokens"),
        ({"name": "rapid"}, "where its long document stands"),
    ],
)
def test_what_cannot_draft_is_told(
    engine: Engine, heads: dict[str, str], chosen: Strategy, said: str
) -> None:
    if chosen.get("head") in heads:
        chosen = {**chosen, "head": heads[chosen["head"]]}
    with pytest.raises(PunaError) as error:
        engine.generate(PROMPTS, Sampling(max_tokens=2), chosen)
    assert said in str(error.value)


def test_a_draft_with_other_words_is_refused(
    models: dict[str, Any], tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    other = tiny_llama(vocab_size=352)
    other.tokenizer = tiny_tokenizer
    engine = Engine(models["target"], models={"draft": other}, cache_tokens=256)
    with pytest.raises(PunaError, match="must share the target's tokenizer"):
        engine.generate(PROMPTS, Sampling(max_tokens=2), "speculative")
