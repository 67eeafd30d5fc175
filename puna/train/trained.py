"""The model that a training works on: opened, prepared for what is trained of it, written at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.files import fingerprint, read_json, write_json
from puna.core.stage import Context
from puna.model.adapters import (
    AdapterState,
    LoraSettings,
    add_lora,
    merge_lora,
    parameters_in_full,
    quantize_for,
)
from puna.model.labels import require_words
from puna.model.light_adapter import add_light
from puna.model.llama import Llama
from puna.model.masked_lora import hold_zeros, nonzero_places
from puna.model.nf4 import held_bytes, take_quantised
from puna.model.probe import difference, probe
from puna.text import pretrained
from puna.train.distributed import World
from puna.train.dropout import quicken
from puna.train.light import light_settings, write_light
from puna.train.loop import Loop
from puna.train.settings import Lora
from puna.train.sharding import is_sharded
from puna.train.stages import Train
from puna.train.twins import free_twins

ADAPTERS, MODELS, STEP = "adapters", "models", "step-"
"""The folders that ``adapter_steps`` and ``model_steps`` leave, and how each name in them begins."""
SEEN = "seen.json"
"""Beside models: what each of them had seen by then."""


def open_model(context: Context, parameters: Train, here: World, seed: int) -> tuple[Llama, dict[str, float]]:
    """The model to train, and how far what was done to it moves the logits of the probe before training.

    A new adapter moves no bit (``start_difference`` 0.0); a base put into NF4 moves them
    (``nf4_difference``). The input ``adapter``, if there is one, takes the new one's place behind that.
    """
    dtype = dtype_of(context, parameters)
    if context.inputs.get("adapter") is not None and (parameters.lora is None or parameters.keep_zeros):
        raise PunaError(
            "an adapter that is gone on with needs lora, without keep_zeros",
            where="adapter",
            found=context.inputs["adapter"],
            fix="give lora the rank, alpha and targets that the adapter has",
        )
    if dtype not in ("float32", "bfloat16"):
        raise PunaError("training computes in float32 or bfloat16", where="dtype", found=dtype)
    # What is shared out is whole in main memory first: a GPU need not hold it.
    device = "cpu" if is_shared_out(parameters, here) else str(here.device)
    model = base_model(context.inputs["model"], parameters, dtype, device)
    require_words(model, "training on text")
    if model.tokenizer is None:
        raise PunaError("the model has no tokenizer", where=model.source, fix="put tokenizer.json beside it")
    moved: dict[str, float] = {}
    if parameters.lora is not None:
        settings = lora_settings(parameters.lora)
        places = nonzero_places(model) if parameters.keep_zeros else None
        before = probe(model)
        if quantize_for(model, settings):
            before, exact = probe(model), before
            moved["nf4_difference"] = difference(exact, before)
        add_lora(model, settings, seed=seed, places=places)
        moved["start_difference"] = difference(before, probe(model))
        if context.inputs.get("adapter") is not None:
            take_adapter(model, context.inputs["adapter"], dtype, device)
    elif parameters.adapter is not None:
        before = probe(model)
        add_light(model, light_settings(parameters.adapter), seed=seed)
        moved["start_difference"] = difference(before, probe(model))
    elif parameters.twins is not None:
        free_twins(model, inserted=parameters.twins.inserted, hold_share=parameters.twins.hold_share)
    else:
        frozen = set(parameters_in_full(model, parameters.frozen))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        if parameters.keep_zeros:
            hold_zeros(model)
    moved["weight_bytes"] = float(held_bytes(model))
    if here.device.type == "cpu":
        quicken(model)
    return model, moved


def base_model(source: str | Path, parameters: Train, dtype: str, device: str) -> Llama:
    """The model as it is before anything is added: opened, its own adapter merged."""
    model = pretrained.load(source, dtype=dtype, device=device)
    if model.adapter is not None:
        if parameters.lora is not None and parameters.save_adapter:
            raise PunaError(
                "the new adapter cannot be written: the base it is for exists nowhere but here",
                where=source,
                found="a model that is itself an adapter",
                fix="set save_adapter: false, or convert the model to a plain folder first",
            )
        merge_lora(model)
    return model


def take_adapter(model: Llama, source: str | Path, dtype: str, device: str) -> None:
    """Give the adapter in ``model`` the weights of the one in ``source``, of its form and of its base."""
    given = pretrained.load(source, dtype=dtype, device=device)
    if not isinstance(given.adapter, AdapterState) or not isinstance(model.adapter, AdapterState):
        raise PunaError(
            "not a LoRA to go on with", where=source, expected="the output adapter of a stage train"
        )
    ours, theirs = _form(model, model.adapter), _form(given, given.adapter)
    if ours != theirs:
        name = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        raise PunaError(
            "the adapter has another form than lora says",
            where=source,
            found=f"{name}: {theirs.get(name, 'nothing')}",
            expected=ours.get(name, "nothing"),
            fix="give lora the rank, alpha and targets that the adapter has",
        )
    weights = dict(given.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in ours:
                parameter.copy_(weights[name])
            elif name in weights and not torch.equal(parameter, weights[name]):
                raise PunaError(
                    "the adapter was trained on another model than this one",
                    where=source,
                    found=f"another {name}",
                    fix="give the stage the model that the adapter belongs to",
                )


def _form(model: Llama, adapter: AdapterState) -> dict[str, object]:
    """Shapes of what an adapter trains, by name, and how it counts."""
    shapes: dict[str, object] = {
        name: list(parameter.shape)
        for name, parameter in model.named_parameters()
        if ".lora_" in name or name in adapter.full
    }
    config = adapter.config
    return {**shapes, "alpha": float(config.lora_alpha), "rslora": bool(config.use_rslora)}


def lora_settings(lora: Lora, *more: str) -> LoraSettings:
    """The same for the decoder; ``more`` modules are trained in full beside the adapter."""
    full = (*lora.full, *more)
    return LoraSettings(
        lora.r, lora.alpha, lora.dropout, lora.target, lora.rslora, full, lora.dora, lora.base
    )


def leave_adapters(context: Context, parameters: Train, here: World) -> Callable[[Loop], None] | None:
    """What leaves the adapter as it is behind every so many steps, and behind the last."""
    every = parameters.adapter_steps
    if every is None or not here.is_main:
        return None

    def leave(loop: Loop) -> None:
        step = loop.state.step
        if step % every == 0 or step == loop.settings.last_step:
            folder = context.out / ADAPTERS / f"{STEP}{step}"
            masters = loop.optimizer.weights()
            pretrained.save(loop.model, folder, "adapter", within=context.out.parent, weights=masters)

    return leave


def leave_models(context: Context, parameters: Train, here: World) -> Callable[[Loop], None] | None:
    """What leaves the whole model as it is behind every so many steps, and behind the last."""
    every = parameters.model_steps
    if every is None or not here.is_main:
        return None
    folder = context.out / MODELS

    def leave(loop: Loop) -> None:
        step = loop.state.step
        if step % every and step != loop.settings.last_step:
            return
        kind = pretrained.DTYPES[parameters.save_dtype]
        weights = {**loop.model.state_dict(), **dict(loop.optimizer.weights())}
        left = Llama(loop.model.spec, device="meta")
        left.load_state_dict({name: tensor.to(kind) for name, tensor in weights.items()}, assign=True)
        left.tokenizer, left.template = loop.model.tokenizer, loop.model.template
        pretrained.save(left, folder / f"{STEP}{step}")
        seen = read_json(folder / SEEN) if (folder / SEEN).is_file() else {}
        write_json(folder / SEEN, {**seen, f"{STEP}{step}": {"step": step, "tokens": loop.state.tokens}})

    return leave


def dtype_of(context: Context, parameters: Train) -> str:
    """What the model computes in."""
    return parameters.dtype or context.dtype


def weights_fingerprint(model: Llama) -> str:
    """A fingerprint of all weights before training: the sum of each tensor's bits as integers."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    sums = {
        name: int(tensor.view(integers[tensor.element_size()]).sum(dtype=torch.int64))
        for name, tensor in model.state_dict().items()  # codes and scales in NF4 are no parameters
    }
    return fingerprint(sums)


def write_model(
    context: Context,
    parameters: Train,
    model: Llama,
    masters: Iterable[tuple[str, Tensor]],
    seed: int,
    here: World,
) -> dict[str, Path]:
    """Save the model, and the adapter on its own where there is one; only the first process writes.

    ``masters`` come one at a time, of sharded ones with the help of all processes. They are float32, and
    go into a float32 model: the trained one if all of it was trained and lies here, else the base opened
    again, so that an adapter is merged into weights that were never rounded. An adapter of a base in NF4
    is merged into the decoded base, which is what it was trained on: codes and scales are taken from the
    trained model, and decoded in float32.
    """
    folder, adapter = context.out / "model", context.out / "adapter"
    if parameters.adapter is not None and here.is_main:
        base = base_model(context.inputs["model"], parameters, "float32", "cpu")
        return write_light(context, parameters, base, masters, seed)
    outputs = {"model": folder}
    if parameters.lora is not None and parameters.save_adapter:
        outputs["adapter"] = adapter
    if not here.is_main:
        for _ in masters:
            raise AssertionError("whole weights are for the first process alone")
        return outputs
    some = parameters.lora is not None or parameters.frozen or parameters.twins is not None
    if not some and not is_sharded(model):
        final = model.float()
    else:
        final = base_model(context.inputs["model"], parameters, "float32", "cpu")
        places = nonzero_places(final) if parameters.keep_zeros and parameters.lora is not None else None
        take_quantised(final, model)
    if parameters.lora is not None:
        add_lora(final, lora_settings(parameters.lora), seed=seed, places=places)
    places = dict(final.named_parameters())
    with torch.no_grad():
        for name, master in masters:
            places[name].copy_(master)
    if "adapter" in outputs:
        # The folder of the run: model and adapter move with it.
        pretrained.save(final, adapter, "adapter", within=context.out.parent)
    if parameters.lora is not None:
        merge_lora(final)
    pretrained.save(final.to(pretrained.DTYPES[parameters.save_dtype]), folder)
    return outputs


def is_shared_out(parameters: Train, here: World) -> bool:
    """Whether weights are shared out: a single process has nobody to share with."""
    return parameters.sharding == "full" and here.size > 1
