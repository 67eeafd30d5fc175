"""Training of LLaMA-Adapter's prompts, scales, biases and norms (S09): what is written of it, and groups.

Groups: what a batch of one kind may change. LLaMA-Adapter V2 trains on captions and on instructions by
turns, and gives each its own parameters, so that neither disturbs the other. The mechanism is here and
knows no images.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from puna.core.errors import PunaError, unknown_name
from puna.core.stage import Context
from puna.model.light_adapter import LightSettings, add_light, fold, take_prompts
from puna.text import pretrained
from puna.train.settings import LightAdapter
from puna.train.stages import Train

if TYPE_CHECKING:
    from puna.model.llama import Llama


def light_settings(adapter: LightAdapter) -> LightSettings:
    """The same for the decoder."""
    return LightSettings(adapter.kind, adapter.prompt_length, adapter.prompt_layers)


@torch.no_grad()
def write_light(
    context: Context,
    parameters: Train,
    final: Llama,
    masters: Iterable[tuple[str, Tensor]],
    seed: int,
) -> dict[str, Path]:
    """Save what was trained; ``final`` is the base opened again in float32.

    Scales, biases and norms go into the weights of the output ``model``; prompts are the output ``adapter``,
    over that model, or over the base as it was where nothing but prompts was trained.
    """
    assert parameters.adapter is not None
    state = add_light(final, light_settings(parameters.adapter), seed=seed)
    places = dict(final.named_parameters())
    for name, master in masters:
        places[name].copy_(master)
    outputs: dict[str, Path] = {}
    scaled = state.scaled
    fold(final)
    if scaled:
        with take_prompts(final):
            kind = pretrained.DTYPES[parameters.save_dtype]
            outputs["model"] = pretrained.save(final.to(kind), context.out / "model")
        final.source = str(outputs["model"])
    if final.adapter is not None:
        within = context.out.parent
        outputs["adapter"] = pretrained.save(final, context.out / "adapter", "adapter", within=within)
    return outputs


@dataclass(frozen=True)
class Groups:
    """By kind of batch, patterns of the parameters that it may change; each belongs to one kind."""

    patterns: Mapping[str, Sequence[str]]

    def of(self, names: Iterable[str]) -> dict[str, frozenset[str]]:
        """The trained parameters ``names`` by kind; one that is in no group or in two is an error."""
        found: dict[str, set[str]] = {kind: set() for kind in self.patterns}
        for name in names:
            kinds = [
                kind
                for kind, patterns in self.patterns.items()
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
            ]
            if len(kinds) != 1:
                raise PunaError(
                    "a trained parameter belongs to one group",
                    where=name,
                    found=", ".join(kinds) or "none",
                    expected=f"one of {', '.join(self.patterns)}",
                )
            found[kinds[0]].add(name)
        return {kind: frozenset(members) for kind, members in found.items()}

    def held(self, kind: str, names: Iterable[str]) -> frozenset[str]:
        """The parameters that a batch of ``kind`` leaves as they are, for ``Optimizer.holding``."""
        if kind not in self.patterns:
            raise unknown_name("kind of batch", kind, self.patterns)
        every = self.of(names)
        return frozenset().union(*(members for other, members in every.items() if other != kind))


INSTRUCTIONS_AND_CAPTIONS = Groups(
    {
        "caption": ("model.layers.0.self_attn.prompt.*",),
        "instruction": (
            "model.layers.[1-9]*.self_attn.prompt.*",
            "*_proj.scale",
            "*_proj.shift",
            "*norm.weight",
        ),
    }
)
"""As S09 has it: what comes with an image enters at the first layer alone, instructions own all else."""
