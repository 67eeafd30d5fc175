"""Whether a checkpoint says to others what it says here: logits in transformers, ids of its end and pad, and
rows that were cut off.

Systems S38 (arXiv:2412.13335), whose export cuts the padded rows off embedding and head, and S65
(arXiv:2408.03506), whose tokens' roles must be found in the generation config too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from puna.core.errors import PunaError
from puna.core.files import read_json
from puna.core.seeds import torch_generator
from puna.text import pretrained


@torch.no_grad()
def check(folder: Path, cut: Path | None, length: int) -> dict[str, float]:
    """Figures of the checkpoint in ``folder``, and of the one with fewer rows in ``cut``.

    ``difference`` is the largest one of logits from transformers' on ``length`` random tokens that both have.
    ``roles_differ`` counts ids of end and pad, in config.json and generation_config.json, that are not the
    tokenizer's. Of the cut checkpoint: ``cut.rows`` that are left, ``cut.moved`` how far the logits of the
    left rows moved, ``cut.difference`` from transformers' logits of it.
    """
    from transformers import AutoModelForCausalLM

    model = pretrained.load_plain(folder).eval()
    short = pretrained.load_plain(cut).eval() if cut is not None else None
    rows = model.spec.vocab_size if short is None else short.spec.vocab_size
    generator = torch_generator(0, "export checks", rows)
    ids = torch.randint(rows, (2, length), generator=generator)
    logits = model(ids)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    figures = {
        "rows": float(model.spec.vocab_size),
        "difference": float((logits - theirs(ids).logits).abs().max()),
        "roles_differ": float(_roles_differ(folder, model.tokenizer)),
    }
    if short is not None:
        left = short(ids)
        theirs = AutoModelForCausalLM.from_pretrained(cut, dtype=torch.float32).eval()
        figures |= {
            "cut.rows": float(rows),
            "cut.moved": float((left - logits[..., :rows]).abs().max()),
            "cut.difference": float((left - theirs(ids).logits).abs().max()),
        }
    return figures


def _roles_differ(folder: Path, tokenizer: Any) -> int:
    if tokenizer is None:
        raise PunaError("the model has no tokenizer", where=folder, fix="put tokenizer.json beside it")
    differing = 0
    for name in ("config.json", "generation_config.json"):
        said = read_json(folder / name)
        ends = said.get("eos_token_id")
        first = ends[0] if isinstance(ends, list) else ends
        differing += first != tokenizer.eos_id
        differing += said.get("pad_token_id") != tokenizer.pad_id
    return differing
