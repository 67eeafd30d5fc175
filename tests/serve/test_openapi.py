"""The server against its own OpenAPI description, by schemathesis: thousands of odd requests, no surprise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from tests.serve.little_server import Live, live, tiny_catalog

PATHS = {
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
    "/v1/embeddings": "POST",
    "/v1/models": "GET",
    "/v1/models/{model}": "GET",
    "/v1/strategies": "GET",
    "/health": "GET",
    "/metrics": "GET",
}
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]


@pytest.fixture(scope="module")
def small(tiny_tokenizer: Any) -> Iterator[Live]:
    """A server whose answers are short, so that many can be asked for."""
    with live(tiny_catalog(tiny_tokenizer), max_tokens=4, max_answers=4) as found:
        yield found


@pytest.fixture(scope="module")
def api(small: Live) -> Any:
    return schemathesis.openapi.from_url(f"{small.url}/openapi.json")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", [path for path, method in PATHS.items() if method == "POST"])
def test_every_request_gets_what_the_description_says(api: Any, path: str, mode: GenerationMode) -> None:
    """No failure of the server, statuses and bodies as described; what the schema forbids is refused."""
    seen: set[int] = set()

    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=api[path]["POST"].as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        seen.add(case.call_and_validate(checks=CHECKS).status_code)

    ask()
    assert seen <= ({200, 400} if mode is GenerationMode.POSITIVE else {400, 404, 415}), seen
    # Whether a drawn request makes sense is up to the draw: sensible ones are asked in test_openai_client.py.


@pytest.mark.parametrize("path", [path for path, method in PATHS.items() if method == "GET"])
def test_what_is_only_read_is_as_described(api: Any, path: str) -> None:
    case = api[path]["GET"].Case(path_parameters={"model": "tiny"} if "{model}" in path else {})
    assert case.call_and_validate(checks=CHECKS).status_code == 200


def test_the_description_is_complete(small: Live) -> None:
    found = small.http.get("/openapi.json").json()
    assert set(found["paths"]) == set(PATHS)
    for path, operations in found["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            assert {"200", "400", "429", "500"} <= set(operation["responses"]), path
    assert found["components"]["schemas"]["ChatBody"]["properties"]["model"]["enum"] == ["tiny"]
    assert "HTTPValidationError" not in found["components"]["schemas"]
