"""What every decoder, and every method on one, must keep to: shared checks and two registries.

A method adds a row to :data:`NEUTRAL` (a setting at which the logits must not change by a bit) or
to :data:`DECODERS` (a decoder that all checks run on), in its own test module or here::

    @neutral("my-method at strength 0")
    def _() -> tuple[Forward, Forward]:
        return plain_model, changed_model
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from puna.core.seeds import torch_generator
from puna.edit.growing import expand
from puna.model.adapters import BASES, LoraSettings, add_lora, quantize_for
from puna.model.cache import KeyValueCache
from puna.model.light_adapter import KINDS, Kind, LightSettings, add_light
from puna.model.llama import Llama
from puna.model.masked_lora import nonzero_places
from puna.model.mup import Mup, begin
from puna.model.nf4 import dequantize_base, quantize_base
from puna.model.search_space import SearchSpace
from puna.model.spec import BlockSpec, LlamaSpec, MergerKind, RopeRule
from puna.model.subnetwork import part_of
from puna.model.unmasking import unmask

Forward = Callable[[Tensor], Tensor]  # token ids [batch, time] to logits [batch, time, vocab]
VOCABULARY = 97
TOLERANCE = 1e-5

BLOCK = BlockSpec(heads=4, kv_heads=2, head_dim=8, width=40)


def spec_of(*blocks: BlockSpec, tied: bool = True) -> LlamaSpec:
    """A small decoder of these blocks (two plain ones if none are given)."""
    return LlamaSpec(VOCABULARY, 32, blocks or (BLOCK, BLOCK), tied=tied, max_positions=64)


def decoder(spec: LlamaSpec, seed: int = 0) -> Llama:
    """A decoder with lively weights: every one random, norms and biases too."""
    generator = torch_generator(seed, "invariants")
    model = Llama(spec, generator=generator).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            weight.copy_(centre + 0.2 * torch.randn(weight.shape, generator=generator))
    return model


def same_weights(model: Llama, spec: LlamaSpec) -> Llama:
    """A decoder of another spec with the weights of ``model``, all of them."""
    other = Llama(spec).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    return other


def random_ids(batch: int, time: int, seed: int = 0) -> Tensor:
    """Token ids [batch, time]."""
    return torch.randint(0, VOCABULARY, (batch, time), generator=torch_generator(seed, "ids"))


DECODERS: dict[str, Callable[[], Llama]] = {}
NEUTRAL: dict[str, Callable[[], tuple[Forward, Forward]]] = {}


def add_decoder(name: str, make: Callable[[], Llama]) -> None:
    """Register a causal decoder that every check runs on."""
    assert name not in DECODERS, f"two decoders are named {name!r}"
    DECODERS[name] = make


def neutral(name: str) -> Callable[[Callable[[], tuple[Forward, Forward]]], None]:
    """Register a pair (plain, at the neutral setting) that must give the same bits."""

    def register(make: Callable[[], tuple[Forward, Forward]]) -> None:
        assert name not in NEUTRAL, f"two neutral settings are named {name!r}"
        NEUTRAL[name] = make

    return register


def assert_same_bits(plain: Forward, changed: Forward, ids: Tensor) -> None:
    """The two give bit-identical logits."""
    with torch.no_grad():
        expected, got = plain(ids), changed(ids)
    assert torch.equal(expected, got), f"they differ by up to {(expected - got).abs().max():.3g}"


def embedding_gradients(
    model: Llama, ids: Tensor, score: Callable[[Tensor], Tensor], segments: Tensor | None = None
) -> Tensor:
    """Gradient of a score of the logits with respect to each token's embedding, [batch, time, hidden]."""
    caught: list[Tensor] = []

    def catch(_module: torch.nn.Module, _inputs: object, output: Tensor) -> Tensor:
        caught.append(output.detach().requires_grad_())
        return caught[0]

    handle = model.model.embed_tokens.register_forward_hook(catch)
    try:
        logits = model(ids, segments=segments)
    finally:
        handle.remove()
    return torch.autograd.grad(score(logits), caught[0])[0]


def assert_causal(model: Llama, time: int = 24) -> None:
    """The logits at a place depend on its own token and on no later one: by gradient, exactly."""
    ids = random_ids(2, time)
    for place in (0, 1, time // 2, time - 1):
        gradient = embedding_gradients(model, ids, lambda logits, at=place: logits[:, at].square().sum())
        assert (gradient[:, place + 1 :] == 0).all(), f"place {place} sees later tokens"
        assert (gradient[:, place].abs().sum(dim=-1) > 0).all(), f"place {place} does not see itself"


def assert_cached_is_uncached(model: Llama, parts: Sequence[int], padding: Sequence[int] = (0, 0)) -> None:
    """Reading in parts with a cache gives the logits of reading at once; rows may be padded on the left."""
    time = sum(parts)
    ids = random_ids(len(padding), time)
    segments = torch.zeros_like(ids)
    for row, count in enumerate(padding):
        segments[row, :count] = -1
    cache = KeyValueCache(model.spec, len(padding), time, dtype=model.dtype)
    got = []
    with torch.no_grad():
        expected = model(ids, segments=segments if any(padding) else None)
        for index, part in enumerate(ids.split(list(parts), dim=1)):
            # The first part says what is padding; the others go on by themselves.
            said = segments[:, : parts[0]] if index == 0 and any(padding) else None
            got.append(model(part, segments=said, cache=cache))
    real = segments >= 0
    torch.testing.assert_close(torch.cat(got, dim=1)[real], expected[real], atol=TOLERANCE, rtol=0)


def assert_batched_is_alone(model: Llama, lengths: Sequence[int], side: str) -> None:
    """Rows of unequal length, padded on one side, give the logits each gives alone; all are finite."""
    time = max(lengths)
    ids, segments = random_ids(len(lengths), time), torch.full((len(lengths), time), -1)
    places = [slice(time - length, time) if side == "left" else slice(0, length) for length in lengths]
    for row, place in enumerate(places):
        segments[row, place] = 0
    with torch.no_grad():
        together = model(ids, segments=segments)
        for row, place in enumerate(places):
            alone = model(ids[row : row + 1, place])[0]
            torch.testing.assert_close(together[row, place], alone, atol=TOLERANCE, rtol=0)
    assert torch.isfinite(together).all()


def assert_packed_is_separate(model: Llama, rows: Sequence[Sequence[int]]) -> None:
    """Documents packed in rows give the logits and the weight gradients of the documents one by one.

    And nothing leaks: what a document says depends, by gradient, on no other one.
    """
    time = max(sum(lengths) for lengths in rows)
    ids, segments = random_ids(len(rows), time), torch.full((len(rows), time), -1)
    documents: list[tuple[int, slice]] = []
    for row, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths):
            segments[row, start : start + length] = number
            documents.append((row, slice(start, start + length)))
            start += length
    packed = model(ids, segments=segments)
    alone = [model(ids[row : row + 1, place])[0] for row, place in documents]
    for (row, place), logits in zip(documents, alone, strict=True):
        torch.testing.assert_close(packed[row, place], logits, atol=TOLERANCE, rtol=0)

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    total = sum((logits.square().mean() for logits in alone), start=torch.zeros(()))
    together = sum((packed[row, place].square().mean() for row, place in documents), start=torch.zeros(()))
    expected = torch.autograd.grad(total, weights)
    for got, wanted in zip(torch.autograd.grad(together, weights), expected, strict=True):
        torch.testing.assert_close(
            got, wanted, atol=TOLERANCE * max(1.0, wanted.abs().max().item()), rtol=1e-4
        )

    for row, place in documents:
        gradient = embedding_gradients(
            model, ids, lambda logits, r=row, p=place: logits[r, p].square().sum(), segments
        )
        assert_only_within(gradient, row, place)


def assert_only_within(gradient: Tensor, row: int, place: slice) -> None:
    """A gradient [batch, time, hidden] is zero, exactly, outside one document and not inside."""
    assert (gradient[row, place] != 0).any(), f"row {row}, tokens {place}: the document does not see itself"
    outside = gradient.clone()
    outside[row, place] = 0
    assert (outside == 0).all(), f"row {row}, tokens {place}: leakage"


_LLAMA3 = RopeRule("llama3", factor=8.0, original_max_positions=16, low_freq_factor=1.0, high_freq_factor=4.0)
_NO_ATTENTION = BlockSpec(attention="none", width=40)
_NO_FEED_FORWARD = BlockSpec(heads=4, kv_heads=2, head_dim=8, feed_forward="none")
_MIXED = (
    BlockSpec(heads=8, kv_heads=1, head_dim=4, width=24, rope=_LLAMA3, logit_scale=0.4),
    _NO_ATTENTION,
    BlockSpec(heads=2, kv_heads=2, head_dim=16, window=5, width=40),
    _NO_FEED_FORWARD,
    BlockSpec(attention="none", feed_forward="none"),
    BlockSpec(attention="linear", feed_forward="linear"),
    BlockSpec(attention="linear", width=24),
)
add_decoder("grouped", lambda: decoder(spec_of()))
add_decoder("untied", lambda: decoder(spec_of(tied=False)))
add_decoder("biased", lambda: decoder(spec_of().replace(attention_bias="all", mlp_bias=True)))
add_decoder("qkv-biased", lambda: decoder(spec_of().replace(attention_bias="qkv")))
add_decoder("window", lambda: decoder(spec_of().replace(window=6)))
add_decoder("llama3-rope", lambda: decoder(spec_of().replace(rope=_LLAMA3)))
add_decoder("every-block-different", lambda: decoder(spec_of(*_MIXED)))
add_decoder("series and shortcuts", lambda: decoder(spec_of().replace(series=2, shortcut=6)))


def _changed(**changes: object) -> Callable[[], tuple[Forward, Forward]]:
    """A plain decoder beside one with the same weights whose spec is changed."""

    def make() -> tuple[Forward, Forward]:
        model = decoder(spec_of())
        return model, same_weights(model, model.spec.replace(**changes))

    return make


neutral("a window as long as the input")(_changed(window=48))
neutral("the usual logit scale, written out")(_changed(logit_scale=8**-0.5))
neutral("linear rope by a factor of 1")(_changed(rope=RopeRule("linear", factor=1.0)))
neutral("dynamic rope within its length")(
    _changed(rope=RopeRule("dynamic", factor=4.0, original_max_positions=64), max_positions=64)
)
neutral("longrope with factors of 1")(
    _changed(
        rope=RopeRule(
            "longrope", factor=1.0, original_max_positions=16, short_factor=(1.0,) * 4, long_factor=(1.0,) * 4
        )
    )
)


@neutral("one document, written out")
def _() -> tuple[Forward, Forward]:
    model = decoder(spec_of())
    return model, lambda ids: model(ids, segments=torch.full_like(ids, 3))


@neutral("positions, written out")
def _() -> tuple[Forward, Forward]:
    model = decoder(spec_of())
    return model, lambda ids: model(ids, positions=torch.arange(ids.shape[1]).expand_as(ids))


@neutral("an empty cache")
def _() -> tuple[Forward, Forward]:
    model = decoder(spec_of())
    return model, lambda ids: model(ids, cache=KeyValueCache(model.spec, *ids.shape))


@neutral("halves that add nothing, taken out")
def _() -> tuple[Forward, Forward]:
    model = decoder(spec_of(BLOCK, BLOCK, BLOCK))
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    spec = spec_of(_NO_ATTENTION, _NO_FEED_FORWARD, BLOCK)
    thinner = Llama(spec).eval()
    kept = set(thinner.state_dict())
    thinner.load_state_dict({name: weight for name, weight in model.state_dict().items() if name in kept})
    return model, thinner


def _quantised(model: Llama) -> Llama:
    """The model with its projections held in NF4."""
    quantize_base(model)
    return model


def _adapted(dtype: torch.dtype = torch.float32, **settings: Any) -> Callable[[], tuple[Forward, Forward]]:
    """A decoder beside one with a new adapter; if that is to lie on NF4, beside the base in NF4."""

    def make() -> tuple[Forward, Forward]:
        plain, changed = decoder(spec_of()).to(dtype), decoder(spec_of()).to(dtype)
        chosen = LoraSettings(r=3, **settings)
        quantize_for(plain, chosen)
        add_lora(changed, chosen, seed=0)
        return plain, changed

    return make


for _base in BASES:
    neutral(f"a new LoRA, base {_base}")(_adapted(base=_base))
    neutral(f"a new rsLoRA, base {_base}")(_adapted(base=_base, rslora=True))
    neutral(f"a new DoRA, base {_base}")(_adapted(base=_base, dora=True))
    neutral(f"a new LoRA in bfloat16, base {_base}")(_adapted(torch.bfloat16, base=_base))


@neutral("the largest child of a super-network")
def _() -> tuple[Forward, Forward]:
    model = decoder(spec_of(BLOCK, BLOCK, BLOCK))
    space = SearchSpace.of(model.spec, (3, 2), (1.0, 0.5))
    return model, part_of(model, space.kept(space.whole))


@neutral("masks by the pattern of zeros")
def _() -> tuple[Forward, Forward]:
    plain, changed = decoder(spec_of(BLOCK, BLOCK, BLOCK)), decoder(spec_of(BLOCK, BLOCK, BLOCK))
    unmask(changed, "11")
    unmask(changed, "00")
    return plain, changed


@neutral("NF4, decoded")
def _() -> tuple[Forward, Forward]:
    plain = _quantised(decoder(spec_of()))
    dequantize_base(plain)
    return plain, _quantised(decoder(spec_of()))


add_decoder("nf4", lambda: _quantised(decoder(spec_of().replace(attention_bias="all"))))


def _with_adapter(kind: Kind) -> Llama:
    model = decoder(spec_of())
    add_light(model, LightSettings(kind, 3, 2), seed=0)
    return model


for _kind in KINDS:
    neutral(f"{_kind}, just added")(lambda kind=_kind: (decoder(spec_of()), _with_adapter(kind)))


@neutral("a masked LoRA, just added")
def _() -> tuple[Forward, Forward]:
    plain, adapted = decoder(spec_of()), decoder(spec_of())
    for model in (plain, adapted):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[::2] = 0
    add_lora(adapted, LoraSettings(r=2), seed=0, places=nonzero_places(adapted))
    return plain, adapted


def _prompted() -> Llama:
    model = _with_adapter("llama_adapter_v2")
    generator = torch_generator(1, "prompted")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


add_decoder("prompted", _prompted)


def _with_twins(*mergers: MergerKind) -> Llama:
    """A decoder of layers without and with a twin, in turn; no twin is like its layer."""
    blocks = [block for kind in mergers for block in (BLOCK, dataclasses.replace(BLOCK, merger=kind))]
    return decoder(spec_of(*blocks))


add_decoder("twins", lambda: _with_twins("lerp", "dlerp", "prog"))
add_decoder("more-twins", lambda: _with_twins("slerp", "moe", "dlerpin"))


def _expanded(merger: MergerKind, kind: expand.Kind = "concat") -> Callable[[], tuple[Forward, Forward]]:
    def make() -> tuple[Forward, Forward]:
        model = decoder(spec_of(BLOCK, BLOCK, BLOCK, BLOCK))
        planned = expand.plan(model.spec, (1, 3), merger, kind)
        # The map of prog stands in the mix: at identity it is neutral.
        return model, expand.expand(model, planned, seed=0, noise=0.0 if merger == "prog" else 0.01)

    return make


for _merger in get_args(MergerKind):
    neutral(f"new twins, merged by {_merger}")(_expanded(_merger))
neutral("new layers, stacked")(_expanded("lerp", "stack"))
neutral("new layers, stacked, and new twins")(_expanded("dlerp", "hybrid"))


@neutral("muP's start with constants that change nothing")
def _mup() -> tuple[Forward, Forward]:
    plain, started = (Llama(spec_of(), generator=torch_generator(5, "mup")) for _ in range(2))
    same = Mup(base_width=plain.spec.hidden_size, deviation=0.02, embedding_multiplier=1, output_multiplier=1)
    begin(started, same.model_copy(update={"attention": "inverse_root", "depth_scaled": False}))
    return plain, started
