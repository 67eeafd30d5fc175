"""The application: endpoints over a house of models, held to its bounds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import PlainTextResponse, Response

from puna import __version__
from puna.decode.strategy import all_strategies
from puna.serve import errors, responses
from puna.serve.bounds import Bounds
from puna.serve.chat import chat_router
from puna.serve.completions import completions_router
from puna.serve.embeddings import embeddings_router
from puna.serve.errors import ApiError
from puna.serve.house import House
from puna.serve.metrics import CONTENT_TYPE, CountRequests
from puna.serve.page import page_router, runs_router
from puna.serve.strategies import strategy_cards

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": responses.ErrorAnswer, "description": says}
    for status, says in {
        400: "The request is malformed or asks for what cannot be.",
        401: "The API key is missing or wrong.",
        403: "The server does not answer under this name.",
        404: "There is no such model.",
        408: "The request did not come in time.",
        413: "The body is too large.",
        415: "The body is not JSON.",
        429: "The server is busy; Retry-After tells when to ask again.",
        500: "The server failed.",
        503: "An engine does not run.",
        504: "The answer took too long.",
    }.items()
}


def create_app(house: House, *, page: bool = False) -> FastAPI:
    """The server of ``house``; with ``page`` the web page too. Its engines run while it runs."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        house.catalog.start()
        try:
            yield
        finally:
            house.catalog.stop(drain=False)

    app = FastAPI(
        title="puna",
        version=__version__,
        summary="Llama models behind OpenAI's interface, decoded by any of puna's methods.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=_ERRORS,
        redirect_slashes=False,
    )
    errors.install(app)
    app.include_router(completions_router(house))
    app.include_router(chat_router(house))
    app.include_router(embeddings_router(house))
    app.include_router(_facts_router(house))
    if page:
        app.include_router(page_router())
        app.include_router(
            runs_router(house.settings.runs, None if house.settings.api_key is None else house.passes)
        )
    app.add_middleware(Bounds, settings=house.settings, passes=house.passes)
    app.add_middleware(CountRequests, metrics=house.metrics)
    app.openapi = lambda: _described(app, house)  # type: ignore[method-assign]
    return app


def _facts_router(house: House) -> APIRouter:
    """What the server tells of itself."""
    router = APIRouter(tags=["server"])

    @router.get("/v1/models", response_model=responses.ModelList)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(house, name) for name in house.catalog]}

    @router.get("/v1/models/{model}", response_model=responses.ModelCard)
    async def model(model: str) -> dict[str, Any]:
        return _model_card(house, house.catalog.find(model).name)

    @router.get("/v1/strategies", response_model=responses.StrategyList)
    async def strategies() -> dict[str, Any]:
        return {"object": "list", "data": strategy_cards(house)}

    @router.get("/health", response_model=responses.Health)
    async def health() -> dict[str, Any]:
        stopped = [name for name, served in house.catalog.items() if not served.thread.running]
        if stopped:
            raise ApiError(503, f"the engine of {stopped[0]!r} does not run", code="engine_stopped")
        found = [served.engine.statistics for served in house.catalog.values()]
        return {
            "status": "ok",
            "running": sum(statistics.running for statistics in found),
            "waiting": sum(statistics.waiting for statistics in found),
        }

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(house.metrics.text(), media_type=CONTENT_TYPE)

    return router


def _model_card(house: House, name: str) -> dict[str, Any]:
    served = house.catalog[name]
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "puna",
        "parent": served.parent,
        "max_model_len": served.context,
        "weight_bytes": served.engine.weight_bytes,
        "held_bytes": served.engine.held_bytes,
        "chat": served.engine.model.template is not None,
    }


def _state_bounds(properties: dict[str, Any], house: House) -> None:
    """Write the server's bounds and names into the description of a body."""
    bounds, models = house.settings, house.catalog
    properties["model"]["enum"] = list(models)
    limits = {
        "max_tokens": bounds.max_tokens,
        "max_completion_tokens": bounds.max_tokens,
        "n": bounds.max_answers,
        "best_of": bounds.max_answers,
        "logprobs": bounds.max_logprobs,
        "top_logprobs": bounds.max_logprobs,
    }
    for name, limit in limits.items():
        for kind in properties.get(name, {}).get("anyOf", ()):
            if kind.get("type") == "integer":
                kind["maximum"] = limit
    for kind in properties.get("strategy", {}).get("anyOf", ()):
        if kind.get("type") == "string":
            kind["enum"] = list(all_strategies())
    largest = min(served.engine.model.spec.vocab_size for served in models.values()) - 1
    for name in ("prompt", "input", "stop", "stop_token_ids"):
        for kind in properties.get(name, {}).get("anyOf", [properties.get(name, {})]):
            if kind.get("type") == "array":
                _bound_items(kind, largest, bounds.max_stops if name == "stop" else None)


def _bound_items(kind: dict[str, Any], largest: int, most: int | None) -> None:
    """Bound token ids in a list or a list of lists, and its length where there is a bound on it."""
    if most is not None:
        kind["maxItems"] = most
    items = kind["items"]
    if items.get("type") == "integer":
        items["maximum"] = largest
    elif items.get("type") == "array":
        _bound_items(items, largest, None)


def _described(app: FastAPI, house: House) -> dict[str, Any]:
    """The OpenAPI description, with the names that requests may give and without FastAPI's 422."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        for path in found["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        schemas = found["components"]["schemas"]
        for kind in ("HTTPValidationError", "ValidationError"):
            schemas.pop(kind, None)
        for kind in ("CompletionBody", "ChatBody", "EmbeddingBody"):
            _state_bounds(schemas[kind]["properties"], house)
        if house.settings.api_key is not None:
            found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            found["security"] = [{"key": []}]
        app.openapi_schema = found
    return app.openapi_schema
