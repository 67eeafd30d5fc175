"""Between Hugging Face configs and :class:`LlamaSpec`: model_type llama, qwen2, mistral, and puna's own.

Both ways of writing rope are read: ``rope_parameters`` (transformers 5) and ``rope_theta`` with
``rope_scaling`` (before); both are written, so that either generation opens the folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from puna.core.errors import PunaError, unknown_name
from puna.model.spec import BlockSpec, LlamaSpec, RopeRule

# Defaults of transformers' config classes for keys that a config.json may lack.
_COMMON = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu", "pad_token_id": None}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_key_value_heads": None,
    },
    "qwen2": {
        "max_position_embeddings": 32768,
        "bos_token_id": None,
        "eos_token_id": None,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "mistral": {
        "max_position_embeddings": 131072,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM"}

# RopeRule's field -> the key in a config.
_ROPE_KEYS = {
    "kind": "rope_type",
    "theta": "rope_theta",
    "original_max_positions": "original_max_position_embeddings",
    **{
        name: name
        for name in (
            "factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "short_factor",
            "long_factor",
            "low_freq_factor",
            "high_freq_factor",
        )
    },
}
# Keys that say nothing about the computation, or that are checked elsewhere.
_ROPE_IGNORED = {"type", "finetuned", "partial_rotary_factor"}


def spec_from_config(config: Mapping[str, Any], *, where: object = "config.json") -> LlamaSpec:
    """Read a config; an architecture or option that puna does not compute is one clear error."""
    try:
        return (
            _spec_from_own(config, where)
            if config.get("model_type") == "puna"
            else _spec_from_hf(config, where)
        )
    except PunaError as error:
        if str(error.where).startswith(str(where)):
            raise
        message = f"{error.where}: {error.message}"
        raise PunaError(
            message, where=where, found=error.found, expected=error.expected, fix=error.fix
        ) from None


def _spec_from_hf(config: Mapping[str, Any], where: object) -> LlamaSpec:
    kind = config.get("model_type")
    if kind not in _DEFAULTS:
        raise PunaError(
            "this architecture is not of the Llama family that puna computes",
            where=where,
            found=f"model_type {kind!r}, architectures {config.get('architectures')}",
            expected=f"model_type {', '.join(_DEFAULTS)}",
        )
    values = {**_COMMON, **_DEFAULTS[kind], **config}
    _refuse_options(values, where)
    layers = _number(values, "num_hidden_layers", where)
    heads = _number(values, "num_attention_heads", where)
    hidden_size = _number(values, "hidden_size", where)
    block = BlockSpec(
        heads=heads,
        kv_heads=heads if values["num_key_value_heads"] is None else values["num_key_value_heads"],
        head_dim=hidden_size // heads if values.get("head_dim") is None else values["head_dim"],
        rope=_read_rope(values, where),
        width=_number(values, "intermediate_size", where),
    )
    windows = _windows(kind, values, layers, where)
    return LlamaSpec(
        vocab_size=_number(values, "vocab_size", where),
        hidden_size=hidden_size,
        blocks=tuple(dataclasses.replace(block, window=window) for window in windows),
        norm_eps=values["rms_norm_eps"],
        tied=values["tie_word_embeddings"],
        attention_bias=_attention_bias(kind, values),
        mlp_bias=kind == "llama" and bool(values.get("mlp_bias", False)),
        max_positions=values["max_position_embeddings"],
        bos_id=values["bos_token_id"],
        eos_ids=_end_ids(values["eos_token_id"]),
        # -1 stands for "no padding" in early Llama checkpoints.
        pad_id=None if values["pad_token_id"] == -1 else values["pad_token_id"],
    )


def config_from_spec(spec: LlamaSpec, *, own: bool = False) -> dict[str, Any]:
    """The config.json of a spec; a spec that is not uniform gets model_type "puna" and its blocks in full.

    So does any with ``own``, for what no class of transformers computes.
    """
    kind = None if own else spec.architecture
    shared = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": len(spec.blocks),
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied,
        "max_position_embeddings": spec.max_positions,
        "bos_token_id": spec.bos_id,
        "eos_token_id": spec.eos_ids[0] if len(spec.eos_ids) == 1 else list(spec.eos_ids) or None,
        "pad_token_id": spec.pad_id,
    }
    if kind is None:
        return {
            "architectures": ["PunaForCausalLM"],
            "model_type": "puna",
            **shared,
            "attention_bias": spec.attention_bias,
            "mlp_bias": spec.mlp_bias,
            "blocks": [_block_to_dict(block) for block in spec.blocks],
        }
    block = spec.blocks[0]
    config = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        **shared,
        "intermediate_size": block.width,
        "num_attention_heads": block.heads,
        "num_key_value_heads": block.kv_heads,
        "head_dim": block.head_dim,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **_write_rope(block.rope),
    }
    if kind == "llama":
        config |= {"attention_bias": spec.attention_bias == "all", "mlp_bias": spec.mlp_bias}
    elif kind == "mistral":
        config |= {"sliding_window": block.window}
    elif block.window is not None:
        config |= {"use_sliding_window": True, "sliding_window": block.window, "max_window_layers": 0}
    else:
        config |= {"use_sliding_window": False}
    return config


def _refuse_options(values: Mapping[str, Any], where: object) -> None:
    """Options that change the computation in a way the decoder does not follow."""
    wanted: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", "swish"),
        "attention_dropout": (0, None),
        "partial_rotary_factor": (1, None),
        "quantization_config": (None,),
    }
    for key, good in wanted.items():
        if values.get(key) not in good:
            raise PunaError(
                f"{key} is not computed here",
                where=where,
                found=values[key],
                expected=good[0],
                fix="use an unquantised checkpoint" if key == "quantization_config" else None,
            )


def _number(values: Mapping[str, Any], key: str, where: object) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PunaError(f"{key} must be a positive whole number", where=where, found=value)
    return value


def _end_ids(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _attention_bias(kind: str, values: Mapping[str, Any]) -> Any:
    if kind == "qwen2":
        return "qkv"
    return "all" if kind == "llama" and values.get("attention_bias", False) else "none"


def _windows(kind: str, values: Mapping[str, Any], layers: int, where: object) -> list[int | None]:
    """The window of each layer, by transformers' rules for the architecture."""
    window = values.get("sliding_window") if kind == "mistral" or values.get("use_sliding_window") else None
    kinds = values.get("layer_types")
    if kind == "llama":
        return [None] * layers
    if kinds is None:
        first = values["max_window_layers"] if kind == "qwen2" else 0
        return [window if layer >= first else None for layer in range(layers)]
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or set(kinds) - {"full_attention", "sliding_attention"}
    ):
        raise PunaError(
            "layer_types must name full_attention or sliding_attention for each layer",
            where=where,
            found=kinds,
            expected=f"{layers} names",
        )
    if "sliding_attention" in kinds and window is None:
        raise PunaError("layer_types has sliding attention but no window is set", where=where, found=window)
    if kind == "mistral" and window is not None and "full_attention" in kinds:
        raise PunaError(
            "transformers ignores layer_types in a Mistral config and slides everywhere",
            where=where,
            found=kinds,
        )
    return [window if name == "sliding_attention" else None for name in kinds]


def _read_rope(values: Mapping[str, Any], where: object) -> RopeRule:
    """The rope rule from either generation of keys; priority as in transformers 5."""
    stated = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(stated, Mapping):
        raise PunaError("rope parameters must be a mapping", where=where, found=stated)
    kind: Any = stated.get("rope_type") or stated.get("type") or "default"
    fields = {key: name for name, key in _ROPE_KEYS.items()}
    for key in stated:
        if key not in fields and key not in _ROPE_IGNORED:
            raise unknown_name("rope parameter", str(key), [*fields, *_ROPE_IGNORED], where=where)
    if stated.get("partial_rotary_factor") not in (None, 1):
        raise PunaError(
            "partial_rotary_factor is not computed here",
            where=where,
            found=stated["partial_rotary_factor"],
            expected=1,
        )
    known: dict[str, Any] = {fields[key]: value for key, value in stated.items() if key in fields}
    theta = known.pop("theta", None)
    known.pop("kind", None)
    _settle_lengths(kind, known, values, where)
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    # transformers leaves aside parameters that belong to another kind; so do we.
    useful = {
        name: value for name, value in known.items() if name in RopeRule.parameters_of(kind, where=where)
    }
    if theta is None:
        theta = values.get("rope_theta")
    return RopeRule(kind=kind, theta=10000.0 if theta is None else theta, **useful)


def _settle_lengths(kind: str, known: dict[str, Any], values: Mapping[str, Any], where: object) -> None:
    """Fill in what transformers infers from the config's own lengths, so that a rule stands alone."""
    positions = values["max_position_embeddings"]
    if kind == "dynamic":
        known["original_max_positions"] = positions
    elif kind in ("yarn", "longrope", "llama3"):
        outer = values.get("original_max_position_embeddings")
        if outer is not None:
            known["original_max_positions"] = outer
        elif known.get("original_max_positions") is None:
            known["original_max_positions"] = positions
        if kind != "llama3" and known.get("factor") is None:
            original = known["original_max_positions"]
            if not all(isinstance(length, int) and length > 0 for length in (positions, original)):
                raise PunaError(
                    "lengths must be positive whole numbers", where=where, found=(positions, original)
                )
            known["factor"] = max(1.0, positions / original)


def _write_rope(rule: RopeRule) -> dict[str, Any]:
    """Both generations of rope keys for one rule."""
    stated = {key: getattr(rule, name) for name, key in _ROPE_KEYS.items() if getattr(rule, name) is not None}
    stated = {key: list(value) if isinstance(value, tuple) else value for key, value in stated.items()}
    if rule.kind == "dynamic":
        # Its original length is max_position_embeddings itself; transformers knows no such key here.
        del stated["original_max_position_embeddings"]
    # transformers 4 looks for LongRoPE's original length outside of the rope parameters.
    outside = {"original_max_position_embeddings": rule.original_max_positions}
    theta = stated.pop("rope_theta")
    return {
        **(outside if rule.kind == "longrope" else {}),
        "rope_theta": theta,
        "rope_scaling": None if rule.kind == "default" else dict(stated),
        "rope_parameters": {**stated, "rope_theta": theta},
    }


def _block_to_dict(block: BlockSpec) -> dict[str, Any]:
    """All fields that differ from their defaults, JSON-like."""
    written: dict[str, Any] = {"attention": block.attention, "feed_forward": block.feed_forward}
    for field in dataclasses.fields(block):
        value = getattr(block, field.name)
        if field.name == "rope":
            rule = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
            value = {
                name: list(item) if isinstance(item, tuple) else item
                for name, item in rule.items()
                if item is not None
            }
            if block.attention != "full":
                continue
        if value != field.default:
            written[field.name] = value
    return written


def _spec_from_own(config: Mapping[str, Any], where: object) -> LlamaSpec:
    """Read what :func:`config_from_spec` writes for a spec that is not uniform."""
    names = {field.name for field in dataclasses.fields(BlockSpec)}
    rope_names = {field.name for field in dataclasses.fields(RopeRule)}
    blocks = []
    for index, entry in enumerate(config.get("blocks") or ()):
        here = f"{where}, block {index}"
        for name in entry:
            if name not in names:
                raise unknown_name("field of a block", str(name), names, where=here)
        rule = entry.get("rope", {})
        for name in rule:
            if name not in rope_names:
                raise unknown_name("field of a rope rule", str(name), rope_names, where=here)
        fields: dict[str, Any] = {
            name: tuple(item) if isinstance(item, list) else item for name, item in rule.items()
        }
        rope = RopeRule(**fields)
        blocks.append(BlockSpec(**{**entry, "rope": rope}))
    try:
        return LlamaSpec(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            blocks=tuple(blocks),
            norm_eps=config["rms_norm_eps"],
            tied=config["tie_word_embeddings"],
            attention_bias=config["attention_bias"],
            mlp_bias=config["mlp_bias"],
            max_positions=config["max_position_embeddings"],
            bos_id=config["bos_token_id"],
            eos_ids=_end_ids(config["eos_token_id"]),
            pad_id=config["pad_token_id"],
        )
    except KeyError as error:
        raise PunaError(f"key {error.args[0]!r} is missing", where=where) from None
