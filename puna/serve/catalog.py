"""The models of a server: each opened once, with an engine and a thread of its own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError, nearest
from puna.core.hardware import release_memory
from puna.serve.errors import ApiError
from puna.serve.told import TokenTexts

if TYPE_CHECKING:
    from puna.decode.background import EngineThread
    from puna.decode.engine import Engine
    from puna.model.llama import Llama


@dataclass
class Served:
    """A model under the name that requests give; ``parent`` is the name of what an adapter is put on."""

    name: str
    engine: Engine
    thread: EngineThread
    parent: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together."""
        return self.engine.model.spec.max_positions

    def check_length(self, text: str, param: str) -> None:
        """Refuse a text that cannot fit the context before anyone tokenises it."""
        if len(text) > self.context * self.texts.longest:
            raise ApiError(
                400,
                f"{len(text):,} characters do not fit a context of {self.context:,} tokens",
                param=param,
                code="context_length_exceeded",
            )

    @cached_property
    def texts(self) -> TokenTexts:
        """The text of single tokens."""
        return TokenTexts(self.engine.tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        """What OpenAI's interface calls the system's fingerprint: version and kernels."""
        from puna import __version__

        return f"puna-{__version__}-{self.engine.kernels}"


class Catalog(dict[str, Served]):
    """Served models by name, the first one first."""

    def find(self, name: str) -> Served:
        """A model by name; an unknown one is 404, as OpenAI's interface has it."""
        if name in self:
            return self[name]
        close = nearest(name, self)
        hint = f", did you mean {close!r}?" if close else "."
        raise ApiError(
            404,
            f"the model {name!r} does not exist here{hint} There are: {', '.join(self)}",
            param="model",
            code="model_not_found",
        )

    def start(self) -> None:
        """Let the engines run."""
        for served in self.values():
            served.thread.start()

    def stop(self, *, drain: bool) -> None:
        """Let what runs end, or cancel it, and stop the engines."""
        for served in self.values():
            served.thread.stop(drain=drain)


def open_catalog(
    models: Mapping[str, str],
    adapters: Mapping[str, str],
    companions: Mapping[str, str],
    *,
    dtype: str,
    device: str,
    engine: Mapping[str, Any],
) -> Catalog:
    """Open ``models``, each adapter on the first of them, and ``companions`` for strategies that use them.

    ``engine`` are settings of every engine. An adapter is added to the matrices that it touches, in a copy of
    these alone; the rest of the model is held once, as companions are.
    """
    from puna.model.adapter_files import merged_copy
    from puna.text.pretrained import load_merged, read_tokenizer, settle_tokens
    from puna.text.template import find_template

    if not models:
        raise PunaError("no model to serve", expected="at least one")
    twice = sorted(set(models) & set(adapters))
    if twice:
        raise PunaError("a model and an adapter have the same name", found=twice[0], fix="NAME=path")
    beside = {name: load_merged(source, dtype=dtype, device=device) for name, source in companions.items()}
    catalog = Catalog()
    like = None
    for name, source in models.items():
        model = load_merged(source, dtype=dtype, device=device)
        catalog[name] = serve_model(name, model, beside, engine, like=like)
        like = like or catalog[name].engine
    first = next(iter(models))
    for name, folder in adapters.items():
        model = merged_copy(catalog[first].engine.model, folder)
        tokenizer = read_tokenizer(folder)
        if tokenizer is not None:  # what lies beside an adapter was trained with it
            model.tokenizer, model.template = tokenizer, find_template(tokenizer)
            settle_tokens(model)
        catalog[name] = serve_model(name, model, beside, engine, like=like, parent=first)
        del model
        let_go(catalog)  # one adapter's merged matrices at a time
    return catalog


def let_go(catalog: Catalog) -> None:
    """Free the matrices that adapters were added to, where the kernels run on packed copies of them."""
    from puna.model.weights import set_parameter

    loaded = [(served.parent, each) for served in catalog.values() for each in served.engine.models.values()]
    kept = {
        id(parameter)
        for parent, each in loaded
        if parent is None or each.stepper.name == "plain"
        for parameter in each.model.parameters()
    }
    for _, each in loaded:
        for name, parameter in list(each.model.named_parameters()):
            if name.startswith("model.layers.") and id(parameter) not in kept:
                set_parameter(each.model, name, parameter.detach().to("meta"))
    release_memory()


def serve_model(
    name: str,
    model: Llama,
    companions: Mapping[str, Llama] | None = None,
    engine: Mapping[str, Any] | None = None,
    *,
    like: Engine | None = None,
    parent: str | None = None,
) -> Served:
    """A model with an engine of its own, not running yet; ``like`` as :class:`Engine` has it."""
    from puna.decode.background import EngineThread
    from puna.decode.engine import Engine

    made = Engine(model, models=dict(companions or {}), like=like, **(engine or {}))
    return Served(name, made, EngineThread(made), parent)
