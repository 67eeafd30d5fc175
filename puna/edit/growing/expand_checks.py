"""What an expanded model holds of its base, and what its doubled keys cost (S02, Control LLM, 2501.10979)."""

from __future__ import annotations

import dataclasses
import hashlib

import torch

from puna.core.errors import PunaError
from puna.decode.engine import Engine
from puna.decode.sampling import Sampling
from puna.edit.growing.expand import Plan, expand
from puna.model.cache import KeyValueCache
from puna.model.hf import bytes_of
from puna.model.llama import Llama
from puna.model.plain_stepper import PlainStepper
from puna.model.probe import PROBE_TOKENS, difference, probe, probe_ids
from puna.model.spec import LlamaSpec
from puna.model.twins import watched
from puna.text.stored_weights import Weights, parts_of
from puna.train.twins import divergence_of

SERVED_TOKENS = 16


@torch.no_grad()
def at_start(base: Llama, planned: Plan, *, seed: int, noise: float) -> tuple[Llama, dict[str, float]]:
    """The expanded decoder, and how far it is from its base: logits, and the two divergences, at most."""
    grown = expand(base, planned, seed=seed, noise=noise)
    figures = {"difference": difference(probe(base), probe(grown))}
    with watched(grown) as seen:
        grown.hidden(probe_ids(grown))
    for kind in ("cosine", "mse"):
        found = [float(divergence_of(each, kind, 1.0).max()) for each in seen]
        figures[f"divergence.{kind}"] = max(found, default=0.0)
    return grown, figures


def tensors_kept(base: Weights, expanded: Weights) -> dict[str, float]:
    """How many tensors the base has, and how many of them have another SHA-256 in the expanded model."""
    changed = 0
    for name, shape in base.shapes.items():
        if expanded.shapes.get(name) != shape:
            raise PunaError(
                f"tensor {name!r} of the base is not in the expanded model",
                where=expanded.label,
                found=f"shape {expanded.shapes.get(name)}",
                expected=f"shape {shape} as in {base.label}",
                fix="give the base that the model was expanded from; inserted layers have no such check",
            )
        changed += _hash(base, name) != _hash(expanded, name)
    added = sum(
        torch.Size(shape).numel() for name, shape in expanded.shapes.items() if name not in base.shapes
    )
    return {
        "frozen_tensors": float(len(base.shapes)),
        "frozen_changed": float(changed),
        "added_parameters": float(added),
    }


def _hash(weights: Weights, name: str) -> str:
    """SHA-256 of a tensor as float32, which every stored type fits into, and of its type."""
    digest = hashlib.sha256(str(weights.dtype(name)).encode())
    for start, stop in parts_of(weights.shapes[name]):
        digest.update(bytes_of(weights.part(name, start, stop)))
    return digest.hexdigest()


def formula(spec: LlamaSpec) -> float:
    """Weights of the twins, each as many as a layer, and of their mergers: 2 hidden + 1 for ``dlerp``."""
    total = 0
    for block in (block for block in spec.blocks if block.merger):
        layer = dataclasses.replace(block, merger=None)
        total += layer.parameter_count(spec.hidden_size, spec.attention_bias, spec.mlp_bias)
        total += block.merger_parameters(spec.hidden_size)
    return float(total)


@torch.no_grad()
def keys_kept(base: Llama, expanded: Llama) -> dict[str, float]:
    """Bytes of stored keys over the base's, and whether what reads them says what the model says.

    ``cached_difference``: the largest difference of a logit, read token by token with a cache or at once.
    ``served``: the share of greedy tokens out of the engine that are those of the model without a cache.
    """
    ids = probe_ids(expanded)
    whole = expanded(ids)
    cache = KeyValueCache(expanded.spec, 1, PROBE_TOKENS, dtype=expanded.dtype)
    parts = torch.cat([expanded(ids[:, [place]], cache=cache) for place in range(PROBE_TOKENS)], dim=1)
    blocks = [PlainStepper(model, cache_tokens=16).pool.bytes_per_block for model in (expanded, base)]
    keys = [KeyValueCache(model.spec, 1, 16).key_bytes for model in (expanded, base)]
    layers = len(base.spec.blocks)
    return {
        "cache_ratio": keys[0] / keys[1],
        "cache_ratio.engine": blocks[0] / blocks[1],
        "cache_ratio.formula": len(expanded.spec.slots) / layers,
        "cached_difference": difference(whole, parts),
        "served": _served(expanded, ids),
    }


def _served(model: Llama, ids: torch.Tensor) -> float:
    engine = Engine(model, cache_tokens=4 * PROBE_TOKENS)
    asked = Sampling(max_tokens=SERVED_TOKENS, temperature=0.0, ignore_eos=True)
    (completion,) = engine.generate([ids[0].tolist()], asked)
    alone = ids
    for _ in range(SERVED_TOKENS):
        alone = torch.cat((alone, model(alone)[:, -1:].argmax(-1)), dim=1)
    own = alone[0, ids.shape[1] :].tolist()
    same = sum(one == other for one, other in zip(completion.ids, own, strict=True))
    return float(same) / SERVED_TOKENS
