"""Errors as OpenAI's interface tells them: ``{"error": {"message", "type", "param", "code"}}`` and status."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from puna.core.errors import PunaError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    499: "cancelled",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that cannot be answered: status, message, the parameter at fault and a code for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
        }

    @property
    def headers(self) -> dict[str, str]:
        """Headers beside the body."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status, self.headers)


def from_puna(error: PunaError, *, param: str | None = None) -> ApiError:
    """A mistake that the engine found in a request: 400, or the code that clients know for a long prompt."""
    code = "context_length_exceeded" if "does not fit" in error.message else "invalid_value"
    if param is None and str(error.where).startswith("strategy"):
        param = "strategy"
    return ApiError(400, str(error), param=param, code=code)


def as_api_error(error: Exception) -> ApiError:
    """Any error as one of this shape; a bug is told in the server's log alone."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PunaError):
        return from_puna(error)
    logging.getLogger(__name__).error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; its log tells how", code="internal_error")


def install(app: FastAPI) -> None:
    """Make every error of ``app`` one of this shape; what no handler knows is told by ``Bounds``."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(PunaError, _puna_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def _puna_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, PunaError)
    return from_puna(error).response()


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    kind, place = str(first["type"]), [str(part) for part in first["loc"]]
    if kind == "json_invalid":
        message = f"the body is not JSON: {first['ctx']['error']} at character {place[-1]}"
        return ApiError(400, message, code="invalid_json").response()
    said = str(first["msg"]).removeprefix("Value error, ")
    if place == ["body"] and kind != "value_error":
        return _without_object(request).response()
    name = ".".join(place[1:])
    form = next((number for number, part in enumerate(place) if "[" in part or "-" in part), 0)
    if form:  # the name of one of several forms, which is no help
        name, said = ".".join(place[1:form]), _forms(error, place[:form])
    message = f"{name}: {said}" if name else said
    code = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}.get(kind)
    if kind == "extra_forbidden":
        message = f"unknown parameter {name!r}"
    elif kind == "missing":
        message = f"missing parameter {name!r}"
    return ApiError(400, message, param=name or None, code=code or "invalid_value").response()


def _forms(error: RequestValidationError, place: list[str]) -> str:
    """What the value at ``place`` lacks for each of the forms that it may have."""
    said = []
    for one in error.errors():
        where = [str(part) for part in one["loc"]]
        if where[: len(place)] == place:
            inside = ".".join(where[len(place) + 1 :])
            said.append(f"{inside}: {one['msg']}" if inside else str(one["msg"]))
    return "; or ".join(dict.fromkeys(said))


def _without_object(request: Request) -> ApiError:
    """The error for a body that pydantic was not even given as an object."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and request.headers.get("content-length") != "0":
        return ApiError(
            415,
            f"the body must be sent as application/json, not {kind or 'without a type'}",
            code="media_type",
        )
    return ApiError(400, "the body must be a JSON object", code="invalid_type")


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 400:  # FastAPI's word for a body that made its parser fail
        return ApiError(400, f"the body is not JSON: {message}", code="invalid_json").response()
    if error.status_code == 404:
        message = f"no such path: {request.method} {request.url.path}"
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}"
    answer = ApiError(error.status_code, message).response()
    answer.headers.update(error.headers or {})
    return answer
