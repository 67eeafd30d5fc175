"""What stops a training: losses that are not finite, and disks without room. Nothing is lost by either."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from little_checkpoints import stored
from little_rows import MIXED, rows

from puna.core.errors import PunaError
from puna.train import offending
from puna.train.distributed import World
from puna.train.loop import Loop
from puna.train.metrics import read_metrics
from puna.train.objectives import CrossEntropy

MakeLoop = Callable[..., Loop]


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to let any file of this process grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def poisoned(tiny_llama: Callable[..., Any], packed: Any, row: int) -> Any:
    """A model that gives nan wherever a token stands that only this row has."""
    model = tiny_llama(tie_word_embeddings=False)
    ids = [set(packed[number].slices[0].document.ids) for number in range(len(packed))]
    own = ids[row].difference(*(ids[number] for number in range(len(packed)) if number != row))
    first = next(token for token in packed[row].slices[0].document.ids if token in own)  # all after it see it
    with torch.no_grad():
        model.model.embed_tokens.weight[first] = float("nan")
    return model


def test_the_batch_behind_a_loss_that_is_not_finite_is_saved_and_gives_it_again(
    make_loop: MakeLoop, tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    packed = rows(MIXED, share=0.7)
    probe = make_loop(tmp_path / "probe", packed=packed, micro_batch_tokens=32)
    third = probe.feed.steps(0)[2]
    row = int(third.rows[0])
    model = poisoned(tiny_llama, packed, row)
    model.tokenizer = tiny_tokenizer
    loop = make_loop(tmp_path, model=model, packed=packed, micro_batch_tokens=32, save_steps=1)
    with pytest.raises(PunaError, match="the loss is not finite") as error:
        loop.run()
    file = tmp_path / "offending" / "step-00000003.safetensors"
    assert str(file) in str(error.value) and "checkpoint-00000002" in str(error.value)
    saved = offending.load(file)
    assert row in saved.rows and len(saved.rows) < len(third.rows), "only micro-batches that are not finite"
    with torch.no_grad():
        assert not CrossEntropy()(model, saved).total.isfinite()
        others = [micro for micro in loop.feed.micro_batches(third) if row not in micro.rows]
        assert others and all(CrossEntropy()(model, micro).total.isfinite() for micro in others)
    about = json.loads(file.with_suffix(".json").read_text())
    assert (about["step"], about["what"], about["value"]) == (3, "the loss", "nan")
    assert [said["row"] for said in about["rows"]] == saved.rows.tolist()
    said = next(said for said in about["rows"] if said["row"] == row)
    document = packed[row].slices[0].document
    assert said["pieces"] == [{"document": document.source, "start": 0, "stop": len(document.ids)}]
    assert said["text"] == tiny_tokenizer.decode(document.ids, skip_special=False)


def test_each_process_saves_under_a_name_of_its_own() -> None:
    names = {offending.file_of(Path("run"), 3, World(rank, 2)) for rank in (0, 1)}
    assert len(names) == 2 and offending.file_of(Path("run"), 3, World()) not in names


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before_and_goes_on_with_room(
    make_loop: MakeLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puna.train import checkpoint

    whole = make_loop(tmp_path / "whole", save_steps=2)
    whole.run()
    real, calls = checkpoint.write_tensors, 0

    def write_tensors(*given: Any) -> dict[str, str]:
        nonlocal calls
        calls += 1
        if calls == 1:
            return real(*given)
        with files_of_at_most(100_000):
            return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", write_tensors)
        with pytest.raises(PunaError, match="no room to write this") as error:
            make_loop(tmp_path / "run", save_steps=2).run()
    told = str(error.value)
    assert "checkpoint-00000004" in str(error.value.where)
    assert "bytes are free" in told and "room for" in told
    assert "checkpoint-00000002: the same command goes on from there" in told
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-00000002"]
    resumed = make_loop(tmp_path / "run", save_steps=2)
    resumed.run()
    for name, tensor in whole.optimizer.weights().items():
        assert torch.equal(tensor, resumed.optimizer.weights()[name]), name


def test_a_line_of_metrics_that_finds_no_room_is_told_and_written_once_there_is(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    make_loop(tmp_path / "whole").run()
    with files_of_at_most(1000), pytest.raises(PunaError, match="no room to write this") as error:
        make_loop(tmp_path / "run").run()
    assert error.value.where == tmp_path / "run" / "metrics.jsonl"
    assert "no checkpoint was made yet" in str(error.value)
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size == 1000, "it was cut in the middle of a line"
    make_loop(tmp_path / "run").run()
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "run")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_flipped_bit_in_the_record_of_a_checkpoint_is_seen_or_changes_nothing(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    """One in a digit of the position would otherwise be gone on from."""
    from puna.train import checkpoint

    make_loop(tmp_path, recipe={"learning_rate": 1e-3}).run()
    folder = tmp_path / "checkpoints" / "checkpoint-00000006"
    file = folder / "state.json"
    plain, content = file.read_bytes(), checkpoint._described(folder)
    seen = 0
    for place in range(len(plain)):
        spoilt = bytearray(plain)
        spoilt[place] ^= 1 << place % 8
        file.write_bytes(spoilt)
        try:
            assert checkpoint._described(folder) == content
        except PunaError:
            seen += 1
    assert seen > len(plain) // 2


def test_what_kills_left_half_written_is_cleared(make_loop: MakeLoop, tmp_path: Path) -> None:
    left = [
        tmp_path / "checkpoints" / ".checkpoint-00000004.0badcafe.part",
        tmp_path / "checkpoints" / ".checkpoint-00000002.0badcafe.old",
    ]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").write_bytes(b"half")
    (tmp_path / ".metrics.jsonl.0badcafe.part").write_text("half")
    (tmp_path / ".mine").write_text("not puna's")
    make_loop(tmp_path).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "checkpoints", "metrics.jsonl"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-00000006"]


def test_a_kept_state_outlives_the_checkpoints_it_was_taken_from(make_loop: MakeLoop, tmp_path: Path) -> None:
    make_loop(tmp_path, save_steps=1, state_after=2).run()
    assert not (tmp_path / "checkpoints" / "checkpoint-00000002").exists()
    state = json.loads((tmp_path / "state" / "state.json").read_text())
    assert state["state"]["step"] == 2
    assert "first/model.norm.weight" in stored(tmp_path / "state")
