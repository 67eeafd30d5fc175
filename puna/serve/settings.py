"""What the server allows: every bound is a setting with a safe default."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any

import pydantic

from puna.core.errors import PunaError

Positive = Annotated[int, pydantic.Field(ge=1)]
Seconds = Annotated[float, pydantic.Field(gt=0)]


class ServerSettings(pydantic.BaseModel):
    """Bounds and behaviour of one server process; a key that is not here is an error."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    host: str = "127.0.0.1"
    """Address to listen on; another one than this machine's own loopback should come with an API key."""
    port: Annotated[int, pydantic.Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    api_key: str | None = None
    """What ``Authorization: Bearer`` must carry, for everything but /health and the empty web page."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that the Host header may carry besides the address itself. On the loopback its names alone are
    taken, so that a web page elsewhere cannot reach it under a name of its own; ``*`` takes every name."""

    max_body_bytes: Positive = 2 * 1024 * 1024
    """Size of a request's body."""
    max_held_bytes: Positive = 256 * 1024 * 1024
    """Bodies of all requests together; one that comes on top is answered 429."""
    max_head_bytes: Positive = 32 * 1024
    """Size of a request's line and headers."""
    max_connections: Positive = 1024
    """Open connections; one more is answered 429 and closed."""
    max_queue: Positive = 256
    """Answers that are made or wait, each of ``n`` and of a list of prompts counted; beyond: 429."""
    max_answers: Positive = 128
    """Answers of one request: prompts times ``n``."""
    max_tokens: Positive = 4096
    """Tokens of one answer."""
    max_logprobs: Annotated[int, pydantic.Field(ge=0)] = 20
    """Alternatives a request may ask for at each token."""
    max_stops: Positive = 16
    """Stop strings of one request."""
    max_grammar_bytes: Positive = 64 * 1024
    """Size of a JSON schema or regular expression that constrains an answer, and of a request's tools."""

    head_seconds: Seconds = 10.0
    """Until a connection has sent the head of a request."""
    body_seconds: Seconds = 30.0
    """Until a request has sent its body."""
    queue_seconds: Seconds = 120.0
    """Until the first token; a request that waited so long is answered 429."""
    request_seconds: Seconds = 600.0
    """Until the last token; then the request ends with the error ``timeout``."""
    stall_seconds: Seconds = 60.0
    """How long a reader may take nothing while its answer is ready; then its connection is cut."""
    drain_seconds: Seconds = 60.0
    """How long requests may still run after SIGTERM."""
    keep_alive_seconds: Annotated[int, pydantic.Field(ge=1)] = 5
    """How long an idle connection stays open between requests."""

    seed: int = 0
    """From it and the number of a request its draws derive, where the request names no seed."""
    runs: Path | None = None
    """Folder of runs whose reports the web page shows."""

    @classmethod
    def of(cls, **values: Any) -> ServerSettings:
        """The settings, where what pydantic has to say becomes one :class:`PunaError`."""
        try:
            return cls(**values)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"])) or "settings"
            known = ", ".join(cls.model_fields)
            raise PunaError(
                f"server setting {name!r}: {first['msg']}",
                found=repr(first["input"]),
                expected=f"one of {known}" if first["type"] == "extra_forbidden" else None,
            ) from None

    @property
    def is_loopback(self) -> bool:
        """Whether the server listens on this machine's loopback alone."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def hosts(self) -> frozenset[str] | None:
        """Names that the Host header may carry; None: any."""
        if "*" in self.allowed_hosts or (not self.is_loopback and not self.allowed_hosts):
            return None
        return frozenset({*self.allowed_hosts, self.host, "localhost", "127.0.0.1", "::1"})
