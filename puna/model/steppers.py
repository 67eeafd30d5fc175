"""Which stepper runs a model: the native one where machine and model allow it, else the plain one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from puna.core.errors import PunaError, unknown_name
from puna.core.progress import say
from puna.model.group_rounding import rounded_copy
from puna.model.labels import require_words
from puna.model.plain_stepper import PlainStepper

if TYPE_CHECKING:
    from puna.model.llama import Llama
    from puna.model.paged import CachePolicy
    from puna.model.stepper import Stepper

Quantize = Literal["int8", "int4"]
Kernels = Literal["auto", "native", "plain"]


def make_stepper(
    model: Llama,
    *,
    quantize: Quantize | None = None,
    cache_tokens: int,
    kernels: Kernels = "auto",
    policies: Sequence[CachePolicy] | None = None,
    like: Stepper | None = None,
) -> Stepper:
    """Lay ``model`` out for decoding, with a cache of ``cache_tokens`` tokens for all texts together.

    ``stepper.name`` says which kernels were taken. The plain stepper computes in float32 with the
    weights that ``quantize`` leaves, which is no faster. What ``like``, a stepper of another model, has laid
    out of parameters that both models have in common is laid out once.
    """
    if kernels not in get_args(Kernels):
        raise unknown_name("kernels", str(kernels), get_args(Kernels))
    if quantize is not None and quantize not in get_args(Quantize):
        raise unknown_name("quantisation", str(quantize), get_args(Quantize))
    if cache_tokens < 1:
        raise PunaError("cache_tokens is out of range", found=cache_tokens, expected="at least 1")
    require_words(model, "decoding")
    if kernels != "plain":
        from puna.model.native.build import CompilationError
        from puna.model.native.stepper import NativeStepper

        try:
            return NativeStepper(
                model,
                quantize=quantize,
                cache_tokens=cache_tokens,
                policies=policies,
                like=like if isinstance(like, NativeStepper) else None,
            )
        except PunaError as error:
            if kernels == "native":
                raise
            if isinstance(error, CompilationError) or quantize is not None:
                _say_once(f"{error}\n  meanwhile the plain stepper is used, which is slower")
    if quantize is not None:
        model = rounded_copy(model, quantize)
    return PlainStepper(
        model,
        cache_tokens=cache_tokens,
        policies=policies,
        like=like if isinstance(like, PlainStepper) else None,
    )


@functools.cache
def _say_once(text: str) -> None:
    say(text)
