"""Cutting blocks out of a decoder: what is left is what it was, and mistakes are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.core.errors import PunaError
from puna.core.stage import Context, get_stage, validate
from puna.edit.shorten import shorten
from puna.text import pretrained
from tests.invariants import kit


@kit.neutral("every block kept")
def _() -> tuple[kit.Forward, kit.Forward]:
    model = kit.decoder(kit.spec_of(kit.BLOCK, kit.BLOCK, kit.BLOCK))
    return model, shorten(model, (0, 1, 2))


def test_all_blocks_kept_change_no_bit() -> None:
    plain, changed = kit.NEUTRAL["every block kept"]()
    kit.assert_same_bits(plain, changed, kit.random_ids(2, 17))


def test_a_cut_block_is_as_one_that_adds_nothing() -> None:
    model = kit.decoder(kit.spec_of(kit.BLOCK, kit.BLOCK, kit.BLOCK))
    short = shorten(model, (0, 2))
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    kit.assert_same_bits(model, short, kit.random_ids(2, 17))


@pytest.mark.parametrize("kept", [(), (0, 3), (-1, 0), (1, 0), (1, 1)])
def test_blocks_that_cannot_be_kept_are_refused(kept: tuple[int, ...]) -> None:
    with pytest.raises(PunaError) as error:
        shorten(kit.decoder(kit.spec_of(kit.BLOCK, kit.BLOCK, kit.BLOCK)), kept)
    assert error.value.where == "blocks"


def test_the_stage_writes_a_checkpoint_that_transformers_opens(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_llama(num_hidden_layers=4)
    model.tokenizer = tiny_tokenizer
    source = pretrained.save(model, tmp_path / "whole")
    stage = get_stage("shorten")
    settings = validate(stage.parameters, {"blocks": [0, 3], "save_dtype": "float32"}, where="test")
    outcome = stage.function(Context("cut", tmp_path / "cut", {"model": str(source)}), settings)
    short = pretrained.load(outcome.outputs["model"])
    assert outcome.metrics["blocks"] == 2
    assert outcome.metrics["share"] == short.spec.parameter_count() / model.spec.parameter_count()
    assert short.tokenizer is not None and short.tokenizer.fingerprint == tiny_tokenizer.fingerprint
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(outcome.outputs["model"], dtype=torch.float32)(
            ids
        ).logits
        assert torch.equal(short(ids), shorten(model, (0, 3)).eval()(ids))
        torch.testing.assert_close(short(ids), expected, atol=1e-5, rtol=0)
