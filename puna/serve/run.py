"""Running the server: a socket is bound, models are opened, requests answered until SIGTERM, then drained."""

from __future__ import annotations

import math
import signal
import socket
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.options import named_paths

if TYPE_CHECKING:
    import uvicorn

    from puna.serve.house import House
    from puna.serve.settings import ServerSettings


def named_models(items: Sequence[str]) -> dict[str, str]:
    """``[NAME=]MODEL`` from the command line by name; without one the last part of the path or id."""
    from puna.run.alone import named
    from puna.run.references import Reference, default_names

    found = named(items)
    if isinstance(found, Mapping):
        return dict(found)
    names = default_names([Reference(text, "path") for text in found])
    if len(set(names)) < len(names):
        raise PunaError("two models have the same name", found=", ".join(names), fix="name them: NAME=MODEL")
    return dict(zip(names, found, strict=True))


def serve(
    models: Sequence[str],
    settings: ServerSettings,
    *,
    adapters: Sequence[str] = (),
    companions: Sequence[str] = (),
    heads: Sequence[str] = (),
    dtype: str = "float32",
    device: str = "cpu",
    engine: Mapping[str, Any] | None = None,
    page: bool = False,
    tell: Callable[[str], None] = print,
) -> None:
    """Serve ``models`` until SIGTERM or SIGINT; what runs then may end within ``drain_seconds``."""
    need_extra()
    from puna.serve.catalog import open_catalog
    from puna.serve.heads import Heads
    from puna.serve.house import House

    named, put_on = named_models(models), named_paths(adapters, "--adapter")
    opened = Heads(named_paths(heads, "--head"))
    listening = bind(settings)
    with listening:
        beside = named_paths(companions, "--companion")
        catalog = open_catalog(named, put_on, beside, dtype=dtype, device=device, engine=engine or {})
        house = House(catalog, settings, opened)
        warn(settings, tell)
        _run(make_server(house, listening, page=page, tell=tell), listening)


def need_extra() -> None:
    """A clear error where the extra's packages are missing."""
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise PunaError(
            "the server's packages are not installed",
            found=f"no {', '.join(missing)}",
            fix="pip install 'puna[serve]'",
        )


def bind(settings: ServerSettings) -> socket.socket:
    """The socket that the server will listen on, before any model is opened."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        raise PunaError(
            "the server cannot listen there",
            where=f"{settings.host}:{settings.port}",
            found=error.strerror or str(error),
            fix="choose another --port, or end what listens there",
        ) from None
    return made


def warn(settings: ServerSettings, tell: Callable[[str], None]) -> None:
    """Say what of the settings lets strangers in."""
    if not settings.is_loopback and settings.api_key is None:
        tell(
            f"warning: {settings.host} can be reached from other machines and there is no API key (--api-key)"
        )


def make_server(
    house: House, listening: socket.socket, *, page: bool = False, tell: Callable[[str], None] = print
) -> uvicorn.Server:
    """The server over ``house``, not running yet; ``tell`` is told where it listens once it does."""
    import uvicorn

    from puna.serve.app import create_app
    from puna.serve.protocol import bounded_protocol

    settings = house.settings
    app = create_app(house, page=page)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            tell(_where(house, listening, page=page))

    config = uvicorn.Config(
        app,
        http=bounded_protocol(settings),
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=min(settings.max_connections, 4096),
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds),
        h11_max_incomplete_event_size=settings.max_head_bytes,
    )
    return Server(config)


def _where(house: House, listening: socket.socket, *, page: bool) -> str:
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    names = ", ".join(house.catalog)
    lines = [f"serving {names} at http://{shown}:{port}/v1"]
    if page:
        lines.append(f"the page is at http://{shown}:{port}/ui/")
    return "\n".join(lines)


def _run(server: uvicorn.Server, listening: socket.socket) -> None:
    """Run until a signal; a signal that was obeyed is no failure of the process."""

    def stop(number: int, frame: types.FrameType | None) -> None:
        server.should_exit = True

    # uvicorn raises the signal again once it has drained; it finds this harmless handler then.
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.stdout.flush()
