from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from text_samples import CONFIG, train_core

from puna.core.errors import PunaError
from puna.text.encode import Encoded, encode_document
from puna.text.packing import IGNORED, MODES, NO_TARGET, TARGETS_CUT, Batch, Packed, Row, collate, pack
from puna.text.tokenizer import Tokenizer

modes = pytest.mark.parametrize("mode", MODES)


def document(ids: list[int], trained: list[bool] | None = None, source: str = "") -> Encoded:
    return Encoded(ids, trained or [False] + [True] * (len(ids) - 1), source)


@st.composite
def documents(draw: st.DrawFn) -> list[Encoded]:
    """Documents of 1 to 30 tokens, some partly learnt, some not at all; at least one learnt throughout."""
    rows = [document([5, 6, 7], source="first")]
    for number in range(draw(st.integers(0, 12))):
        ids = draw(st.lists(st.integers(3, 300), min_size=1, max_size=30))
        trained = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        rows.append(document(ids, [False, *trained[1:]], source=f"d{number}"))
    return rows


def adds_up(packed: Packed) -> None:
    report = packed.report
    assert report.rows_in == report.used + sum(report.dropped.values())
    assert report.tokens_in == report.tokens + report.truncated + sum(report.dropped_tokens.values())
    assert report.rows == len(packed)
    assert report.tokens == sum(row.tokens for row in packed)
    assert report.targets == sum(row.targets for row in packed)
    assert set(report.dropped) == set(report.dropped_tokens) <= {NO_TARGET, TARGETS_CUT}


@modes
@given(rows=documents(), length=st.integers(4, 40))
def test_counts_add_up_and_rows_fit(mode: Any, rows: list[Encoded], length: int) -> None:
    packed = pack(rows, length, mode=mode)
    adds_up(packed)
    assert all(0 < row.tokens <= length for row in packed)
    batch = collate(list(packed), length=length)
    assert batch.targets == packed.report.targets
    assert batch.tokens == packed.report.tokens
    assert batch.input_ids.shape == (len(packed), length)


@modes
@given(rows=documents(), length=st.integers(4, 40))
def test_every_kept_token_is_packed_once_and_in_its_document(
    mode: Any, rows: list[Encoded], length: int
) -> None:
    packed = pack(rows, length, mode=mode)
    places: dict[int, list[tuple[int, int]]] = {}
    for row in packed:
        for piece in row.slices:
            places.setdefault(id(piece.document), []).append((piece.start, piece.stop))
    for row in rows:
        stops = 0
        for start, stop in sorted(places.get(id(row), [])):
            assert start == stops
            stops = stop
        if id(row) in places:
            assert stops == (len(row) if mode == "wrap" else min(len(row), length))


@given(rows=documents(), length=st.integers(4, 40))
def test_wrap_leaves_room_in_the_last_row_only(rows: list[Encoded], length: int) -> None:
    packed = pack(rows, length, mode="wrap")
    assert all(row.tokens == length for row in packed[:-1])
    assert packed.report.truncated == 0


@given(rows=documents(), length=st.integers(4, 40))
def test_fit_keeps_documents_whole_and_needs_no_more_rows_than_off(rows: list[Encoded], length: int) -> None:
    fit, off = pack(rows, length, mode="fit"), pack(rows, length, mode="off")
    assert fit.report.cuts == off.report.cuts == 0
    assert len(fit) <= len(off)
    assert fit.report.targets == off.report.targets
    # Two rows that are at most half full would have been one.
    assert sum(row.tokens * 2 <= length for row in fit) <= 1
    first = [rows.index(row.slices[0].document) for row in fit]
    assert all(len(row.slices) == 1 for row in off)
    assert first == sorted(first)


def test_fit_chooses_the_fullest_row_that_has_room() -> None:
    rows = [document(list(range(3, 3 + size)), source=str(size)) for size in (4, 6, 7, 3, 2)]
    packed = pack(rows, 10, mode="fit")
    assert [[len(piece) for piece in row.slices] for row in packed] == [[4, 6], [7, 3], [2]]


def test_labels_are_shifted_inside_each_document() -> None:
    rows = [document([11, 12, 13], [False, False, True]), document([21, 22, 23])]
    batch = collate(list(pack(rows, 8, mode="wrap")), length=8, pad_id=2)
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, 23, 2, 2]]
    no = IGNORED
    assert batch.labels.tolist() == [[no, 13, no, 22, 23, no, no, no]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 0, 0]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 1, -1, -1]]
    assert (batch.targets, batch.tokens) == (3, 6)


def test_a_document_continued_in_the_next_row_starts_a_segment_there() -> None:
    packed = pack([document([11, 12, 13, 14, 15])], 3, mode="wrap")
    batch = collate(list(packed), length=3)
    assert batch.positions.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert batch.labels.tolist() == [[12, 13, IGNORED], [15, IGNORED, IGNORED]]
    assert (packed.report.cuts, packed.report.targets) == (1, 3)  # of the four targets, 14 begins a row


def test_padding_with_the_eos_leaves_the_learnt_eos_alone() -> None:
    tokenizer = Tokenizer(train_core(), {"eos_token": CONFIG["eos_token"]})
    assert tokenizer.pad_id == tokenizer.eos_id
    packed = pack([encode_document(tokenizer, "De kat")], 32, mode="off")
    batch = collate(list(packed), length=32, pad_id=tokenizer.pad_id)
    learnt = batch.labels[batch.labels != IGNORED].tolist()
    assert learnt == [*tokenizer.encode("De kat")[1:], tokenizer.eos_id]


def test_truncation_is_counted_and_can_take_all_targets() -> None:
    late = document(list(range(3, 13)), [False] * 8 + [True] * 2, source="late")
    early = document(list(range(3, 13)), source="early")
    report = pack([late, early], 6, mode="off").report
    assert (report.truncated, report.truncated_rows) == (4, 1)
    assert report.dropped == {TARGETS_CUT: 1}
    assert report.dropped_tokens == {TARGETS_CUT: 10}
    assert pack([late, early], 6, mode="wrap").report.dropped == {}


def test_rows_name_their_documents() -> None:
    rows = [document([3, 4], source="a"), document([5, 6], source="b"), document([7, 8], source="c")]
    packed = pack(rows, 6, mode="wrap")
    assert packed[0].source == "a to c"
    assert pack(rows, 2, mode="off")[1].source == "b"


def test_batches_move_and_cannot_be_changed() -> None:
    batch = collate(list(pack([document([3, 4])], 2, mode="off")))
    assert torch.equal(batch.to("cpu").labels, batch.labels)
    with pytest.raises(AttributeError):
        batch.labels = batch.input_ids  # type: ignore[misc]


class TestIsolation:
    """Packed or alone, a document gives the same logits, loss and gradient."""

    rows = [  # noqa: RUF012
        document([7, 9, 30, 31, 200, 2]),
        document([8, 8, 8, 100, 101], [False, False, True, True, True]),
        document(list(range(40, 53))),
        document([5, 6]),
    ]

    @pytest.fixture
    def model(self, tiny_llama: Callable[..., Any]) -> Any:
        return tiny_llama(seed=3)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        logits = model(batch.input_ids, positions=batch.positions, segments=batch.segments)
        flat = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return flat / batch.targets

    @modes
    def test_logits_are_those_of_the_document_alone(self, model: Any, mode: Any) -> None:
        packed = pack(self.rows, 16, mode=mode)
        batch = collate(list(packed), length=16, pad_id=2)
        with torch.no_grad():
            logits = model(batch.input_ids, positions=batch.positions, segments=batch.segments)
            assert torch.isfinite(logits).all()
            for number, row in enumerate(packed):
                start = 0
                for piece in row.slices:
                    alone = model(torch.tensor([piece.document.ids[piece.start : piece.stop]]))[0]
                    torch.testing.assert_close(
                        logits[number, start : start + len(piece)], alone, atol=1e-5, rtol=0
                    )
                    start += len(piece)

    def test_losses_and_gradients_are_those_of_separate_rows(self, model: Any) -> None:
        results = []
        for mode in ("fit", "off"):
            packed = pack(self.rows, 16, mode=mode)  # type: ignore[arg-type]
            model.zero_grad()
            loss = self.loss(model, collate(list(packed), length=16, pad_id=2))
            loss.backward()
            results.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
        (one, gradients), (other, others) = results
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        for mine, theirs in zip(gradients, others, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)

    def test_no_gradient_crosses_documents_or_reaches_padding(self, model: Any) -> None:
        batch = collate(list(pack(self.rows, 30, mode="wrap")), length=30, pad_id=2)
        embedded = model.model.embed_tokens.weight.detach()[batch.input_ids].requires_grad_()
        handle = model.model.embed_tokens.register_forward_hook(lambda *_: embedded)
        logits = model(batch.input_ids, positions=batch.positions, segments=batch.segments)
        handle.remove()
        for segment in range(len(self.rows)):
            inside = batch.segments[0] == segment
            (gradient,) = torch.autograd.grad(logits[0][inside].pow(2).sum(), embedded, retain_graph=True)
            touched = gradient[0].abs().sum(-1)
            assert touched[~inside].max() == 0
            assert touched[inside].min() > 0


class TestRefusals:
    def test_nothing_to_learn(self) -> None:
        rows = [document([3, 4], [False, False]), document([3, 4, 5], [False, False, True])]
        with pytest.raises(PunaError, match=r"1 rows: nothing to learn in it, 1 rows: .*beyond the length"):
            pack(rows, 2, mode="fit")
        with pytest.raises(PunaError, match="no rows at all"):
            pack([], 8, mode="fit")

    def test_an_unknown_mode(self) -> None:
        with pytest.raises(PunaError, match="did you mean 'wrap'"):
            pack([document([3, 4])], 8, mode="warp")  # type: ignore[arg-type]

    def test_a_length_without_room_for_a_target(self) -> None:
        with pytest.raises(PunaError, match="two tokens"):
            pack([document([3, 4])], 1, mode="wrap")

    def test_rows_longer_than_the_batch(self) -> None:
        rows: list[Row] = list(pack([document([3, 4, 5])], 8, mode="off"))
        with pytest.raises(PunaError, match="do not fit"):
            collate(rows, length=2)
        with pytest.raises(PunaError, match="do not fit"):
            collate([])


def test_a_hundred_thousand_short_documents_are_packed() -> None:
    report = pack([document([3, 4, 5, 6, 7])] * 100_000, 1024, mode="fit").report
    assert report.rows == -(-100_000 // 204)
