"""LoRA in a decoder, through PEFT: adding, disabling, merging, and what is trained in full beside it.

PEFT wraps the projections. Modules trained in full (embedding, head, norms) stay plain modules that
are simply not frozen: with tied embeddings there is one tensor, and it is trained once. Only on
disk do they take PEFT's form (``adapter_files.py``).
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from puna.core.errors import PunaError, unknown_name
from puna.core.seeds import torch_generator
from puna.model.light_adapter import LightState, fold, refuse_prompts
from puna.model.llama import Llama
from puna.model.nf4 import (
    NF4Linear,
    dequantize_base,
    parameter_count,
    quantised_layers,
    quantize_base,
    replace_layer,
)
from puna.model.weights import EMBEDDING, HEAD, set_parameter

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BASES = ("as_is", "nf4")
NAME = "default"  # PEFT names adapters; a decoder carries one


@dataclass(frozen=True)
class LoraSettings:
    """A LoRA of rank ``r``: each target W becomes W + (alpha / r) B A, or alpha / sqrt(r) with ``rslora``.

    ``target`` names projections by the end of their name ("q_proj", "layers.0.mlp.up_proj").
    ``full`` names modules, in the same way, whose own weights are trained ("embed_tokens",
    "lm_head", "norm"). ``rslora`` is 2312.03732; ``dora`` adds a learnt magnitude for each row of W
    (2402.09353). With ``base`` "nf4" all projections that are not trained in full are held in NF4
    (QLoRA, 2305.14314); embeddings, head, norms and biases are not.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target: tuple[str, ...] = PROJECTIONS
    rslora: bool = False
    full: tuple[str, ...] = ()
    dora: bool = False
    base: str = "as_is"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise PunaError("the rank of a LoRA must be at least 1", found=self.r)
        if not self.alpha > 0:
            raise PunaError("alpha of a LoRA must be positive", found=self.alpha)
        if not 0 <= self.dropout < 1:
            raise PunaError("dropout of a LoRA must be at least 0 and below 1", found=self.dropout)
        if self.base not in BASES:
            raise unknown_name("base of a LoRA", self.base, BASES)
        if not self.target:
            raise PunaError("a LoRA needs a target", expected=f"for instance {', '.join(PROJECTIONS)}")


@dataclass(frozen=True)
class LoraReport:
    """What is trained: parameters counted, as a share of all, and the names of the trained tensors."""

    trainable: int
    total: int
    names: tuple[str, ...]

    @property
    def share(self) -> float:
        """Trained parameters over all parameters, the adapter's included."""
        return self.trainable / self.total

    def __str__(self) -> str:
        counts = f"{self.trainable:,} of {self.total:,} parameters trained ({self.share:.2%})"
        return f"{counts}, {len(self.names)} tensors"


@dataclass
class AdapterState:
    """What a decoder remembers of its adapter; held in ``Llama.adapter``.

    ``full`` are the parameters trained in full. ``base`` holds their values from before, in main
    memory, if they were asked for.
    """

    config: Any  # peft.LoraConfig
    full: tuple[str, ...]
    base: dict[str, Tensor] | None
    masked: bool = False  # its products are held to places, see ``masked_lora.py``


def refuse_second(model: Llama) -> None:
    """A decoder carries one adapter."""
    if model.adapter is not None:
        raise PunaError(
            "the model carries an adapter already", where=model.source, fix="merge it first (merge_lora)"
        )


def adapter_of(model: Llama, purpose: str) -> AdapterState:
    """The state of the model's adapter; :class:`PunaError` if it has none."""
    state = model.adapter
    if not isinstance(state, AdapterState):
        raise PunaError(
            f"the model has no adapter to {purpose}", where=model.source, fix="add_lora or read_adapter"
        )
    return state


def add_lora(
    model: Llama,
    settings: LoraSettings,
    *,
    seed: int,
    dtype: torch.dtype | None = None,
    keep_base: bool = False,
    places: Mapping[str, Tensor] | None = None,
) -> LoraReport:
    """Add a LoRA in place and freeze everything else. B is zero, so logits do not change by a bit.

    Only a base that is put into NF4 here changes them, by its rounding; :func:`quantize_for` does that alone.
    A is drawn as PEFT draws it (Kaiming uniform), but from a generator for each layer's name and
    ``seed``. New parameters take ``dtype`` (None: the model's). ``keep_base`` keeps a copy of what
    is trained in full, which :func:`adapter_disabled` needs. With ``places``, by projection, B A counts there
    alone (:mod:`puna.model.masked_lora`).
    Raises :class:`PunaError` for a target or full name that names nothing.
    """
    from peft import LoraConfig

    refuse_second(model)
    full = _check_names(model, settings)
    quantize_for(model, settings)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        task_type="CAUSAL_LM",
    )
    if places is not None and settings.dora:
        raise PunaError("a LoRA that is held to places has no magnitudes", where="dora", fix="leave dora out")
    inject(model, config, full, dtype=dtype, keep_base=keep_base, places=places)
    for name, layer in lora_layers(model):
        down = layer.lora_A[NAME].weight
        drawn = torch.empty(down.shape)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=torch_generator(seed, "lora", name))
        down.data.copy_(drawn)
    return report(model)


def quantize_for(model: Llama, settings: LoraSettings) -> int:
    """Put the base into the form that ``settings`` ask for, before the adapter comes; counts what changed."""
    if settings.base == "as_is":
        return 0
    full = _check_names(model, settings)
    return quantize_base(model, leave=frozenset(name.rpartition(".")[0] for name in full))


def _check_names(model: Llama, settings: LoraSettings) -> tuple[str, ...]:
    """The parameters trained in full; refuse names that match nothing or do not go together."""
    targets = _matches(model, settings.target, "target of LoRA", nn.Linear, NF4Linear)
    outside = [name for name in targets if not name.startswith("model.layers.")]
    if outside:
        raise PunaError(
            "a LoRA goes on the projections of the layers",
            found=outside[0],
            fix=f"train it in full instead: full=({outside[0].rpartition('.')[2]!r},)",
        )
    full = parameters_in_full(model, settings.full)
    both = [name for name in full if name.rpartition(".")[0] in targets]
    if both:
        raise PunaError(
            "a module cannot have a LoRA and be trained in full", found=both[0].rpartition(".")[0]
        )
    return full


def inject(
    model: Llama,
    config: Any,
    full: tuple[str, ...],
    *,
    dtype: torch.dtype | None,
    keep_base: bool,
    places: Mapping[str, Tensor] | None = None,
) -> None:
    """Put PEFT's layers in; freeze all parameters but theirs and those trained in full."""
    from peft import inject_adapter_in_model
    from peft.tuners.lora import Linear

    from puna.model.adapted import AdaptedLinear, MaskedLinear

    parameters = dict(model.named_parameters())
    base = None
    if keep_base:
        base = {name: parameters[name].detach().to("cpu", copy=True) for name in full}
    if places is None:
        config._register_custom_module({nn.Linear: AdaptedLinear, NF4Linear: Linear})
    else:
        config._register_custom_module({nn.Linear: MaskedLinear, NF4Linear: MaskedLinear})
    # PEFT draws from the global generator, and warns of a layer that is not its own.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type.*NF4Linear")
        inject_adapter_in_model(config, model, adapter_name=NAME)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(model.dtype if dtype is None else dtype)
        parameter.requires_grad_(".lora_" in name or name in full)
    if places is not None:
        for name, layer in lora_layers(model):
            layer.register_buffer("places", places[name].to(model.device), persistent=False)
    model.train(model.training)  # new layers start in training mode
    model.adapter = AdapterState(config, full, base, masked=places is not None)


def report(model: Llama) -> LoraReport:
    """Count what is trained now."""
    trained = {
        name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    return LoraReport(sum(trained.values()), parameter_count(model), tuple(trained))


def lora_layers(model: Llama) -> Iterator[tuple[str, Any]]:
    """Name and PEFT layer of each adapted projection."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            yield name, module


def parameters_in_full(model: Llama, names: tuple[str, ...]) -> tuple[str, ...]:
    """The parameters of the modules called ``names``; a tied head stands for the embedding."""
    own = [name for name in names if not (model.spec.tied and name == "lm_head")]
    found = dict.fromkeys(_matches(model, tuple(own), "module to train in full", nn.Module))
    for held, _ in quantised_layers(model):
        if any(held == module or held.startswith(f"{module}.") for module in found):
            raise PunaError(
                "a matrix held in NF4 cannot be trained in full",
                where=model.source,
                found=held,
                fix="add the LoRA to the plain model with base nf4, which leaves it as it is",
            )
    parameters = [
        f"{module}.{name}" for module in found for name, _ in model.get_submodule(module).named_parameters()
    ]
    if len(own) < len(names):
        parameters.insert(0, EMBEDDING)
    return tuple(dict.fromkeys(parameters))


def _matches(model: Llama, names: tuple[str, ...], kind: str, *types: type[nn.Module]) -> list[str]:
    """Modules whose dotted name ends in one of ``names``; each name must match."""
    modules = [name for name, module in model.named_modules() if name and isinstance(module, types)]
    found: list[str] = []
    for wanted in names:
        hits = [name for name in modules if f".{name}".endswith(f".{wanted}")]
        if not hits:
            short = {name.rpartition(".")[2] for name in modules}
            raise unknown_name(
                kind, wanted, (name for name in short if not name.isdigit()), where=model.source
            )
        found += hits
    return found


def _merge(layer: Any) -> None:
    """Add the adapter to the base weight, in float32 and rounded once; a base in NF4 becomes plain."""
    base = layer.get_base_layer()
    dtype = base.weight.dtype if isinstance(base, nn.Linear) else base.dtype
    if isinstance(base, NF4Linear):
        layer.base_layer = base.plain(torch.float32)
    dtypes = {name: parameter.dtype for name, parameter in layer.named_parameters()}
    layer.float()
    layer.merge()
    for name, parameter in layer.named_parameters():
        parameter.data = parameter.data.to(dtype if name.startswith("base_layer.") else dtypes[name])


def merge_lora(model: Llama) -> None:
    """Add the adapter to the weights and go back to plain layers, in place; nothing stays frozen.

    Sums are made in float32: logits stay within 1e-5 in a float32 model, and within one rounding of
    the weights otherwise. Scales and biases (:mod:`puna.model.light_adapter`) are folded in; attention
    prompts, which are no weights, are an error. What is held in NF4 is decoded, adapted or not: the adapter
    belongs to the decoded weights, for with them it was trained.
    """
    if isinstance(model.adapter, LightState):
        refuse_prompts(model, "merged into weights")
        fold(model)
        return
    adapter_of(model, "merge")
    for _, layer in lora_layers(model):
        _merge(layer)
    remove(model)
    dequantize_base(model)
    model.requires_grad_(True)


def remove(model: Llama) -> None:
    """Take PEFT's layers out, whatever they hold, leaving what they lie over and no parameter frozen."""
    for name, layer in lora_layers(model):
        replace_layer(model, name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.adapter = None
    model.requires_grad_(True)


@contextlib.contextmanager
def adapter_merged(model: Llama) -> Iterator[Llama]:
    """Within the block the adapter is added to the weights, so that decoding pays nothing for it.

    Afterwards the weights are what they were, bit for bit; a copy of the adapted matrices is held meanwhile.
    """
    adapter_of(model, "merge")
    layers = [layer for _, layer in lora_layers(model)]
    bases = [layer.get_base_layer() for layer in layers]
    copies = [{name: part.detach().clone() for name, part in layer.named_parameters()} for layer in layers]
    try:
        for layer in layers:
            _merge(layer)
        yield model
    finally:
        for layer, base, copy in zip(layers, bases, copies, strict=True):
            if layer.merged:
                layer.unmerge()
            layer.base_layer = base  # another one if it is held in NF4
            for name, parameter in layer.named_parameters():
                parameter.data.copy_(copy[name])


@contextlib.contextmanager
def adapter_disabled(model: Llama) -> Iterator[Llama]:
    """Within the block the model computes what it did before the adapter, bit for bit.

    If modules are trained in full this needs their values from before: ``keep_base=True`` when the
    adapter was added or read.
    """
    state = adapter_of(model, "disable")
    if state.full and state.base is None:
        raise PunaError(
            "the values from before training in full were not kept",
            where=model.source,
            found=", ".join(state.full),
            fix="add or read the adapter with keep_base=True",
        )
    layers = [layer for _, layer in lora_layers(model)]
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    parameters = dict(model.named_parameters())
    adapted = {name: parameters[name].data for name in state.base or {}}
    try:
        for layer in layers:
            layer.enable_adapters(False)
        for name, values in (state.base or {}).items():
            parameters[name].data = values.to(parameters[name].device)
        yield model
    finally:
        for name, values in adapted.items():
            parameters[name].data = values
        for layer in layers:
            layer.enable_adapters(True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])


def untie(model: Llama) -> None:
    """Give a tied model a head of its own, equal to the embedding for now."""
    if not model.spec.tied:
        return
    embedding = model.model.embed_tokens.weight
    with torch.device("meta"):
        model.lm_head = nn.Linear(model.spec.hidden_size, model.spec.vocab_size, bias=False)
    set_parameter(model, HEAD, embedding.detach().clone())
    model.spec = model.spec.replace(tied=False)
