"""Divergences from a teacher: equal to trl's, never negative, chunked without a trace, exact from a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.train.distillation import (
    Direction,
    LinearTeacher,
    TopTokens,
    hidden_cosine,
    hidden_mean_squared_error,
    kl,
    linear_kl,
    linear_top_k_kl,
    linear_top_tokens,
    top_k_kl,
    top_tokens,
)
from puna.train.teacher_cache import TeacherCache, write_teacher_cache

DIRECTIONS: tuple[Direction, ...] = ("forward", "reverse")
BETA = {"forward": 0.0, "reverse": 1.0}  # trl's name for the direction


def draw(name: str, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, name), dtype=dtype)


def make(
    rows: int, vocabulary: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, LinearTeacher]:
    """Student hidden states [rows, 6] and head, and a wider teacher."""
    teacher = LinearTeacher(
        draw("teacher", rows, 9, seed=seed, dtype=dtype),
        draw("its head", vocabulary, 9, seed=seed, dtype=dtype),
    )
    student = draw("student", rows, 6, seed=seed, dtype=dtype)
    return student, draw("head", vocabulary, 6, seed=seed, dtype=dtype), teacher


def logits_of(teacher: LinearTeacher) -> Tensor:
    return teacher.hidden @ teacher.weight.T


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_of_logits_equals_trl(direction: Direction, temperature: float) -> None:
    pytest.importorskip("trl")
    from trl.experimental.gkd import GKDTrainer

    ours = draw("student", 3, 4, 11).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    teacher = draw("teacher", 3, 4, 11)
    found = kl(ours, teacher, direction, temperature=temperature)
    each = GKDTrainer.generalized_jsd_loss(
        theirs, teacher, beta=BETA[direction], temperature=temperature, reduction="none"
    )
    assert found.shape == (3, 4)
    assert (found - each.sum(-1)).abs().max() < 1e-6
    found.sum().backward()
    each.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("chunk", [3, 100])
def test_fused_divergence_equals_trl_in_value_and_gradients(
    direction: Direction, temperature: float, chunk: int
) -> None:
    pytest.importorskip("trl")
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    hidden, weight, teacher = make(14, 31)
    mask = torch.rand(14, generator=torch_generator(1, "mask")) > 0.3
    ours = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    theirs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    found = linear_kl(*ours, teacher, direction, weights=mask, temperature=temperature, chunk=chunk)
    expected, _, count = _chunked_divergence_loss(
        theirs[0][None],
        teacher.hidden[None],
        theirs[1],
        teacher.weight,
        mask[None],
        BETA[direction],
        temperature=temperature,
    )
    assert found.count == int(count) < 14
    mean = found.total / found.count
    assert abs(float((mean - expected).detach())) < 1e-6
    mean.backward()
    expected.backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("k", [1, 4, 12])
def test_top_k_divergence_equals_trl(direction: Direction, k: int) -> None:
    """trl takes the support from its first argument and means the student: handed over in turn, with the
    other direction's weight, the same code is the divergence over the teacher's support."""
    pytest.importorskip("trl")
    from trl.experimental.sdft.loss_utils import compute_topk_self_distillation_loss

    ours = draw("student", 5, 12).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    teacher = draw("teacher", 5, 12)
    found = top_k_kl(ours, teacher, direction, k=k)
    expected = compute_topk_self_distillation_loss(
        teacher,
        theirs,
        distillation_topk=k,
        distillation_alpha=1 - BETA[direction],
        distillation_add_tail=False,
    )
    assert (found - expected).abs().max() < 1e-6
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.integers(1, 30),
    scale=st.sampled_from([1e-4, 0.1, 1.0, 30.0]),
    apart=st.sampled_from([0.0, 1e-6, 1e-3, 1.0]),
    direction=st.sampled_from(DIRECTIONS),
    data=st.data(),
)
def test_top_k_divergence_is_never_negative_and_whole_at_the_vocabulary(
    seed: int, vocabulary: int, scale: float, apart: float, direction: Direction, data: Any
) -> None:
    teacher = scale * draw("teacher", 7, vocabulary, seed=seed)
    student = teacher + apart * scale * draw("student", 7, vocabulary, seed=seed)
    k = data.draw(st.integers(1, vocabulary))
    some = top_k_kl(student, teacher, direction, k=k)
    assert (some >= 0).all() and some.isfinite().all()
    if apart == 0:
        assert some.max() < 1e-6
    whole = kl(student, teacher, direction)
    assert (whole >= 0).all()
    everywhere = top_k_kl(student, teacher, direction, k=vocabulary)
    torch.testing.assert_close(everywhere, whole, rtol=1e-5, atol=1e-5 * max(1.0, scale))
    fused = linear_top_k_kl(student, torch.eye(vocabulary), teacher, direction, k=k)
    assert (fused.positions >= 0).all()
    torch.testing.assert_close(fused.positions, some, rtol=1e-5, atol=1e-5 * max(1.0, scale))


def test_the_support_is_the_teachers() -> None:
    """The student's own favourite, which the teacher finds unlikely, gets no gradient at k = 2."""
    teacher = torch.tensor([[3.0, 2.0, -4.0, -5.0]])
    student = torch.tensor([[0.0, 1.0, 9.0, 0.0]], requires_grad=True)
    top_k_kl(student, teacher, "reverse", k=2).sum().backward()
    assert student.grad is not None
    assert student.grad[0, 2:].tolist() == [0.0, 0.0]
    assert student.grad[0, :2].abs().min() > 0


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40),
    vocabulary=st.integers(2, 30),
    chunk=st.integers(1, 50),
    seed=st.integers(0, 1000),
    direction=st.sampled_from(DIRECTIONS),
    kept=st.sampled_from([None, 0.0, 0.3, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    from_tokens=st.booleans(),
)
def test_fused_equals_plain_whatever_the_chunk(
    rows: int,
    vocabulary: int,
    chunk: int,
    seed: int,
    direction: Direction,
    kept: float | None,
    temperature: float,
    from_tokens: bool,
) -> None:
    hidden, weight, teacher = make(rows, vocabulary, seed)
    k = 1 + seed % vocabulary
    weights = torch.rand(rows, generator=torch_generator(seed, "weights"))
    if kept is not None:
        weights = weights * (torch.rand(rows, generator=torch_generator(seed, "kept")) < kept)
    for top in (None, k):
        ours = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        theirs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logits = theirs[0] @ theirs[1].T
        options: dict[str, Any] = {"weights": weights, "temperature": temperature, "chunk": chunk}
        if top is None:
            loss = linear_kl(*ours, logits_of(teacher) if from_tokens else teacher, direction, **options)
            each = kl(logits, logits_of(teacher), direction, temperature=temperature)
        else:
            given_as = linear_top_tokens(teacher.hidden, teacher.weight, top) if from_tokens else teacher
            loss = linear_top_k_kl(*ours, given_as, direction, k=top, **options)
            each = top_k_kl(logits, logits_of(teacher), direction, k=top, temperature=temperature)
        (3 * loss.total).backward()
        (3 * (each * weights).sum()).backward()
        torch.testing.assert_close(loss.positions, each.detach()[weights > 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loss.total, (each * weights).sum(), rtol=1e-4, atol=1e-4)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("chunk", [2, 100])
def test_gradients_of_the_fused_divergences_pass_gradcheck(
    direction: Direction, k: int | None, chunk: int
) -> None:
    hidden, weight, teacher = make(5, 7, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.0, 0.25, 2.0, 1.0], dtype=torch.float64)

    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        options: dict[str, Any] = {"weights": weights, "temperature": 1.3, "chunk": chunk}
        if k is None:
            return linear_kl(hidden, weight, teacher, direction, **options).total
        return linear_top_k_kl(hidden, weight, teacher, direction, k=k, **options).total

    assert torch.autograd.gradcheck(total, (hidden.requires_grad_(), weight.requires_grad_()))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    garbage=st.sampled_from([float("nan"), float("inf"), 1e30]),
    direction=st.sampled_from(DIRECTIONS),
    top=st.booleans(),
)
def test_masked_positions_never_matter(seed: int, garbage: float, direction: Direction, top: bool) -> None:
    hidden, weight, teacher = make(12, 15, seed)
    mask = torch.rand(3, 4, generator=torch_generator(seed, "mask")) > 0.5
    spoilt = hidden.clone(), teacher.hidden.clone()
    for tensor in spoilt:
        tensor[~mask.flatten()] = garbage
    results = []
    for ours, theirs in ((hidden, teacher.hidden), spoilt):
        ours = ours.view(3, 4, 6).clone().requires_grad_()
        head = weight.clone().requires_grad_()
        given = LinearTeacher(theirs.view(3, 4, 9), teacher.weight)
        if top:
            loss = linear_top_k_kl(ours, head, given, direction, k=5, weights=mask)
        else:
            loss = linear_kl(ours, head, given, direction, weights=mask)
        loss.total.backward()
        states = ours.detach().clone().requires_grad_()
        distance = hidden_cosine(states, theirs.view(3, 4, 9)[..., :6], mask).total
        distance = distance + hidden_mean_squared_error(states, theirs.view(3, 4, 9)[..., :6], mask).total
        distance.backward()
        assert ours.grad is not None and states.grad is not None
        assert not ours.grad[~mask].any() and not states.grad[~mask].any()
        results.append((loss.total, loss.positions, ours.grad, head.grad, distance, states.grad))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_frozen_head_gets_no_gradient_and_teachers_never_do() -> None:
    hidden, weight, teacher = make(8, 10)
    hidden.requires_grad_()
    asking = LinearTeacher(teacher.hidden.requires_grad_(), teacher.weight.requires_grad_())
    loss = linear_kl(hidden, weight, asking, "forward")
    assert loss.total.grad_fn is not None
    assert loss.total.grad_fn.saved_tensors[1] is None, "the head's gradient was made although it is frozen"  # type: ignore[attr-defined]
    loss.total.backward()
    assert hidden.grad is not None and teacher.hidden.grad is None and teacher.weight.grad is None
    hidden_mean_squared_error(hidden, teacher.hidden[:, :6]).total.backward()
    assert teacher.hidden.grad is None


def test_logits_of_all_positions_never_exist() -> None:
    """No tensor that a forward pass makes holds more rows of the vocabulary than a chunk has."""
    from torch.utils._python_dispatch import TorchDispatchMode

    hidden, weight, teacher = make(64, 40)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor) and tensor.ndim == 2 and tensor.shape[1] == 40:
                    largest = max(largest, tensor.shape[0])
            return result

    with Watch():
        linear_kl(hidden.requires_grad_(), weight, teacher, "reverse", chunk=12).total.backward()
        linear_top_k_kl(hidden, weight, teacher, "forward", k=4, chunk=12).total.backward()
        linear_top_tokens(teacher.hidden, teacher.weight, 4, chunk=12)
    assert largest == 12


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bfloat16_takes_its_divergence_in_float32(direction: Direction) -> None:
    hidden, weight, teacher = make(40, 50)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    half = LinearTeacher(teacher.hidden.bfloat16(), teacher.weight.bfloat16())
    loss = linear_kl(hidden, weight, half, direction, chunk=16)
    exact = kl((hidden @ weight.T).float(), logits_of(half).float(), direction)
    assert loss.positions.dtype == loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.positions, exact, rtol=1e-5, atol=1e-5)


def test_top_tokens_are_true_log_probabilities_likeliest_first() -> None:
    logits = draw("logits", 4, 9)
    found = top_tokens(logits, 3)
    everything = logits.log_softmax(-1)
    torch.testing.assert_close(found.log_probs, everything.sort(-1, descending=True).values[:, :3])
    torch.testing.assert_close(found.log_probs, everything.gather(1, found.ids.long()))
    assert (found.log_probs.exp().sum(-1) < 1).all()
    hidden, _, teacher = make(10, 9)
    at_once = top_tokens(logits_of(teacher), 4)
    chunked = linear_top_tokens(teacher.hidden.view(2, 5, 9), teacher.weight, 4, chunk=3)
    assert chunked.ids.dtype == torch.int32 and chunked.ids.shape == (2, 5, 4)
    assert torch.equal(chunked.ids.view(10, 4).long(), at_once.ids)
    torch.testing.assert_close(chunked.log_probs.view(10, 4), at_once.log_probs)
    assert linear_top_tokens(hidden[:0, :].new_zeros(0, 9), teacher.weight, 4).ids.shape == (0, 4)


def test_hidden_distances_are_what_they_say() -> None:
    student = torch.tensor([[3.0, 0.0], [1.0, 1.0], [-2.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    cosine = hidden_cosine(student, teacher)
    torch.testing.assert_close(cosine.positions, torch.tensor([0.0, 1 - 2**-0.5, 2.0]))
    squared = hidden_mean_squared_error(student, teacher, torch.tensor([True, False, True]))
    torch.testing.assert_close(squared.positions, torch.tensor([2.0, 4.5]))
    assert float(squared.total) == 6.5 and squared.count == 2


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    k=st.sampled_from([None, 1, 5]),
    dtype=st.sampled_from(["float16", "float32"]),
    shard_bytes=st.sampled_from([1, 200, 1e9]),
)
def test_a_cache_gives_back_exactly_what_was_rounded_into_it(
    tmp_path_factory: Any, lengths: list[int], k: int | None, dtype: Any, shard_bytes: float
) -> None:
    folder = tmp_path_factory.mktemp("teacher") / "cache"
    logits = {f"row {n}": draw("logits", length, 21, seed=n) for n, length in enumerate(lengths)}
    rows = {
        name: value.log_softmax(-1) if k is None else top_tokens(value, k) for name, value in logits.items()
    }
    about = {"teacher": "a larger llama"}
    written = write_teacher_cache(
        folder, rows.items(), vocabulary=21, dtype=dtype, about=about, shard_bytes=shard_bytes
    )
    cache = TeacherCache(folder)
    assert written == sum(lengths) == sum(cache.positions.values())
    assert (cache.vocabulary, cache.k, cache.about) == (21, k, about)
    stored = getattr(torch, dtype)
    for name, row in rows.items():
        found = cache.row(name)
        if isinstance(row, TopTokens):
            assert isinstance(found, TopTokens)
            assert found.ids.dtype == torch.int32
            assert torch.equal(found.ids.long(), row.ids)
            assert torch.equal(found.log_probs, row.log_probs.to(stored))
        else:
            assert isinstance(found, Tensor) and torch.equal(found, row.to(stored))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_cached_teacher_gives_the_loss_of_the_teacher_at_hand(tmp_path: Path, direction: Direction) -> None:
    hidden, weight, teacher = make(10, 21)
    whole = logits_of(teacher).log_softmax(-1)
    kept = linear_top_tokens(teacher.hidden, teacher.weight, 8)
    write_teacher_cache(tmp_path / "top", [("a", kept)], vocabulary=21, dtype="float32")
    write_teacher_cache(tmp_path / "whole", [("a", whole)], vocabulary=21, dtype="float32")
    write_teacher_cache(tmp_path / "half", [("a", kept)], vocabulary=21, dtype="float16")
    for k in (3, 8):
        live = linear_top_k_kl(hidden, weight, teacher, direction, k=k)
        cached = linear_top_k_kl(hidden, weight, TeacherCache(tmp_path / "top").row("a"), direction, k=k)
        torch.testing.assert_close(cached.positions, live.positions, rtol=1e-5, atol=1e-6)
        half = linear_top_k_kl(hidden, weight, TeacherCache(tmp_path / "half").row("a"), direction, k=k)
        torch.testing.assert_close(half.positions, live.positions, rtol=0.02, atol=0.02)
    row = TeacherCache(tmp_path / "whole").row("a")
    assert isinstance(row, Tensor)
    live = linear_kl(hidden, weight, teacher, direction, temperature=1.5)
    cached = linear_kl(hidden, weight, row, direction, temperature=1.5)
    torch.testing.assert_close(cached.positions, live.positions, rtol=1e-5, atol=1e-6)


def test_a_cache_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    good = top_tokens(draw("logits", 4, 21), 3)
    write = {"vocabulary": 21}
    refusals: list[tuple[Any, str]] = [
        ([], "without a row"),
        ([("a", good), ("a", good)], "one name"),
        ([("a", good), ("b", top_tokens(draw("logits", 4, 21), 2))], "another shape"),
        ([("a", good), ("b", draw("logits", 4, 21))], "another shape"),
        ([("a", draw("logits", 4, 20))], "another shape"),
        ([("a", TopTokens(good.ids + 20, good.log_probs))], "not of the vocabulary"),
        ([("a", TopTokens(good.ids + 2**32, good.log_probs))], "not of the vocabulary"),
        ([("a", TopTokens(good.ids, good.log_probs - 1e6))], "not finite"),
    ]
    for rows, message in refusals:
        with pytest.raises(PunaError, match=message):
            write_teacher_cache(tmp_path / "refused", rows, **write)  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir()), "a refused cache leaves nothing"
    with pytest.raises(PunaError, match="bfloat16"):
        write_teacher_cache(tmp_path / "refused", [("a", good)], vocabulary=21, dtype="bfloat16")  # type: ignore[arg-type]
    folder = tmp_path / "cache"
    write_teacher_cache(folder, [("a", good), ("b", good)], vocabulary=21, shard_bytes=1)
    with pytest.raises(PunaError, match="no such row"):
        TeacherCache(folder).row("c")
    index = json.loads((folder / "teacher.json").read_text())
    for change in ({"format": 9}, {"rows": 3}, {"rows": {"a": [0, 0]}}):
        (folder / "teacher.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(PunaError, match="not a teacher's cache"):
            TeacherCache(folder)
    (folder / "teacher.json").write_text(json.dumps({**index, "rows": {"a": [0, 0, 5]}}))
    with pytest.raises(PunaError, match="another shape than its index says"):
        TeacherCache(folder)
    (folder / "teacher.json").write_text(json.dumps(index))
    shard = folder / "teacher-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(PunaError, match="not a readable shard"):
        TeacherCache(folder)
    shard.unlink()
    with pytest.raises(PunaError, match="not a readable shard"):
        TeacherCache(folder)
    with pytest.raises(PunaError, match="file not found"):
        TeacherCache(tmp_path / "nowhere")


def test_bad_settings_and_inputs_are_refused() -> None:
    hidden, weight, teacher = make(4, 10)
    logits = hidden @ weight.T
    kept = top_tokens(logits_of(teacher), 3)
    cases: list[tuple[Any, str]] = [
        (lambda: kl(logits, logits, "both"), "unknown direction 'both'"),  # type: ignore[arg-type]
        (lambda: kl(logits, logits, "forward", temperature=0.0), "temperature"),
        (lambda: kl(logits, logits[:, :9], "forward"), "the teacher's logits"),
        (lambda: top_k_kl(logits, logits, "forward"), "needs its k"),
        (lambda: top_k_kl(logits, logits, "forward", k=11), "1 to 10"),
        (lambda: top_k_kl(logits, kept, "forward", k=4), "the tokens the teacher kept"),
        (lambda: top_k_kl(logits[:3], kept, "forward"), "the teacher's tokens"),
        (lambda: top_tokens(logits, 0), "'k' of top_tokens"),
        (lambda: linear_top_k_kl(hidden, weight, teacher, "forward"), "needs its k"),
        (lambda: linear_top_k_kl(hidden, weight, teacher, "forward", k=11), "at most 10"),
        (lambda: linear_kl(hidden, weight, teacher, "forward", chunk=0), "chunk"),
        (lambda: linear_kl(hidden, weight[:9], teacher, "forward"), "share one vocabulary"),
        (lambda: linear_kl(hidden, weight, logits[:, :9], "forward"), "share one vocabulary"),
        (lambda: linear_top_k_kl(hidden, weight[:1], kept.first(1), "forward"), "share one vocabulary"),
        (lambda: top_k_kl(logits[:, :1], kept, "forward"), "share one vocabulary"),
        (lambda: linear_kl(hidden[:3], weight, teacher, "forward"), "the teacher's hidden states"),
        (lambda: linear_kl(hidden, weight, teacher, "forward", weights=torch.ones(3)), "weights"),
        (lambda: hidden_cosine(hidden, teacher.hidden), "the teacher's hidden states"),
        (lambda: hidden_cosine(hidden, hidden, torch.ones(3, dtype=torch.bool)), "mask"),
        (lambda: TopTokens(kept.ids.float(), kept.log_probs), "whole numbers"),
        (lambda: TopTokens(kept.ids[:2], kept.log_probs), "log_probs has another shape"),
    ]
    for call, message in cases:
        with pytest.raises(PunaError, match=message):
            call()
