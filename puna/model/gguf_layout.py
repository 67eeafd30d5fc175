"""How llama.cpp lays out a decoder in a GGUF file: names, row order, metadata, rope factors.

Only pure mappings are here, used by both the reader and the writer, so that each is the other's inverse.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy
import torch

from puna.core.errors import PunaError
from puna.model.rope import frequencies
from puna.model.spec import BlockSpec, LlamaSpec, RopeRule

ARCHITECTURES = ("llama", "qwen2")
ROPE_FACTORS = "rope_freqs.weight"
_OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_INNER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# A null token id in files of some writers: the largest unsigned 32-bit number.
_NO_TOKEN = 0xFFFFFFFF


def gguf_name(name: str) -> str:
    """The name in a GGUF file: ``model.layers.3.mlp.up_proj.weight`` is ``blk.3.ffn_up.weight`` there."""
    module, _, kind = name.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{kind}"
    layer, _, inner = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_INNER[inner]}.{kind}"


def row_order(architecture: str, spec: LlamaSpec, name: str) -> torch.Tensor | None:
    """For each row of a file's tensor, the row of the parameter it belongs to; None if the order is the same.

    llama.cpp rotates neighbouring pairs in files of architecture "llama"; the decoder rotates halves,
    as transformers does. Query and key rows (and their biases) are therefore interleaved in the file.
    Files of architecture "qwen2" are not reordered.
    """
    module = name.rpartition(".")[0]
    if architecture != "llama" or not module.endswith(("self_attn.q_proj", "self_attn.k_proj")):
        return None
    block = spec.blocks[int(module.split(".")[2])]
    heads = block.heads if module.endswith("q_proj") else block.kv_heads
    rows = torch.arange(heads * block.head_dim).view(heads, 2, block.head_dim // 2)
    return rows.transpose(1, 2).flatten()  # [heads * head_dim]


class _Metadata:
    """Metadata of one architecture with types checked: each value was written by somebody else."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, where: object) -> None:
        self.metadata = metadata
        self.architecture = architecture
        self.where = where

    def number(self, key: str, default: float | None = None, *, whole: bool = False) -> Any:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]  # one value for each layer, all equal
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not (isinstance(value, kinds) and math.isfinite(value)):
            raise PunaError(
                f"metadata {self.architecture}.{key} cannot be used",
                where=self.where,
                found="nothing" if value is None else str(value)[:80],
                expected="a whole number" if whole else "a number",
            )
        # A decimal that became a 32-bit float goes back to the shortest decimal of the same 32 bits.
        return value if whole or isinstance(value, int) else float(str(numpy.float32(value)))

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.metadata


def architecture_of(metadata: Mapping[str, Any], where: object) -> str:
    """The file's architecture, refused unless it is one whose arithmetic the decoder follows."""
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise PunaError(
            "this architecture is not of the Llama family that puna computes",
            where=where,
            found=f"general.architecture {architecture!r}",
            expected=" or ".join(ARCHITECTURES),
        )
    experts = metadata.get(f"{architecture}.expert_count", 0)
    if experts:
        raise PunaError("a mixture of experts is not computed here", where=where, found=f"{experts} experts")
    return str(architecture)


def spec_from_metadata(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: numpy.ndarray[Any, Any] | None,
    where: object,
) -> LlamaSpec:
    """Describe the decoder in a file by its metadata, the shapes of its tensors and ``rope_freqs``."""
    architecture = architecture_of(metadata, where)
    values = _Metadata(metadata, architecture, where)
    layers = values.number("block_count", whole=True)
    stored = len({name.split(".")[1] for name in shapes if name.startswith("blk.")})
    if layers != stored:
        raise PunaError(
            "the number of layers is not that of the file", where=where, found=layers, expected=stored
        )
    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise PunaError("tensor 'token_embd.weight' is missing or no matrix", where=where, found=embedding)
    hidden_size = values.number("embedding_length", whole=True)
    heads = values.number("attention.head_count", whole=True)
    if heads < 1:
        raise PunaError("the number of heads must be positive", where=where, found=heads)
    head_dim = _head_dim(values, hidden_size // heads)
    eos = [_token(metadata, name) for name in ("eos", "eot")]
    try:
        return LlamaSpec(
            vocab_size=embedding[0],
            hidden_size=hidden_size,
            blocks=layers
            * (
                BlockSpec(
                    heads=heads,
                    kv_heads=values.number("attention.head_count_kv", heads, whole=True),
                    head_dim=head_dim,
                    rope=_rope_rule(values, head_dim, rope_factors),
                    width=values.number("feed_forward_length", whole=True),
                ),
            ),
            norm_eps=values.number("attention.layer_norm_rms_epsilon"),
            tied="output.weight" not in shapes,
            attention_bias=_attention_bias(architecture, shapes),
            mlp_bias="blk.0.ffn_gate.bias" in shapes,
            max_positions=values.number("context_length", whole=True),
            bos_id=_token(metadata, "bos"),
            eos_ids=tuple(dict.fromkeys(token for token in eos if token is not None)),
            pad_id=_token(metadata, "padding"),
        )
    except PunaError as error:
        if error.where == where:
            raise
        message = f"{error.where}: {error.message}"
        raise PunaError(
            message, where=where, found=error.found, expected=error.expected, fix=error.fix
        ) from None


def _head_dim(values: _Metadata, default: int) -> int:
    head_dim: int = values.number("attention.key_length", default, whole=True)
    for key in ("attention.value_length", "rope.dimension_count"):
        found = values.number(key, head_dim, whole=True)
        if found != head_dim:
            raise PunaError(
                f"{values.architecture}.{key} differs from the head dimension, which is not computed here",
                where=values.where,
                found=found,
                expected=head_dim,
            )
    return head_dim


def metadata_from_spec(
    spec: LlamaSpec, where: object
) -> tuple[str, dict[str, Any], numpy.ndarray[Any, Any] | None]:
    """Architecture, metadata (without tokenizer and file type) and rope factors that describe ``spec``.

    Raises :class:`PunaError` for a spec that llama.cpp's llama and qwen2 graphs do not compute.
    """
    block = spec.blocks[0]
    reason = _not_llama_cpp(spec)
    if reason is not None:
        raise PunaError(
            "llama.cpp cannot compute this decoder, so it has no GGUF form",
            where=where,
            found=reason,
            fix="write it as a Hugging Face folder instead",
        )
    architecture = "qwen2" if spec.attention_bias == "qkv" else "llama"
    rule = block.rope
    values: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "context_length": spec.max_positions,
        "embedding_length": spec.hidden_size,
        "block_count": len(spec.blocks),
        "feed_forward_length": block.width,
        "attention.head_count": block.heads,
        "attention.head_count_kv": block.kv_heads,
        "attention.key_length": block.head_dim,
        "attention.value_length": block.head_dim,
        "attention.layer_norm_rms_epsilon": float(spec.norm_eps),
        "rope.dimension_count": block.head_dim,
        "rope.freq_base": float(rule.theta),
    }
    factors = None
    if rule.kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": rule.kind, "rope.scaling.factor": float(rule.factor or 1.0)}
    if rule.kind == "yarn":
        values["rope.scaling.original_context_length"] = rule.original_max_positions
        for key, beta in (("yarn_beta_fast", rule.beta_fast), ("yarn_beta_slow", rule.beta_slow)):
            if beta is not None:
                values[f"rope.scaling.{key}"] = float(beta)
    elif rule.kind == "llama3":
        factors = llama3_factors(rule, block.head_dim).astype(numpy.float32)
    return architecture, {f"{architecture}.{key}": value for key, value in values.items()}, factors


def _not_llama_cpp(spec: LlamaSpec) -> str | None:
    block, rule = spec.blocks[0], spec.blocks[0].rope
    if any(other.merger for other in spec.blocks):
        return "layers with a twin, which the stage merge_twins puts back into one"
    if not block.plain or any(other != block for other in spec.blocks):
        return "layers that differ, or that are no ordinary Llama layers"
    if block.window is not None:
        return f"a window of {block.window} keys"
    if spec.attention_bias == "qkv" and spec.mlp_bias:
        return "biases on queries, keys, values and in the feed-forward"
    if rule.kind in ("dynamic", "longrope"):
        return f"rope {rule.kind!r}"
    if any(
        value is not None
        for value in (rule.attention_factor, rule.mscale, rule.mscale_all_dim, rule.truncate)
    ):
        return "yarn with parameters of its own besides the betas"
    return None


def llama3_factors(rule: RopeRule, head_dim: int) -> numpy.ndarray[Any, numpy.dtype[numpy.float64]]:
    """What each plain frequency is divided by under a "llama3" rule, [head_dim // 2]."""
    return _frequencies(RopeRule("default", rule.theta), head_dim) / _frequencies(rule, head_dim)


def _frequencies(rule: RopeRule, head_dim: int) -> numpy.ndarray[Any, numpy.dtype[numpy.float64]]:
    return numpy.asarray(frequencies(rule, head_dim, 1)[0].double(), dtype=numpy.float64)


def _rope_rule(values: _Metadata, head_dim: int, factors: numpy.ndarray[Any, Any] | None) -> RopeRule:
    theta = values.number("rope.freq_base", 10000.0)
    kind = values.metadata.get(f"{values.architecture}.rope.scaling.type", "linear")  # as llama.cpp supposes
    factor = values.number("rope.scaling.factor", values.number("rope.scale_linear", 1.0))
    if kind not in ("none", "linear", "yarn"):
        raise PunaError(
            "this rope scaling of a GGUF is not read",
            where=values.where,
            found=kind,
            expected="none, linear or yarn",
        )
    scaled = kind != "none" and factor not in (0.0, 1.0)  # llama.cpp writes 0 for "no scaling" too
    if factors is not None and numpy.any(factors != 1.0):
        if scaled:
            raise PunaError(
                "two rope scalings at once", where=values.where, found=f"{kind} and {ROPE_FACTORS}"
            )
        return _llama3_rule(theta, head_dim, factors, values.where)
    if not scaled:
        return RopeRule("default", theta)
    if kind != "yarn":
        return RopeRule("linear", theta, factor=factor)
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"):
        if values.has(f"rope.scaling.{key}"):
            raise PunaError(
                f"rope.scaling.{key} of a GGUF is not read", where=values.where, fix="use the HF folder"
            )
    betas = {
        name: values.number(f"rope.scaling.yarn_{name}")
        for name in ("beta_fast", "beta_slow")
        if values.has(f"rope.scaling.yarn_{name}")
    }
    original = values.number("rope.scaling.original_context_length", whole=True)
    return RopeRule("yarn", theta, factor=factor, original_max_positions=original, **betas)


def _llama3_rule(theta: float, head_dim: int, factors: numpy.ndarray[Any, Any], where: object) -> RopeRule:
    """The "llama3" rule whose factors are those of the file, which keeps the factors only.

    Context, low and high factor count up to a common scale: Llama 3's own context is tried with its
    own bounds, then the context that makes the low factor 1, then Llama 3's with bounds that fit.
    """
    factors = factors.astype(numpy.float64)
    if len(factors) != head_dim // 2 or not numpy.all(numpy.isfinite(factors)) or factors.min() < 1.0 - 1e-6:
        raise PunaError(
            f"tensor {ROPE_FACTORS!r} cannot be used", where=where, expected=f"{head_dim // 2} numbers >= 1"
        )
    factor = float(str(numpy.float32(factors.max())))
    turns = _frequencies(RopeRule("default", theta), head_dim) / (2 * math.pi)  # for each position
    slope, offset = _passage(turns, (1.0 / factors - 1.0 / factor) / (1.0 - 1.0 / factor))
    guesses = [(8192, 1.0, 4.0)]
    if slope > 0 and 0 < offset <= slope:
        context = round(slope / offset)
        guesses.append((context, 1.0, 1.0 + context / slope))
        guesses.append((8192, 8192 * offset / slope, 8192 * (1.0 + offset) / slope))
    for original, low, high in guesses:
        rule = RopeRule(
            "llama3",
            theta,
            factor=factor,
            original_max_positions=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
        if numpy.allclose(llama3_factors(rule, head_dim), factors, rtol=2e-5):
            return rule
    raise PunaError(
        f"tensor {ROPE_FACTORS!r} follows no rope rule that puna knows",
        where=where,
        found=[round(float(value), 4) for value in factors],
        expected="the factors of a llama3 rule",
    )


def _passage(turns: numpy.ndarray[Any, Any], share: numpy.ndarray[Any, Any]) -> tuple[float, float]:
    """Slope and offset of the line share = slope * turns - offset between kept and divided pairs.

    ``share`` is how much of each pair's frequency is kept, 0 to 1, and falls with ``turns``. Two
    pairs on the passage give the line; with fewer, the flattest that its ends allow is taken.
    """
    between = numpy.flatnonzero((share > 1e-4) & (share < 1.0 - 1e-4))
    if len(between) >= 2:
        slope, shift = numpy.polyfit(turns[between], share[between], 1)
        return float(slope), float(-shift)
    kept, divided = numpy.flatnonzero(share >= 1.0 - 1e-4)[-1:], numpy.flatnonzero(share <= 1e-4)[:1]
    known = [*kept, *between, *divided]
    slopes = [(share[i] - share[j]) / (turns[i] - turns[j]) for i, j in itertools.pairwise(known)]
    fixed = (*between, *known)[0]
    return max(slopes, default=0.0), max(slopes, default=0.0) * turns[fixed] - share[fixed]


def _attention_bias(architecture: str, shapes: Mapping[str, Any]) -> Any:
    if architecture == "qwen2":
        return "qkv"
    if "blk.0.attn_q.bias" not in shapes:
        return "none"
    return "all" if "blk.0.attn_output.bias" in shapes else "qkv"


def _token(metadata: Mapping[str, Any], name: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return value if isinstance(value, int) and value not in (-1, _NO_TOKEN) else None
