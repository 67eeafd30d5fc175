"""The commands ``puna serve`` and ``puna ui``: their options; everything else is imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from puna.options import Companions, Device, Dtype, Kernels, Quantized, parse_settings, show

ServedModels = Annotated[
    list[str], typer.Argument(metavar="[NAME=]MODEL...", help="Models to serve, under these names.")
]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="NAME=PATH", help="An adapter, put on the first model. Repeatable."),
]
Heads = Annotated[
    list[str] | None,
    typer.Option("--head", metavar="NAME=PATH", help="A head or plan for strategies. Repeatable."),
]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")]
ApiKey = Annotated[str | None, typer.Option(envvar="PUNA_API_KEY", help="What requests must carry.")]
CacheTokens = Annotated[int | None, typer.Option(min=16, help="Room for keys, in tokens of all requests.")]
Bounds = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Another bound or setting of the server. Repeatable."),
]


def serve(
    models: ServedModels,
    adapters: Adapters = None,
    companions: Companions = None,
    heads: Heads = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    quantize: Quantized = None,
    kernels: Kernels = "auto",
    cache_tokens: CacheTokens = None,
    settings: Bounds = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Serve models behind OpenAI's interface."""
    given = {"host": host, "port": port, "api_key": api_key, **parse_settings(settings)}
    layout = {"quantize": quantize, "kernels": kernels, "cache_tokens": cache_tokens}
    _serve(models, adapters, companions, heads, given, layout, device, dtype, page=False)


def ui(
    models: ServedModels,
    adapters: Adapters = None,
    companions: Companions = None,
    heads: Heads = None,
    runs: Annotated[Path, typer.Option(help="Folder of runs whose reports are shown.")] = Path("runs"),
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    quantize: Quantized = None,
    kernels: Kernels = "auto",
    cache_tokens: CacheTokens = None,
    settings: Bounds = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Serve models with a web page: chat, compare, runs."""
    given = {"host": host, "port": port, "api_key": api_key, "runs": runs, **parse_settings(settings)}
    layout = {"quantize": quantize, "kernels": kernels, "cache_tokens": cache_tokens}
    _serve(models, adapters, companions, heads, given, layout, device, dtype, page=True)


def _serve(
    models: list[str],
    adapters: list[str] | None,
    companions: list[str] | None,
    heads: list[str] | None,
    settings: dict[str, Any],
    layout: dict[str, Any],
    device: str | None,
    dtype: str | None,
    *,
    page: bool,
) -> None:
    from puna.run.machine import choose_device, choose_dtype
    from puna.serve.run import serve as run_server
    from puna.serve.settings import ServerSettings

    where = choose_device(device or "auto")
    run_server(
        models,
        ServerSettings.of(**settings),
        adapters=adapters or (),
        companions=companions or (),
        heads=heads or (),
        dtype=choose_dtype(dtype or "auto", where),
        device=where,
        engine=layout,
        page=page,
        tell=show,
    )
