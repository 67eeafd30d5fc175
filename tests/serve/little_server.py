"""A real server over a tiny Llama, in a thread of the test's process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from puna.serve.catalog import Catalog, serve_model
from puna.serve.heads import Heads
from puna.serve.house import House
from puna.serve.run import bind, make_server
from puna.serve.settings import ServerSettings


def tiny_model(tokenizer: Any, seed: int = 0, *, positions: int = 2048) -> Any:
    """A random decoder that chats, with peaky predictions so that greedy texts differ."""
    from puna.core.seeds import torch_generator
    from puna.model.llama import Llama
    from puna.model.spec import BlockSpec, LlamaSpec
    from puna.text.template import CHATML, Template

    block = BlockSpec(heads=4, kv_heads=2, head_dim=12, width=96)
    spec = LlamaSpec(tokenizer.vocab_size, 48, (block, block), tied=False, max_positions=positions)
    model: Any = Llama(spec, generator=torch_generator(seed, "tiny"))
    for parameter in model.parameters():
        parameter.data.mul_(4)
    model.lm_head.weight.data[list(tokenizer.stop_ids)] = (
        0  # never the likeliest: texts do not end by themselves
    )
    model.tokenizer = tokenizer
    model.template = Template(CHATML, tokenizer.template_strings)
    return model


def slowed(catalog: Catalog, seconds: float = 0.01) -> Catalog:
    """The models with steps that take so long at least: tiny ones are done before anyone can interfere."""
    for served in catalog.values():
        for loaded in served.engine._models.values():
            loaded.stepper.step = _slow(loaded.stepper.step, seconds)  # type: ignore[method-assign]
    return catalog


def _slow(step: Any, seconds: float) -> Any:
    def slow(reads: Any) -> Any:
        time.sleep(seconds)
        return step(reads)

    return slow


class Live:
    """A server that answers at ``url``."""

    def __init__(self, house: House, url: str) -> None:
        self.house = house
        self.url = url
        self.port = int(url.rpartition(":")[2])
        key = house.settings.api_key
        self.http = httpx.Client(
            base_url=url, timeout=30, headers={"Authorization": f"Bearer {key}"} if key else {}
        )

    def post(self, path: str, **body: Any) -> httpx.Response:
        """POST a JSON body."""
        return self.http.post(path, json=body)

    def completion(self, prompt: Any = "the cat", **body: Any) -> dict[str, Any]:
        """A completion that must succeed, greedy unless said otherwise."""
        answer = self.post(
            "/v1/completions",
            **{"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 8, **body},
        )
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def statistics(self) -> Any:
        """What the first model's engine counts."""
        return next(iter(self.house.catalog.values())).engine.statistics

    def settled(self, seconds: float = 10.0) -> bool:
        """Wait until nothing runs, waits or holds blocks; False if something still does."""

        def still() -> bool:
            found = self.statistics()
            return not (found.running or found.waiting or found.blocks_used or self.house.desk.open)

        return wait_for(still, seconds)


def wait_for(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Wait until something holds; False if it does not in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@contextmanager
def live(
    catalog: Catalog, *, page: bool = False, heads: dict[str, str] | None = None, **settings: Any
) -> Iterator[Live]:
    """Run a server over ``catalog``; it has ended when the block has."""
    chosen = ServerSettings.of(**{"port": 0, **settings})
    house = House(catalog, chosen, Heads(heads or {}))
    listening = bind(chosen)
    server = make_server(house, listening, page=page, tell=lambda text: None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)
    found = Live(house, f"http://127.0.0.1:{listening.getsockname()[1]}")
    try:
        yield found
    finally:
        found.http.close()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"


def tiny_catalog(tokenizer: Any, *names: str, **engine: Any) -> Catalog:
    """Tiny models under these names, different ones."""
    catalog = Catalog()
    for seed, name in enumerate(names or ("tiny",)):
        catalog[name] = serve_model(name, tiny_model(tokenizer, seed), None, {"cache_tokens": 4096, **engine})
    return catalog
