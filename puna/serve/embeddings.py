"""POST /v1/embeddings: one vector for each text, pooled from the model's final hidden states."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from puna.core.errors import PunaError
from puna.decode.reading import PromptVector
from puna.decode.sampling import Sampling
from puna.serve import responses
from puna.serve.catalog import Served
from puna.serve.errors import ApiError, from_puna
from puna.serve.house import House
from puna.serve.requests import EmbeddingBody


def embeddings_router(house: House) -> APIRouter:
    """The endpoint over the models of ``house``."""
    router = APIRouter(tags=["embeddings"])

    @router.post("/v1/embeddings", response_model=responses.EmbeddingAnswer)
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        served = house.catalog.find(body.model)
        size = served.engine.model.spec.hidden_size
        if body.dimensions not in (None, size):
            raise ApiError(
                400,
                f"dimensions: the vectors of {served.name!r} have {size} numbers and cannot be shortened",
                param="dimensions",
                code="invalid_value",
            )
        return JSONResponse(await house.unless_left(request, _embed(house, served, body)))

    return router


async def _embed(house: House, served: Served, body: EmbeddingBody) -> dict[str, Any]:
    house.desk.check_room(len(body.inputs))
    for text in body.inputs:
        if isinstance(text, str):
            served.check_length(text, "input")
    try:
        prompts = [await asyncio.to_thread(served.engine.encode, text) for text in body.inputs]
    except PunaError as error:
        raise from_puna(error, param="input") from None
    readers = [PromptVector() for _ in prompts]
    answers = await house.desk.take(served, prompts, Sampling(max_tokens=1), readers)
    try:
        while await answers.news():
            pass
    finally:
        answers.close()
    data = [
        {"object": "embedding", "index": place, "embedding": _written(reader.vector, body.encoding_format)}
        for place, reader in enumerate(readers)
    ]
    tokens = sum(map(len, prompts))
    return {
        "object": "list",
        "model": served.name,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _written(vector: list[float], form: str | None) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return vector
