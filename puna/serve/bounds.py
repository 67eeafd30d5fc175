"""What is checked before a request is looked at: its Host, its key, its size and how long it takes to come.

A body is read whole here, within its bounds, so that nothing behind needs a bound of its own; and what
is sent to a reader that has stalled ends in a cut connection instead of a task that waits forever.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from puna.serve.errors import ApiError, as_api_error
from puna.serve.passes import Passes
from puna.serve.protocol import cut_connection
from puna.serve.settings import ServerSettings

OPEN_PATHS = ("/", "/ui", "/health")
PAGE_PREFIX = "/ui/"
"""The web page's own files hold nothing secret; what it shows comes from below ``/v1`` and ``/runs``."""


class StalledError(Exception):
    """The reader of an answer has taken nothing for too long."""


class Bounds:
    """ASGI middleware that holds requests to the settings."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, passes: Passes | None = None) -> None:
        self.app = app
        self.settings = settings
        self._passes = passes
        self._held = 0  # bytes of the bodies of all requests under way
        self._hosts = settings.hosts
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, then pass it on with its whole body."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body: list[bytes] = []
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._check_host(headers)
            self._check_key(scope, headers)
            if await self._read_body(headers, receive, body):
                await self.app(scope, _replay(b"".join(body), receive), self._bounded_send(noting))
        except ApiError as error:
            response = error.response()
            # What is left of the body is not worth reading.
            response.headers["connection"] = "close"
            await response(scope, receive, send)
        except StalledError:
            cut_connection(scope)
        except Exception as error:
            if begun:
                raise
            # Told here and not further out, where the connection would be closed on top of it.
            await as_api_error(error).response()(scope, receive, send)
        finally:
            self._held -= sum(map(len, body))

    def _check_host(self, headers: Mapping[bytes, bytes]) -> None:
        if self._hosts is None:
            return
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
        if name.lower() not in self._hosts:
            raise ApiError(
                403, f"this server does not answer under the name {name!r}", code="host_not_allowed"
            )

    def _check_key(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        path = scope["path"]
        if self._key is None or path in OPEN_PATHS or path.startswith(PAGE_PREFIX):
            return
        if self._passes is not None and self._passes.holds(path, scope["query_string"]):
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
            found = "a wrong API key" if key else "no API key"
            raise ApiError(
                401, f"{found}: send the header 'Authorization: Bearer KEY'", code="invalid_api_key"
            )

    async def _read_body(self, headers: Mapping[bytes, bytes], receive: Receive, parts: list[bytes]) -> bool:
        """Read the body into ``parts``; False if the client left before it had said everything."""
        limit = self.settings.max_body_bytes
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        size = 0
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    self._held += len(parts[-1])
                    if size > limit:
                        raise _too_large(limit)
                    if self._held > self.settings.max_held_bytes:
                        raise ApiError(
                            429, "the server is busy: it holds too much", code="too_much_held", retry_after=1
                        )
                    if not message.get("more_body", False):
                        return True
        except TimeoutError:
            raise ApiError(408, "the body did not come in time", code="body_timeout") from None

    def _bounded_send(self, send: Send) -> Send:
        seconds = self.settings.stall_seconds

        async def bounded(message: Message) -> None:
            try:
                async with asyncio.timeout(seconds):
                    await send(message)
            except TimeoutError:
                raise StalledError from None

        return bounded


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit:,} bytes", code="body_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    """``receive`` for a request whose body was read already."""
    told = False

    async def replay() -> Message:
        nonlocal told
        if not told:
            told = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay
