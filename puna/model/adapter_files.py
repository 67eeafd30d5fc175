"""Adapters on disk, in PEFT's layout: adapter_config.json and adapter_model.safetensors.

Modules trained in full are PEFT's ``modules_to_save``. Of a tied model both the embedding and the
head are written, with ``ensure_weight_tying``: PEFT then ties them again and asks for both tensors.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.files import folder_aside, read_json, write_json
from puna.model.adapters import (
    NAME,
    LoraReport,
    adapter_of,
    inject,
    lora_layers,
    merge_lora,
    refuse_second,
    remove,
    report,
    untie,
)
from puna.model.hf import OWN_CONFIG, SafetensorsFile, refuse_pickle
from puna.model.labels import add_label_head, labels_in
from puna.model.light_adapter import LightState
from puna.model.light_files import holds_prompts, read_prompts, write_prompts
from puna.model.llama import Llama
from puna.model.masked_lora import MASKED_TYPE, PLACES, pack_places, unpack_places
from puna.model.weights import EMBEDDING, HEAD, check_finite, check_shapes

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_EMBEDDING_MODULE, _HEAD_MODULE = EMBEDDING.rpartition(".")[0], HEAD.rpartition(".")[0]
# Options of PEFT's LoRA that are honoured; any other must be at its default.
_HONOURED = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "lora_bias",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "ensure_weight_tying",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
}
# Options that say nothing about the computation of a trained adapter.
_INDIFFERENT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
}
# Ways of drawing A and B that leave the base weights alone.
_HARMLESS_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")


def write_adapter(
    model: Llama, folder: Path | str, *, base_name: str, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write the model's adapter as a folder that peft opens on ``base_name``, with identical logits.

    ``weights``, by parameter, are written in place of those that the model computes with: masters.
    """
    from peft import get_peft_model_state_dict

    if isinstance(model.adapter, LightState):
        write_prompts(model, folder, base_name=base_name)
        return
    state = adapter_of(model, "write")
    # "auto" would ask the hub about base_name; what is trained in full is added below.
    own = {**model.state_dict(), **(weights or {})}
    tensors: dict[str, Tensor] = get_peft_model_state_dict(
        model, state_dict=own, adapter_name=NAME, save_embedding_layers=False
    )
    parameters = {**dict(model.named_parameters()), **(weights or {})}
    tensors |= {name: parameters[name] for name in state.full}
    shared = model.spec.tied and EMBEDDING in state.full
    if shared:
        tensors[HEAD] = parameters[EMBEDDING]
    modules = dict.fromkeys(name.rpartition(".")[0] for name in state.full)
    if shared:
        modules[_HEAD_MODULE] = None
    for name, tensor in tensors.items():
        check_finite(name, tensor.detach(), folder)
    config = {
        **{key: _plain(value) for key, value in state.config.to_dict().items()},
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        # peft takes every module whose name ends so: whole names, but for the usual short one.
        "modules_to_save": ["embed_tokens" if name == _EMBEDDING_MODULE else name for name in modules]
        or None,
        "ensure_weight_tying": shared,
        **({"peft_type": MASKED_TYPE} if state.masked else {}),
    }
    beside: dict[str, Any] = {}
    if model.labels is not None:
        config["task_type"] = "SEQ_CLS" if model.labels.per == "text" else "TOKEN_CLS"
        beside = {**model.labels.to_config("LlamaForCausalLM"), "bias": model.labels.bias}
    if model.spec.layers_both_ways:
        beside["layers_both_ways"] = list(model.spec.layers_both_ways)
    with folder_aside(folder) as aside:
        write_json(aside / ADAPTER_CONFIG, config)
        if beside:
            write_json(aside / OWN_CONFIG, beside)
        stored = {
            PREFIX + name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()
        }
        save_file(stored, aside / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        if state.masked:
            bits = {f"{name}.weight": pack_places(layer.places) for name, layer in lora_layers(model)}
            save_file(bits, aside / PLACES)


def prepare_base(model: Llama, folder: Path | str) -> None:
    """Give ``model``, in place, what the adapter of ``folder`` needs: a head for labels, its masks."""
    file = Path(folder) / OWN_CONFIG
    if not file.exists():
        return
    stated = read_json(file)
    if not isinstance(stated, dict):
        raise PunaError("not what an adapter needs", where=file, expected="a JSON object")
    labels = labels_in(stated, bias=bool(stated.get("bias")), where=file)
    if labels is not None and model.labels is None:
        add_label_head(model, labels, seed=0)  # the adapter holds the head that was trained
    both_ways = stated.get("layers_both_ways", [])
    blocks = enumerate(model.spec.blocks)
    model.set_blocks(
        tuple(dataclasses.replace(block, causal=layer not in both_ways) for layer, block in blocks)
    )


def _plain(value: Any) -> Any:
    """JSON-like, sets in a fixed order."""
    if isinstance(value, enum.Enum):
        return value.value
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def read_adapter(
    model: Llama,
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    trainable: bool = False,
    keep_base: bool = False,
) -> LoraReport:
    """Put the LoRA adapter of ``folder``, made here or by peft, into ``model`` in place.

    Adapter parameters take ``dtype`` (None: the model's) and are frozen unless ``trainable``. Where
    an adapter holds an embedding and a head that differ, a tied model is untied. ``keep_base`` as in
    :func:`puna.model.adapters.add_lora`. On an error the model is as before.
    """
    refuse_second(model)
    folder = Path(folder)
    if holds_prompts(folder):
        read_prompts(model, folder)
        return report(model)
    config = _read_config(folder)
    if not (folder / ADAPTER_WEIGHTS).exists():
        refuse_pickle(folder)
    file = SafetensorsFile(folder / ADAPTER_WEIGHTS)
    names = {name.removeprefix(PREFIX): name for name in file.shapes}
    adapter = {name: stored for name, stored in names.items() if re.search(r"\.lora_[A-Za-z_]+(\.|$)", name)}
    full = {name: file.get(stored) for name, stored in names.items() if name not in adapter}
    for name in adapter:
        if not name.startswith("model.layers."):
            raise PunaError(
                "a LoRA on the embedding or the head is not computed here",
                where=folder,
                found=name,
                fix="merge it into its base with peft (merge_and_unload) and open the result",
            )
    full = _settle_tied(model, full)
    _check_full(model, full, folder)
    _inject_checked(model, config, adapter, file, tuple(full), dtype=dtype, keep_base=keep_base)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in full.items():
            parameters[name].copy_(tensor)
    counted = report(model)
    if not trainable:
        model.requires_grad_(False)
    return counted


def is_masked(folder: Path) -> bool:
    """Whether the adapter of a folder counts at some places of its matrices alone."""
    stated = read_json(folder / ADAPTER_CONFIG)
    return isinstance(stated, dict) and stated.get("peft_type") == MASKED_TYPE


@dataclass(frozen=True)
class StoredAdapter:
    """A LoRA adapter on disk, by the names of the weights it changes; nothing of it is in a decoder.

    ``low_rank`` holds of each weight A [rank, in], B [out, rank], both float32, and the scale of their
    product; ``full`` names in the file the tensors that replace a weight; ``places`` where alone a product
    counts, bool [out, in], if that is not everywhere.
    """

    where: Path
    low_rank: Mapping[str, tuple[Tensor, Tensor, float]]
    full: Mapping[str, str]
    _file: SafetensorsFile
    places: Mapping[str, Tensor] = field(default_factory=dict)

    def product(self, name: str) -> Tensor:
        """scale * B A of the whole weight, at its places alone."""
        down, up, scale = self.low_rank[name]
        whole = (up @ down).mul_(scale)
        return whole.mul_(self.places[name]) if name in self.places else whole

    def low_rank_part(self, name: str, start: int, stop: int, shape: tuple[int, ...]) -> Tensor | None:
        """scale * B A of the weights from ``start`` to ``stop`` laid out flat, whole rows of ``shape``."""
        if name not in self.low_rank:
            return None
        down, up, scale = self.low_rank[name]
        width = shape[-1]
        rows = up[start // width : -(-stop // width)]
        product = (rows @ down).mul_(scale)
        if name in self.places:
            product.mul_(self.places[name][start // width : -(-stop // width)])
        product = product.view(-1)
        first = start - start // width * width
        return product[first : first + stop - start]

    def full_part(self, name: str, start: int, stop: int) -> Tensor:
        """The same part of a tensor that replaces the weight, float32."""
        return self._file.part(self.full[name], start, stop).float()


def open_adapter(folder: Path | str, shapes: Mapping[str, tuple[int, ...]]) -> StoredAdapter:
    """The adapter of ``folder`` for a model with weights of ``shapes``, to be added as those are read.

    DoRA and trained biases, which are no product of two matrices, are errors; so is an embedding that
    differs from its head where ``shapes`` has one matrix for both.
    """
    folder = Path(folder)
    config = _read_config(folder, masked=True)
    if config.use_dora or config.lora_bias:
        raise PunaError(
            "a DoRA or a LoRA with biases is no difference of low rank",
            where=folder,
            fix="merge it into its base first and give the whole model",
        )
    if not (folder / ADAPTER_WEIGHTS).exists():
        refuse_pickle(folder)
    file = SafetensorsFile(folder / ADAPTER_WEIGHTS)
    names = {name.removeprefix(PREFIX): name for name in file.shapes}
    full = {name: stored for name, stored in names.items() if ".lora_" not in name}
    if HEAD in full and HEAD not in shapes:
        if EMBEDDING not in full or not torch.equal(file.get(full[HEAD]), file.get(full[EMBEDDING])):
            raise PunaError(
                "the adapter unties embedding and head of its base",
                where=folder,
                fix="merge it into its base first and give the whole model",
            )
        del full[HEAD]
    low: dict[str, tuple[Tensor, Tensor, float]] = {}
    for name, stored in names.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            down, up = file.get(stored).float(), file.get(names[f"{module}.lora_B.weight"]).float()
            low[f"{module}.weight"] = (down, up, _scale(config, module, down.shape[0]))
    found: dict[str, tuple[int, ...]] = {
        name: (up.shape[0], down.shape[1]) for name, (down, up, _) in low.items()
    }
    found |= {name: file.shapes[stored] for name, stored in full.items()}
    check_shapes({name: shapes[name] for name in found if name in shapes}, found, folder)
    return StoredAdapter(folder, low, full, file, _places(folder, found) if is_masked(folder) else {})


def _places(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Where alone a masked adapter changes each of its weights."""
    if not (folder / PLACES).is_file():
        raise PunaError(
            "the places that this adapter is held to are not there",
            where=folder,
            found=f"no {PLACES}",
            fix="copy it with the adapter's other files",
        )
    stored = load_file(folder / PLACES)
    if set(stored) != set(shapes):
        raise PunaError("the places are those of other weights", where=folder / PLACES)
    return {name: unpack_places(bits, shapes[name]) for name, bits in stored.items()}


def _scale(config: Any, module: str, rank: int) -> float:
    """What PEFT multiplies the product by: alpha / r or alpha / sqrt(r), alpha as its pattern may say."""
    from peft.utils.other import get_pattern_key

    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    return float(alpha / (rank**0.5 if config.use_rslora else rank))


def merged_copy(model: Llama, folder: Path | str) -> Llama:
    """A second decoder: ``model`` with the adapter of ``folder`` added to the weights.

    The parameters of modules that the adapter does not touch are ``model``'s own, not copies; so are its
    tokenizer and template. ``model`` stays as it is.
    """
    folder = Path(folder)
    touched = _touched_modules(folder)
    if model.spec.tied and _HEAD_MODULE in touched:
        touched.add(_EMBEDDING_MODULE)
    kept: list[Any] = [
        parameter for name, parameter in model.named_parameters() if name.rpartition(".")[0] not in touched
    ]
    kept += [model.tokenizer, model.template]
    frozen = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    try:
        copied = copy.deepcopy(model, {id(thing): thing for thing in kept})
        read_adapter(copied, folder)
        merge_lora(copied)
    finally:
        for parameter in model.parameters():  # an adapter freezes what it lies over
            parameter.requires_grad_(frozen[id(parameter)])
    return copied


def _touched_modules(folder: Path) -> set[str]:
    """The modules that an adapter changes, by the names of its tensors."""
    if not (folder / ADAPTER_WEIGHTS).exists():
        return set()  # what is wrong with it will be told by whoever reads it
    names = [name.removeprefix(PREFIX) for name in SafetensorsFile(folder / ADAPTER_WEIGHTS).shapes]
    return {name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0] for name in names}


def _read_config(folder: Path, *, masked: bool = False) -> Any:
    """The adapter's LoraConfig; an option that would be ignored is an error. Masked ones if they may be."""
    from peft import LoraConfig

    path = folder / ADAPTER_CONFIG
    stated = read_json(path)
    kind = stated.get("peft_type") if isinstance(stated, dict) else type(stated).__name__
    if kind != "LORA" and not (masked and kind == MASKED_TYPE):
        raise PunaError(
            "only LoRA adapters are read",
            where=path,
            found=kind,
            expected="peft_type LORA",
            fix="the stage recover_adapter puts it into the whole model" if kind == MASKED_TYPE else None,
        )
    defaults = LoraConfig().to_dict()
    for key, value in stated.items():
        if key in _HONOURED | _INDIFFERENT or (key in defaults and value in (None, False, defaults[key])):
            continue
        if key == "init_lora_weights" and value in _HARMLESS_INITIALISATIONS:
            continue
        if key not in defaults and not value:
            continue
        raise PunaError(
            f"option {key!r} of this adapter is not computed here",
            where=path,
            found=value,
            expected=defaults.get(key),
            fix="merge it into its base with peft (merge_and_unload) and open the result",
        )
    try:
        # Full modules stay plain modules here, so peft is not told of them.
        kept = {
            key: stated[key]
            for key in _HONOURED - {"modules_to_save", "ensure_weight_tying"}
            if key in stated
        }
        return LoraConfig(**kept, task_type="CAUSAL_LM")
    except (TypeError, ValueError) as error:
        raise PunaError("not a usable adapter config", where=path, found=error) from None


def _settle_tied(model: Llama, full: dict[str, Tensor]) -> dict[str, Tensor]:
    """Embedding and head of an adapter for a tied model: one tensor if they agree, else both."""
    if not model.spec.tied or not {EMBEDDING, HEAD} & full.keys():
        return full
    base = (
        model.model.embed_tokens.weight.detach().clone()
    )  # a copy: the embedding is written before the head
    embedding, head = full.get(EMBEDDING, base), full.get(HEAD, base)
    others = {name: tensor for name, tensor in full.items() if name not in (EMBEDDING, HEAD)}
    same = embedding.shape == head.shape and torch.equal(embedding.cpu().float(), head.cpu().float())
    return {EMBEDDING: embedding, **others} if same else {EMBEDDING: embedding, HEAD: head, **others}


def _check_full(model: Llama, full: Mapping[str, Tensor], folder: Path) -> None:
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if model.spec.tied:
        expected[HEAD] = expected[EMBEDDING]
    check_shapes(
        {name: shape for name, shape in expected.items() if name in full},
        {name: tuple(tensor.shape) for name, tensor in full.items()},
        folder,
    )
    for name, tensor in full.items():
        check_finite(name, tensor, folder)


def _inject_checked(
    model: Llama,
    config: Any,
    adapter: Mapping[str, str],
    file: SafetensorsFile,
    full: tuple[str, ...],
    *,
    dtype: torch.dtype | None,
    keep_base: bool,
) -> None:
    """Inject, then require exactly the file's tensors; on an error take the layers out again."""
    from peft import get_peft_model_state_dict

    was_tied = model.spec.tied
    try:
        if HEAD in full:
            untie(model)
        inject(model, config, full, dtype=dtype, keep_base=keep_base)
        targets = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
        found = {name: file.shapes[stored] for name, stored in adapter.items()}
        check_shapes({name: tuple(tensor.shape) for name, tensor in targets.items()}, found, file.path)
        for name, target in targets.items():
            target.copy_(file.get(adapter[name]))
            check_finite(name, target, file.path)
    except (PunaError, ValueError, TypeError) as error:
        remove(model)
        if was_tied and not model.spec.tied:
            del model.lm_head
            model.spec = model.spec.replace(tied=True)
        if isinstance(error, PunaError):
            raise
        raise PunaError("peft cannot place this adapter in the model", where=file.path, found=error) from None
