"""Small feeds and loops over the tiny Llama."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from little_rows import MIXED, rows
from little_trainings import write_places

from puna.text.packing import Packed
from puna.train.loader import Feed
from puna.train.loop import Loop, LoopSettings
from puna.train.objectives import CrossEntropy
from puna.train.optimizer import Optimizer, OptimizerSettings
from puna.train.schedule import preset


@pytest.fixture
def make_loop(tiny_llama: Callable[..., Any]) -> Callable[..., Loop]:
    """``make_loop(out, ...)`` is a loop over the tiny model, trained in full unless a model is given."""

    def build(
        out: Path,
        *,
        model: Any = None,
        packed: Packed | None = None,
        batch_tokens: int = 64,
        micro_batch_tokens: int = 64,
        optimizer: OptimizerSettings | None = None,
        recipe: dict[str, Any] | None = None,
        world: Any = None,
        evaluate: Any = None,
        **settings: Any,
    ) -> Loop:
        model = tiny_llama() if model is None else model
        feed = Feed(
            packed or rows(MIXED, share=0.7),
            batch_tokens=batch_tokens,
            micro_batch_tokens=micro_batch_tokens,
            seed=1,
            rank=world.rank if world else 0,
            size=world.size if world else 1,
        )
        steps, tokens = feed.count(max_steps=settings.pop("total_steps", 6))
        settings = {"schedule": preset("constant", steps), "seed": 5, **settings}
        return Loop(
            model,
            feed,
            CrossEntropy(),
            Optimizer(model.named_parameters(), optimizer or OptimizerSettings(3e-3)),
            LoopSettings(total_steps=steps, total_tokens=tokens, **settings),
            out=out,
            recipe=recipe or {},
            world=world,
            evaluate=evaluate,
        )

    return build


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Path]:
    """A model folder and corpora of documents, conversations and preferences."""
    return write_places(tmp_path_factory.mktemp("train-stage"), tiny_tokenizer)
