"""Builders of vocabulary maps: how the rows of a new vocabulary are made from those of an old one.

A token that both vocabularies have (the same bytes, the same special token, or a special token in the
same role, a BOS for a BOS) takes the old row as it is. The baselines do so only if asked to, and
:func:`alignment` lets the words among them follow their meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from puna.core.errors import PunaError
from puna.text.aligner import Symmetrisation
from puna.text.tokenizer import Tokenizer
from puna.text.vocabulary.cooccurrence import Counts, count_aligned
from puna.text.vocabulary.operator import Distribution, Draw, Origin, VocabularyMap
from puna.text.vocabulary.spelling import Spelling

Row = tuple[Origin, dict[int, float]]
Weigh = Callable[[Sequence[bytes]], Sequence[float]]
Fallback = Literal["weighted_pieces", "mean_of_pieces", "unk"]


def by_bytes(pieces: Sequence[bytes]) -> Sequence[float]:
    """Weigh a piece by its length in bytes."""
    return [float(max(1, len(piece))) for piece in pieces]


def equally(pieces: Sequence[bytes]) -> Sequence[float]:
    """Weigh all pieces alike."""
    return [1.0] * len(pieces)


def identity(size: int) -> VocabularyMap:
    """Every one of ``size`` rows is the old row: nothing changes, to the bit."""
    rows: list[Row] = [("copied", {index: 1.0}) for index in range(size)]
    return VocabularyMap.from_rows(rows, old_size=size, about={"builder": "identity"})


def mean_of_pieces(old: Tokenizer, new: Tokenizer) -> VocabularyMap:
    """A new token's row is the mean of the rows of the old tokens that spell it."""
    return _from_pieces(old, new, equally, "mean_of_pieces")


def weighted_pieces(old: Tokenizer, new: Tokenizer, weigh: Weigh = by_bytes) -> VocabularyMap:
    """Like :func:`mean_of_pieces` with weights: ``weigh`` gets the bytes of the pieces of one token.

    The weights must not be negative and are normalised; by default a piece weighs its length in bytes.
    """
    return _from_pieces(old, new, weigh, "weighted_pieces")


def _from_pieces(old: Tokenizer, new: Tokenizer, weigh: Weigh, name: str) -> VocabularyMap:
    source = _Source(old, new)
    rows = [source.copied(index) or source.pieces(index, weigh) for index in range(new.vocab_size)]
    return VocabularyMap.from_rows(rows, old_size=old.vocab_size, about=_about(name, old, new))


def alignment(
    old: Tokenizer,
    new: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    *,
    fallback: Fallback = "weighted_pieces",
    evidence: float = 2.0,
    floor: float = 0.2,
    position: float = 0.5,
    symmetrisation: Symmetrisation = "intersection",
    iterations: int = 5,
) -> VocabularyMap:
    """Trans-tokenization (Remy et al., arXiv 2408.04303): weights counted in word-aligned sentence pairs.

    ``pairs`` are (text in a language the old vocabulary serves, the same in the new one's). Their
    words are aligned; each aligned occurrence of a new word spreads a mass of 1 for each of its new
    tokens over the old tokens of its partners, the share ``position`` by place in the word and the
    rest evenly (as the authors' program does, half and half). Row = counts, normalised.

    Tokens of both vocabularies are copied, but for those that begin a word (a space and letters)
    and were seen: "of" is English and Dutch, and means "or" in one of them. Their own old row is
    blended in as pieces are.

    Ours beside the paper, each off at its neutral value: old tokens with less than the share
    ``floor`` of a row are dropped as noise of the aligner (0 keeps all); a row counted n times is
    blended with the token's pieces as n to ``evidence`` (0 trusts one count wholly); only links that
    both directions of the aligner find are counted (``symmetrisation``). Tokens never seen take
    ``fallback``: their pieces, or "unk", the row of the old unknown token, as in ChocoLlama. A
    byte-level tokenizer often has no real unknown token (SmolLM2 names its end-of-text token), hence
    pieces by default.
    """
    _check_shares(fallback, evidence, floor, position)
    counts = count_aligned(
        old, new, pairs, position=position, symmetrisation=symmetrisation, iterations=iterations
    )
    source = _Source(old, new)
    weigh = equally if fallback == "mean_of_pieces" else by_bytes
    rows: list[Row] = []
    for index in range(new.vocab_size):
        seen = _without_noise(counts, index, floor)
        copied = source.copied(index)
        if copied is not None and not (seen and source.begins_word(index)):
            rows.append(copied)
        elif seen:
            spelled = source.pieces(index, weigh)[1] if evidence else {}
            rows.append(("aligned", _blend(seen, spelled, evidence)))
        else:
            rows.append(source.unknown() if fallback == "unk" else source.pieces(index, weigh))
    settings = {
        "fallback": fallback,
        "evidence": evidence,
        "floor": floor,
        "position": position,
        "symmetrisation": symmetrisation,
        "iterations": iterations,
        "pairs": len(pairs),
    }
    about = _about("alignment", old, new, **settings)
    return VocabularyMap.from_rows(rows, old_size=old.vocab_size, about=about)


def random(
    old: Tokenizer,
    new: Tokenizer,
    *,
    distribution: Distribution = "fixed",
    seed: int = 0,
    copy_shared: bool = False,
) -> VocabularyMap:
    """Baseline: drawn rows.

    ``fixed`` draws from N(0, 0.02), as a new model does; ``matched`` from N(mean, variance of each
    column of the old matrix), which makes larger logits and much worse first guesses.
    """
    about = _about("random", old, new, distribution=distribution, seed=seed, copy_shared=copy_shared)
    return _baseline(old, new, "random", copy_shared, Draw(distribution, seed), about)


def global_mean(old: Tokenizer, new: Tokenizer, *, copy_shared: bool = False) -> VocabularyMap:
    """Baseline: every row is the mean of all old rows."""
    return _baseline(
        old, new, "mean", copy_shared, None, _about("global_mean", old, new, copy_shared=copy_shared)
    )


def _baseline(
    old: Tokenizer,
    new: Tokenizer,
    origin: Origin,
    copy_shared: bool,
    draw: Draw | None,
    about: dict[str, Any],
) -> VocabularyMap:
    empty: Row = (origin, {})
    rows = [empty] * new.vocab_size
    if copy_shared:
        source = _Source(old, new)
        rows = [source.copied(index) or empty for index in range(new.vocab_size)]
    return VocabularyMap.from_rows(rows, old_size=old.vocab_size, draw=draw, about=about)


class _Source:
    """What rows a new token can take from the old vocabulary."""

    def __init__(self, old: Tokenizer, new: Tokenizer) -> None:
        self._old = Spelling(old)
        self._new = Spelling(new)
        self._special = {
            new.id_of(token): old.id_of(token) for token in new.special_tokens if token in old.special_tokens
        }
        for role, token in new.strings.items():  # a BOS spelt otherwise is still a BOS
            if role in old.strings:
                self._special.setdefault(new.id_of(token), old.id_of(old.strings[role]))

    def copied(self, index: int) -> Row | None:
        """The old row of the same token, if there is one."""
        data = self._new.bytes_of[index]
        same = self._special.get(index) if data is None else self._old.id_of.get(data)
        return None if same is None else ("copied", {same: 1.0})

    def begins_word(self, index: int) -> bool:
        """Whether the token is a space and letters: a word, or the beginning of one."""
        data = self._new.bytes_of[index] or b""
        return data[:1] == b" " and data[1:].decode(errors="replace").isalpha()

    def pieces(self, index: int, weigh: Weigh) -> Row:
        """The old tokens that spell the new one; an id that no old tokens spell becomes the mean."""
        data = self._new.bytes_of[index]
        if data is None:  # a special token that the old vocabulary lacks, or an id without a token
            data = (self._new.tokenizer.core.id_to_token(index) or "").encode()
        ids = self._old.pieces(data) if data else []
        if not ids:
            return "mean", {}
        weights = weigh([self._old.bytes_of[piece] or b"" for piece in ids])
        total = float(sum(weights))
        if len(weights) != len(ids) or min(weights) < 0 or total <= 0:
            raise PunaError(
                "pieces need one weight each, none negative and not all zero",
                where=f"token {self._new.tokenizer.core.id_to_token(index)!r}",
                found=list(weights),
            )
        row: dict[int, float] = {}
        for piece, weight in zip(ids, weights, strict=True):
            if weight:
                row[piece] = row.get(piece, 0.0) + weight / total
        return "pieces", row

    def unknown(self) -> Row:
        """The row of the old tokenizer's unknown token."""
        old = self._old.tokenizer
        if "unk_token" not in old.strings:
            raise PunaError(
                "the old tokenizer names no unknown token, so unseen tokens cannot take its row",
                where="fallback",
                found="unk",
                fix="use fallback weighted_pieces or mean_of_pieces",
            )
        return "unknown", {old.id_of(old.strings["unk_token"]): 1.0}


def _without_noise(counts: Counts, index: int, floor: float) -> dict[int, float]:
    """The counts of one new token without old tokens that have less than the share ``floor``."""
    seen = counts.get(index, {})
    least = floor * sum(seen.values())
    # Of a row so spread out that nothing reaches the floor, nothing is sure: the token counts as unseen.
    return {column: mass for column, mass in seen.items() if mass >= least}


def _blend(seen: Mapping[int, float], spelled: Mapping[int, float], evidence: float) -> dict[int, float]:
    """Counts and the token's pieces, which count ``evidence`` times, normalised."""
    kept = sum(seen.values())
    trust = kept / (kept + evidence) if spelled else 1.0
    row = {column: trust * mass / kept for column, mass in seen.items()}
    for column, share in spelled.items():
        row[column] = row.get(column, 0.0) + (1 - trust) * share
    return row


def _check_shares(fallback: str, evidence: float, floor: float, position: float) -> None:
    for name, share in (("floor", floor), ("position", position)):
        if not 0 <= share <= 1:
            raise PunaError("a share must be between 0 and 1", where=name, found=share)
    if evidence < 0:
        raise PunaError("evidence must not be negative", where="evidence", found=evidence)
    if fallback == "unk" and evidence > 0:
        raise PunaError(
            "with fallback unk no pieces are blended in",
            where="evidence",
            found=evidence,
            expected="0",
            fix="set evidence to 0, or use another fallback",
        )


def _about(builder: str, old: Tokenizer, new: Tokenizer, **settings: Any) -> dict[str, Any]:
    return {"builder": builder, **settings, "old": old.fingerprint, "new": new.fingerprint}
