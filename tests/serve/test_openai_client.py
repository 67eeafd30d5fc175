"""The server as the real openai client sees it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from puna.decode.sampling import Sampling
from tests.serve.little_server import Live, live, tiny_catalog

HELLO: Any = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def engine_text(server: Live, prompt: Any, **settings: Any) -> str:
    """What the engine itself makes of a prompt."""
    engine = server.house.catalog["tiny"].engine
    ticket = engine.submit(prompt, Sampling(**settings))
    for _ in ticket.events():
        pass
    return str(ticket.completion.text)


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "puna"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("tini")
    assert caught.value.code == "model_not_found"
    assert "did you mean 'tiny'" in str(caught.value)


def test_a_chat_is_the_engines_answer_streamed_or_not(client: openai.OpenAI, server: Live) -> None:
    expected = engine_text(server, HELLO, max_tokens=12)
    whole = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_tokens=12)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == 12
    stream = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        temperature=0,
        max_completion_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == expected
    assert chunks[-1].usage == whole.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_completion_is_the_engines_text(client: openai.OpenAI, server: Live) -> None:
    expected = engine_text(server, "the cat", max_tokens=10, temperature=0.9, top_p=0.8, seed=5)
    drawn: Any = {
        "model": "tiny",
        "prompt": "the cat",
        "max_tokens": 10,
        "temperature": 0.9,
        "top_p": 0.8,
        "seed": 5,
    }
    assert client.completions.create(**drawn).choices[0].text == expected
    assert (
        "".join(chunk.choices[0].text for chunk in client.completions.create(**drawn, stream=True))
        == expected
    )


def test_several_prompts_and_several_answers_to_each(client: openai.OpenAI) -> None:
    one: Any = {"model": "tiny", "max_tokens": 6, "temperature": 1.0, "seed": 3}
    found = client.completions.create(prompt=["the cat", "on that mat"], n=2, **one)
    texts = [choice.text for choice in found.choices]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    again = client.completions.create(prompt="on that mat", n=2, **one)
    assert [choice.text for choice in again.choices] == texts[2:]
    streamed = [""] * 4
    for chunk in client.completions.create(prompt=["the cat", "on that mat"], n=2, stream=True, **one):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts
    assert found.usage is not None and found.usage.completion_tokens == 24


def test_a_request_without_a_seed_can_be_repeated_by_the_seed_it_tells(client: openai.OpenAI) -> None:
    first = client.completions.create(model="tiny", prompt="the", max_tokens=8)
    other = client.completions.create(model="tiny", prompt="the", max_tokens=8)
    told = first.choices[0].model_extra["puna"]  # type: ignore[index]
    assert told["seed"] != other.choices[0].model_extra["puna"]["seed"]  # type: ignore[index]
    again = client.completions.create(model="tiny", prompt="the", max_tokens=8, seed=told["seed"])
    assert again.choices[0].text == first.choices[0].text


def test_stop_strings_and_stop_tokens_end_the_text(client: openai.OpenAI, server: Live) -> None:
    whole = engine_text(server, "the cat", max_tokens=12)
    cut = whole[3:5]
    found = client.completions.create(model="tiny", prompt="the cat", temperature=0, max_tokens=12, stop=cut)
    assert found.choices[0].text == whole[: whole.index(cut)]
    assert found.choices[0].finish_reason == "stop"
    token = server.completion(trace=True, max_tokens=3)["choices"][0]["puna"]["trace"][2]["id"]
    found = client.completions.create(
        model="tiny", prompt="the cat", temperature=0, max_tokens=12, extra_body={"stop_token_ids": [token]}
    )
    assert (found.choices[0].finish_reason, found.usage.completion_tokens) == ("stop", 3)  # type: ignore[union-attr]


def test_logprobs_of_a_chat_are_those_of_the_model(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    content = found.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None and len(content) == 4
    for entry in content:
        assert [len(entry.top_logprobs), entry.top_logprobs[0].logprob] == [3, entry.logprob]  # greedy
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    chunks = client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3, stream=True
    )
    streamed = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == content


def test_an_echoed_prompt_is_scored_as_a_forward_pass_scores_it(client: openai.OpenAI, server: Live) -> None:
    import torch

    model = server.house.catalog["tiny"].engine.model
    ids = server.house.catalog["tiny"].engine.encode("the cat sat on that mat " * 8)
    found = client.completions.create(
        model="tiny", prompt=ids, echo=True, logprobs=2, max_tokens=1, temperature=0, n=2
    )
    with torch.no_grad():
        logs = model(torch.tensor([ids]))[0].log_softmax(-1)
    expected = logs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    for choice in found.choices:
        scored = choice.logprobs
        assert scored is not None and scored.token_logprobs is not None and scored.top_logprobs is not None
        assert scored.token_logprobs[0] is None
        assert scored.token_logprobs[1 : len(ids)] == pytest.approx(expected.tolist(), abs=2e-4)
        assert len(scored.token_logprobs) == len(ids) + 1 == len(scored.text_offset or [])
        # Two tokens that are each a piece of a character have one text, and one entry.
        assert all(len(top or {}) in (1, 2) for top in scored.top_logprobs[1 : len(ids)])
        assert choice.text.startswith("the cat sat on that mat the cat")


def test_max_tokens_0_scores_the_prompt_alone(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt="the cat", echo=True, logprobs=1, max_tokens=0)
    choice = found.choices[0]
    assert choice.text == "the cat"
    assert choice.logprobs is not None and len(choice.logprobs.tokens or []) == 3
    assert found.usage is not None and found.usage.completion_tokens == 0


def test_the_extension_tells_how_it_was_decoded(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model="tiny",
        prompt="the cat",
        max_tokens=5,
        temperature=0,
        extra_body={"strategy": {"name": "plain"}, "trace": True},
    )
    told = found.choices[0].model_extra["puna"]  # type: ignore[index]
    assert (told["strategy"], told["lossless"]) == ("plain", True)
    assert told["accounting"]["tokens"] == len(told["trace"]) == 5
    assert told["accounting"]["sources"] == {"target": 5}
    assert "".join(token["text"] for token in told["trace"]) == found.choices[0].text
    assert all(token["entropy"] > 0 for token in told["trace"])
    with pytest.raises(openai.BadRequestError, match="unknown strategy 'plane'"):
        client.completions.create(model="tiny", prompt="a", extra_body={"strategy": "plane"})
    with pytest.raises(openai.BadRequestError, match="strategy"):
        client.completions.create(
            model="tiny", prompt="a", extra_body={"strategy": {"name": "plain", "settings": {"speed": 1}}}
        )


def test_a_request_opens_no_file_by_its_path(client: openai.OpenAI, server: Live) -> None:
    for name, kind in (("specdec-pp", "head"), ("feed-forward-skip", "plan")):
        for file in ("/etc/passwd", "../head.safetensors", 5):
            chosen = {"strategy": {"name": name, "settings": {kind: file}}}
            with pytest.raises(openai.BadRequestError, match=f"unknown {kind}") as caught:
                client.completions.create(model="tiny", prompt="a", extra_body=chosen)
            assert caught.value.param == "strategy"
    cards = {card["name"]: card for card in server.http.get("/v1/strategies").json()["data"]}
    assert cards["specdec-pp"]["settings"]["properties"]["head"]["enum"] == []
    assert cards["feed-forward-skip"]["settings"]["properties"]["plan"]["enum"] == [None]
    assert cards["specdec-pp"]["lossless"] is None


def test_strategies_tell_what_they_lack_here(server: Live) -> None:
    cards = {card["name"]: card for card in server.http.get("/v1/strategies").json()["data"]}
    usable = {name for name, card in cards.items() if not card["missing"]}
    assert usable == {"plain", "best-of", "rapid", "feed-forward-skip", "early-exit"}
    assert cards["speculative"]["missing"] == ["the model 'draft' (--companion draft=MODEL)"]
    assert len(cards["judge-decoding"]["missing"]) == 2  # a draft and a head
    assert cards["rapid"]["settings"]["properties"]["draft"]["enum"] == ["target"]
    for name in ("plain", "best-of"):  # the others want a document in the prompt, or settings
        found = server.completion(strategy=name, max_tokens=4)["choices"][0]["puna"]
        assert found["strategy"] == name


def test_no_setting_of_a_strategy_is_a_file_that_the_server_does_not_know_of(server: Live) -> None:
    from puna.decode.strategy import all_strategies

    words = {"question", "base_prompt", "begin", "end"}  # texts that the method writes or looks for
    for name, settings in all_strategies().items():
        for key, described in settings.model_json_schema().get("properties", {}).items():
            kinds = described.get("anyOf", [described])
            if any(kind.get("type") == "string" and "enum" not in kind for kind in kinds):
                assert key in {*settings.companions, *settings.files, *words}, f"{name}: {key}"


def test_embeddings_are_of_length_1_and_alike_for_like_texts(client: openai.OpenAI) -> None:
    texts = ["the cat sat on the mat", "the cat sat on that mat", "0123456789 ?!"]
    found = client.embeddings.create(model="tiny", input=texts)
    vectors = [entry.embedding for entry in found.data]
    assert [len(vector) for vector in vectors] == [48] * 3
    assert math.fsum(x * x for x in vectors[0]) == pytest.approx(1, abs=1e-5)

    def likeness(first: int, second: int) -> float:
        return math.fsum(x * y for x, y in zip(vectors[first], vectors[second], strict=True))

    assert likeness(0, 1) > likeness(0, 2)
    plain = client.embeddings.create(model="tiny", input=texts[0], encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(vectors[0], abs=1e-6)
    with pytest.raises(openai.BadRequestError, match="48 numbers"):
        client.embeddings.create(model="tiny", input="a", dimensions=8)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "other"}, 404, "model_not_found"),
        ({"prompt": "the cat " * 2000}, 400, "context_length_exceeded"),
        ({"prompt": [1, 99999]}, 400, "invalid_value"),
        ({"max_tokens": 5000}, 400, "beyond_bound"),
        ({"logprobs": 21}, 400, "beyond_bound"),
        ({"stop": ["a"] * 17}, 400, "beyond_bound"),
        ({"n": 129}, 400, "too_many_answers"),
        ({"temperature": -1}, 400, "invalid_value"),
        ({"extra_body": {"tempreature": 1}}, 400, "unknown_parameter"),
        ({"logit_bias": {"5": 3}}, 400, "invalid_value"),
        ({"best_of": 3}, 400, "invalid_value"),
    ],
)
def test_bad_requests_get_errors_of_openais_shape(
    client: openai.OpenAI, body: dict[str, Any], status: int, code: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "a", **body})
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert caught.value.type in ("invalid_request_error", "not_found_error")


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        ("completions", {"strategy": {"nam": "x"}}, "strategy", "valid string; or name: Field required"),
        ("completions", {"prompt": {"a": 1}}, "prompt", "valid string; or Input should be a valid list"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.user.content",
            "0.type: Input should be 'text'",
        ),
    ],
)
def test_a_value_of_none_of_its_forms_is_told_what_each_lacks(
    server: Live, path: str, body: dict[str, Any], param: str, says: str
) -> None:
    usual: dict[str, Any] = {"messages": []} if "chat" in path else {"prompt": "a"}
    answer = server.post(f"/v1/{path}", **{"model": "tiny", **usual, **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert says in error["message"]


def test_a_key_is_demanded_where_there_is_one(tiny_tokenizer: Any) -> None:
    with live(tiny_catalog(tiny_tokenizer), api_key="secret") as guarded:
        for key, fails in (("secret", False), ("secre", True), ("", True)):
            with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key or "x", max_retries=0) as client:
                if fails:
                    with pytest.raises(openai.AuthenticationError) as caught:
                        client.completions.create(model="tiny", prompt="a", max_tokens=1)
                    assert caught.value.code == "invalid_api_key"
                else:
                    client.completions.create(model="tiny", prompt="a", max_tokens=1)
        guarded.http.headers.pop("authorization")
        assert guarded.http.get("/health").status_code == 200
        assert guarded.http.get("/metrics").status_code == 401
