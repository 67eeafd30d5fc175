"""A decoder described by data: frozen, hashable, validated; no torch needed to read or print one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from puna.core.errors import PunaError, unknown_name

if TYPE_CHECKING:
    from rich.table import Table

RopeKind = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]
AttentionKind = Literal["full", "linear", "none"]
FeedForwardKind = Literal["swiglu", "linear", "none"]
AttentionBias = Literal["none", "qkv", "all"]
INITIAL_DEVIATION = 0.02
"""Standard deviation of a new model's matrices."""
MergerKind = Literal["lerp", "dlerp", "dlerpin", "slerp", "proj", "prog", "moe"]

# What each rope rule needs besides theta, and what it may have.
_ROPE_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor", "original_max_positions"), ()),
    "yarn": (
        ("factor", "original_max_positions"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("factor", "original_max_positions", "short_factor", "long_factor"),
        ("attention_factor",),
    ),
    "llama3": (("factor", "original_max_positions", "low_freq_factor", "high_freq_factor"), ()),
}


def _require(good: bool, message: str, where: str, found: object = None) -> None:
    if not good:
        raise PunaError(message, where=where, found=found)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@dataclass(frozen=True)
class RopeRule:
    """How positions become rotations: a kind, its base ``theta``, and the kind's own parameters.

    Parameters that a kind does not use are None. ``original_max_positions`` is the length (in
    tokens) the model was pre-trained on before it was stretched by ``factor``.
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float | None = None
    original_max_positions: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in _ROPE_FIELDS:
            raise unknown_name("rope kind", str(self.kind), _ROPE_FIELDS)
        required, optional = _ROPE_FIELDS[self.kind]
        where = f"rope {self.kind!r}"
        if not _is_number(self.theta) or self.theta <= 0:
            raise PunaError("the base theta must be a positive number", where=where, found=self.theta)
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            if value is None and field.name in required:
                raise PunaError(f"{field.name} is missing", where=where)
            if value is not None and field.name not in required + optional:
                raise PunaError(
                    f"{field.name} means nothing here",
                    where=where,
                    found=value,
                    expected=", ".join(required + optional) or "no further parameter",
                )
            if value is not None:
                self._check(field.name, value, where)
        if self.low_freq_factor is not None and self.high_freq_factor is not None:
            _require(
                self.high_freq_factor > self.low_freq_factor,
                "high_freq_factor must be above low_freq_factor",
                where,
            )

    @staticmethod
    def _check(name: str, value: Any, where: str) -> None:
        if name in ("short_factor", "long_factor"):
            _require(
                isinstance(value, tuple) and all(_is_number(item) and item > 0 for item in value),
                f"{name} must be a tuple of positive numbers",
                where,
                value,
            )
        elif name == "truncate":
            _require(isinstance(value, bool), "truncate must be true or false", where, value)
        elif name == "original_max_positions":
            _require(_is_count(value), f"{name} must be a positive whole number", where, value)
        elif name == "factor":
            _require(_is_number(value) and value >= 1, "factor must be a number of at least 1", where, value)
        else:
            _require(_is_number(value) and value > 0, f"{name} must be a positive number", where, value)

    @staticmethod
    def parameters_of(kind: str, *, where: object = None) -> tuple[str, ...]:
        """Names of the parameters, besides theta, that a kind takes."""
        if kind not in _ROPE_FIELDS:
            raise unknown_name("rope kind", str(kind), _ROPE_FIELDS, where=where)
        required, optional = _ROPE_FIELDS[kind]
        return required + optional

    def describe(self) -> str:
        """The rule in a few words, for tables."""
        words = [self.kind, f"{self.theta:g}"]
        if self.factor is not None:
            words.append(f"x{self.factor:g}")
        if self.original_max_positions is not None:
            words.append(f"from {self.original_max_positions}")
        return " ".join(words)


@dataclass(frozen=True)
class BlockSpec:
    """One layer. A half whose kind is "none" is skipped exactly and has no parameters.

    One that is "linear" is its norm and one square matrix, [hidden, hidden]: tokens do not see each
    other there, and nothing of theirs is stored.

    ``window`` is how many keys a query sees, itself included (None: all). ``logit_scale``
    multiplies query-key products (None: 1/sqrt(head_dim)). ``series`` terms of SiLU with scales and
    shifts of their own stand where SwiGLU has one plain SiLU (0), and around attention goes a shortcut
    through a bottleneck of width ``shortcut`` (0: none); see :mod:`puna.model.nonlinearity`. The settings
    of a half that is "none" or "linear" are cleared, so that equal layers compare equal. A layer with a
    ``merger`` is expanded: a twin of the same shape reads the same hidden states and stores keys of its own,
    and the merger puts the two outputs together (:mod:`puna.model.twins`).
    """

    attention: AttentionKind = "full"
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    window: int | None = None
    causal: bool = True
    rope: RopeRule = RopeRule()
    logit_scale: float | None = None
    feed_forward: FeedForwardKind = "swiglu"
    width: int = 0
    merger: MergerKind | None = None
    series: int = 0
    shortcut: int = 0

    def __post_init__(self) -> None:
        if self.attention not in get_args(AttentionKind):
            raise unknown_name("attention kind", str(self.attention), get_args(AttentionKind))
        if self.feed_forward not in get_args(FeedForwardKind):
            raise unknown_name("feed-forward kind", str(self.feed_forward), get_args(FeedForwardKind))
        if self.merger is not None and self.merger not in get_args(MergerKind):
            raise unknown_name("merger", str(self.merger), get_args(MergerKind))
        for name in ("series", "shortcut"):
            value = getattr(self, name)
            good = value == 0 or _is_count(value)
            _require(good, f"{name} must be a whole number of at least 0", "block", value)
        if self.feed_forward != "swiglu":
            object.__setattr__(self, "width", 0)
            object.__setattr__(self, "series", 0)
        else:
            _require(_is_count(self.width), "width must be a positive whole number", "block", self.width)
        if self.attention != "full":
            cleared: dict[str, Any] = {"heads": 0, "kv_heads": 0, "head_dim": 0, "shortcut": 0}
            cleared |= {"window": None, "causal": True}
            for name, value in {**cleared, "rope": RopeRule(), "logit_scale": None}.items():
                object.__setattr__(self, name, value)
        else:
            self._check_attention()

    def _check_attention(self) -> None:
        for name in ("heads", "kv_heads", "head_dim"):
            value = getattr(self, name)
            _require(_is_count(value), f"{name} must be a positive whole number", "block", value)
        if self.heads % self.kv_heads:
            raise PunaError(
                "query heads cannot be shared out over the key-value heads",
                where="block",
                found=f"{self.heads} heads, {self.kv_heads} key-value heads",
                expected="heads a multiple of kv_heads",
            )
        _require(self.head_dim % 2 == 0, "head_dim must be even for rotary positions", "block", self.head_dim)
        _require(
            self.window is None or _is_count(self.window),
            "window must be a positive number",
            "block",
            self.window,
        )
        _require(isinstance(self.causal, bool), "causal must be true or false", "block", self.causal)
        _require(isinstance(self.rope, RopeRule), "rope must be a RopeRule", "block", self.rope)
        if self.window is not None and not self.causal:
            raise PunaError("a window is defined for causal attention only", where="block", found=self.window)
        if self.logit_scale is not None:
            _require(
                _is_number(self.logit_scale) and self.logit_scale > 0,
                "logit_scale must be a positive number",
                "block",
                self.logit_scale,
            )
        for name in ("short_factor", "long_factor"):
            factors = getattr(self.rope, name)
            if factors is not None and len(factors) != self.head_dim // 2:
                raise PunaError(
                    f"{name} needs one number for each pair of head dimensions",
                    where="rope 'longrope'",
                    found=f"{len(factors)} numbers",
                    expected=f"{self.head_dim // 2} for head_dim {self.head_dim}",
                )

    @property
    def scale(self) -> float:
        """The factor on query-key products."""
        return self.head_dim**-0.5 if self.logit_scale is None else self.logit_scale

    @property
    def plain(self) -> bool:
        """Whether this is an ordinary Llama layer: both halves, causal, the usual scale; a window may be."""
        ordinary_scale = self.logit_scale is None or math.isclose(self.logit_scale, self.head_dim**-0.5)
        halves = self.attention == "full" and self.feed_forward == "swiglu"
        rich = self.series or self.shortcut or self.merger is not None
        return halves and self.causal and ordinary_scale and not rich

    def parameter_count(self, hidden_size: int, attention_bias: AttentionBias, mlp_bias: bool) -> int:
        """Number of weights of this layer in a decoder of width ``hidden_size``."""
        total = 0
        if self.attention == "full":
            queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
            total += hidden_size + 2 * hidden_size * queries + 2 * hidden_size * keys
            total += 0 if attention_bias == "none" else queries + 2 * keys
            total += hidden_size if attention_bias == "all" else 0
            total += 2 * hidden_size * self.shortcut
        elif self.attention == "linear":
            total += hidden_size * (hidden_size + 1 + (attention_bias != "none"))
        if self.feed_forward == "swiglu":
            total += hidden_size + (3 * hidden_size + 2 * self.series) * self.width
            total += 2 * self.width + hidden_size if mlp_bias else 0
        elif self.feed_forward == "linear":
            total += hidden_size * (hidden_size + 1 + mlp_bias)
        return total if self.merger is None else 2 * total + self.merger_parameters(hidden_size)

    def merger_parameters(self, hidden_size: int) -> int:
        """Number of weights of the merger alone: its constant, and what a gate or a map has besides."""
        if self.merger is None:
            return 0
        gates = {"dlerp": 2 * hidden_size, "dlerpin": hidden_size, "moe": hidden_size}
        maps = {"proj": hidden_size**2, "prog": hidden_size**2}
        return 1 + (gates | maps).get(self.merger, 0)


@dataclass(frozen=True)
class Slot:
    """A set of stored keys and the half of a layer that makes them: an expanded layer has two.

    ``name`` is where its weights are in the decoder, "layers.3" or "layers.3.twin".
    """

    layer: int
    name: str
    block: BlockSpec


@dataclass(frozen=True)
class LlamaSpec:
    """A whole decoder: sizes, one :class:`BlockSpec` per layer, norms, biases, tying, special ids.

    ``attention_bias``: "none"; "qkv" as in Qwen2; "all" adds one to the output projection, as in a
    Llama config with ``attention_bias: true``. ``max_positions`` is the length the model is meant
    for, in tokens; longer input is not refused.
    """

    vocab_size: int
    hidden_size: int
    blocks: tuple[BlockSpec, ...]
    norm_eps: float = 1e-6
    tied: bool = False
    attention_bias: AttentionBias = "none"
    mlp_bias: bool = False
    max_positions: int = 2048
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "max_positions"):
            value = getattr(self, name)
            _require(_is_count(value), f"{name} must be a positive whole number", "spec", value)
        _require(
            _is_number(self.norm_eps) and self.norm_eps > 0,
            "norm_eps must be positive",
            "spec",
            self.norm_eps,
        )
        for name in ("tied", "mlp_bias"):
            _require(
                isinstance(getattr(self, name), bool),
                f"{name} must be true or false",
                "spec",
                getattr(self, name),
            )
        if self.attention_bias not in get_args(AttentionBias):
            raise unknown_name(
                "attention_bias", str(self.attention_bias), get_args(AttentionBias), where="spec"
            )
        if not (
            isinstance(self.blocks, tuple) and all(isinstance(block, BlockSpec) for block in self.blocks)
        ):
            raise PunaError("blocks must be a tuple of BlockSpec", where="spec", found=self.blocks)
        _require(len(self.blocks) > 0, "a decoder needs at least one block", "spec", "none")
        ids = {"bos_id": (self.bos_id,), "eos_ids": self.eos_ids, "pad_id": (self.pad_id,)}
        for name, values in ids.items():
            _require(isinstance(values, tuple), "eos_ids must be a tuple", "spec", values)
            for value in values:
                # Some checkpoints write -1 for "no padding"; readers turn it into None before they come here.
                good = value is None or (isinstance(value, int) and 0 <= value < self.vocab_size)
                if not good:
                    raise PunaError(
                        f"{name} is not a token of this vocabulary",
                        where="spec",
                        found=value,
                        expected=f"0 to {self.vocab_size - 1}",
                    )
        for block in self.blocks:
            stretched = block.rope.original_max_positions
            if block.rope.kind == "dynamic" and stretched != self.max_positions:
                raise PunaError(
                    "dynamic rope starts to stretch at max_positions",
                    where="spec",
                    found=f"original_max_positions {stretched}, max_positions {self.max_positions}",
                    expected="the two equal",
                )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, where: object = "config.json") -> LlamaSpec:
        """Read a Hugging Face config of model_type llama, qwen2 or mistral, or one written by puna."""
        from puna.model.hf_config import spec_from_config

        return spec_from_config(config, where=where)

    def to_config(self) -> dict[str, Any]:
        """The Hugging Face config; for a spec that is not uniform, one of model_type "puna"."""
        from puna.model.hf_config import config_from_spec

        return config_from_spec(self)

    @property
    def architecture(self) -> Literal["llama", "qwen2", "mistral"] | None:
        """The model_type under which transformers opens this decoder, or None if it knows no such one."""
        first = self.blocks[0]
        if not first.plain or any(block != first for block in self.blocks):
            return None
        if self.attention_bias == "qkv":
            return None if self.mlp_bias else "qwen2"
        # transformers refuses a Llama whose hidden size is no multiple of its heads; Mistral is the same
        # decoder with a window, and has no such rule.
        if first.window is not None or self.hidden_size % first.heads:
            return None if self.mlp_bias or self.attention_bias != "none" else "mistral"
        return "llama"

    @property
    def uniform(self) -> bool:
        """Whether all blocks are equal and a plain config that transformers reads says it all."""
        return self.architecture is not None

    def parameter_count(self) -> int:
        """Number of weights; a tied head counts once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        blocks = (
            block.parameter_count(self.hidden_size, self.attention_bias, self.mlp_bias)
            for block in self.blocks
        )
        return embeddings + sum(blocks) + self.hidden_size

    def replace(self, **changes: Any) -> LlamaSpec:
        """A copy with fields changed; fields of :class:`BlockSpec` are set on every block."""
        own = {field.name for field in dataclasses.fields(LlamaSpec)}
        inner = {field.name for field in dataclasses.fields(BlockSpec)}
        for name in changes:
            if name not in own | inner:
                raise unknown_name("field of the spec", name, own | inner)
        in_blocks = {name: value for name, value in changes.items() if name in inner}
        in_spec = {name: value for name, value in changes.items() if name in own}
        if in_blocks:
            blocks = in_spec.get("blocks", self.blocks)
            in_spec["blocks"] = tuple(dataclasses.replace(block, **in_blocks) for block in blocks)
        return dataclasses.replace(self, **in_spec)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """What stores keys, in the order of a cache: all layers, then the twins of expanded ones."""
        layers = list(enumerate(self.blocks))
        own = (Slot(layer, f"layers.{layer}", block) for layer, block in layers)
        twins = (Slot(layer, f"layers.{layer}.twin", block) for layer, block in layers if block.merger)
        return (*own, *twins)

    def refuse_twins(self, what: str) -> None:
        """Raise :class:`PunaError` if there are expanded layers, of which ``what`` knows nothing."""
        expanded = [str(layer) for layer, block in enumerate(self.blocks) if block.merger]
        if expanded:
            raise PunaError(
                f"{what} knows nothing of layers with a twin",
                found=f"twins in layers {', '.join(expanded)}",
                fix="put the twins back into their layers first: the stage merge_twins",
            )

    @property
    def layers_both_ways(self) -> tuple[int, ...]:
        """The layers whose tokens see later ones, counted from 0."""
        return tuple(layer for layer, block in enumerate(self.blocks) if not block.causal)

    def ranges(self) -> Iterator[tuple[int, int, BlockSpec]]:
        """Runs of equal consecutive blocks as (first, last, block)."""
        first = 0
        for index, block in enumerate(self.blocks):
            if index + 1 == len(self.blocks) or self.blocks[index + 1] != block:
                yield first, index, block
                first = index + 1

    def table(self) -> Table:
        """One readable table: the decoder in the title, one row for each run of equal blocks."""
        from rich import box
        from rich.table import Table

        total = self.parameter_count()
        table = Table(
            title=f"{total / 1e6:,.1f}M parameters: vocabulary {self.vocab_size:,}, "
            f"hidden {self.hidden_size}, {len(self.blocks)} blocks, {self.max_positions:,} positions",
            caption=f"head {'tied' if self.tied else 'of its own'}; attention bias {self.attention_bias}; "
            f"feed-forward bias {'yes' if self.mlp_bias else 'no'}; norm eps {self.norm_eps:g}; "
            f"bos {self.bos_id}, eos {', '.join(map(str, self.eos_ids)) or None}, pad {self.pad_id}",
            box=box.SIMPLE_HEAD,
            collapse_padding=True,
            pad_edge=False,
        )
        for heading in ("blocks", "attention", "heads", "kv", "dim", "rope", "feed-forward", "params"):
            table.add_column(
                heading, justify="right" if heading in ("heads", "kv", "dim", "params") else "left"
            )
        for first, last, block in self.ranges():
            count = block.parameter_count(self.hidden_size, self.attention_bias, self.mlp_bias)
            table.add_row(
                str(first) if first == last else f"{first}-{last}",
                *_attention_cells(block),
                _feed_forward_cell(block),
                f"{count * (last - first + 1) / 1e6:,.2f}M",
            )
        return table


def _attention_cells(block: BlockSpec) -> tuple[str, str, str, str, str]:
    """What the attention is, its query heads, key-value heads, their size, its rope."""
    if block.attention != "full":
        return block.attention, "-", "-", "-", "-"
    words = ["causal" if block.causal else "both ways"]
    if block.window is not None:
        words.append(f"window {block.window}")
    if block.logit_scale is not None:
        words.append(f"scale {block.logit_scale:.4g}")
    if block.shortcut:
        words.append(f"shortcut {block.shortcut}")
    sizes = (str(block.heads), str(block.kv_heads), str(block.head_dim))
    return ", ".join(words), *sizes, block.rope.describe()


def _feed_forward_cell(block: BlockSpec) -> str:
    """What the feed-forward is, its width, terms of its activation if it is a series; the layer's twin."""
    words = [f"{block.feed_forward} {block.width}" if block.width else block.feed_forward]
    if block.series:
        words.append(f"series of {block.series}")
    if block.merger:
        words.append(f"twin by {block.merger}")
    return ", ".join(words)
