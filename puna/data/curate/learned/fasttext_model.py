"""S33, S52: fastText's supervised models, scored a batch at a time, arXiv:2406.11794, arXiv:1607.01759.

fastText averages the vectors of a line's words and n-grams of words, multiplies with a matrix, and takes the
softmax. All of it is linear before the softmax, so each word and each bucket of n-grams needs only its
product with the matrix: one number per label in place of a vector of 100. That makes two labels and two
million buckets 16 MB, and documents are scored by looking up and adding numbers over arrays. The
probabilities are the library's, to rounding. The library itself trains.

Models with subwords (maxn > 0), pruned, quantised, or with another loss than the softmax are refused.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from puna.core.errors import PunaError
from puna.data.curate import boundaries  # noqa: F401  (registers fastText's words)
from puna.data.curate.learned.files import load_model, save_model
from puna.data.curate.learned.lookup import HashTable
from puna.data.curate.segments import Segments, by_document
from puna.data.curate.texts import Texts, hashes_of

KIND = "fasttext"
FIX = "train one: puna stage quality_classifier"
_END = "</s>"
_OFFSET, _PRIME = numpy.uint32(2166136261), numpy.uint32(16777619)
_NGRAM_FACTOR = numpy.uint64(116049371)
_LONG = 256  # characters; longer words are hashed one by one


class FastTextModel:
    """``words`` [n] and their ``values`` [n, labels]; ``buckets`` [buckets, labels] of n-grams of words."""

    def __init__(
        self,
        labels: list[str],
        hashes: NDArray[numpy.uint64],
        values: NDArray[numpy.float32],
        buckets: NDArray[numpy.float32],
        ngrams: int,
    ) -> None:
        self.labels = labels
        self.hashes = hashes
        self.values = values
        self.buckets = buckets
        self.ngrams = ngrams

    @classmethod
    def of_library(cls, model: Any, *, where: object) -> FastTextModel:
        """The same model as one of the library's."""
        args = model.f.getArgs()
        if model.is_quantized() or args.maxn > 0 or args.loss.name != "softmax":
            raise PunaError(
                "not a model of whole words with a softmax",
                where=where,
                found=f"quantized: {model.is_quantized()}, maxn: {args.maxn}, loss: {args.loss.name}",
            )
        words = model.get_words()
        rows = model.get_input_matrix()  # [words + buckets, dimensions]
        products = rows @ model.get_output_matrix().T  # [words + buckets, labels]
        labels = [label.removeprefix("__label__") for label in model.get_labels()]
        return cls(labels, hashes_of(words), products[: len(words)], products[len(words) :], args.wordNgrams)

    @classmethod
    def load(cls, path: Path | str) -> FastTextModel:
        """A model that was saved here (.safetensors) or one of the library's (.bin)."""
        file = Path(path)
        if file.suffix == ".bin":
            return cls.of_library(_library_model(file), where=file)
        arrays, about = load_model(file, KIND, FIX)
        return cls(about["labels"], arrays["hashes"], arrays["values"], arrays["buckets"], about["ngrams"])

    def save(self, path: Path) -> None:
        """Write it as safetensors."""
        arrays: dict[str, NDArray[Any]] = {
            "hashes": self.hashes,
            "values": self.values,
            "buckets": self.buckets,
        }
        save_model(path, KIND, arrays, {"labels": self.labels, "ngrams": self.ngrams})

    @cached_property
    def _table(self) -> HashTable:
        return HashTable(self.hashes)

    def probabilities(self, texts: Texts) -> NDArray[numpy.float64]:
        """[documents, labels] the probability of each label; nan where no word is known."""
        words = texts.words("fasttext")
        place = self._table.places(words.hashes)
        known = place >= 0
        counts = words.total(known).astype(numpy.float64)
        sums = _sums(self.values[place] * known[:, None], words.bounds)
        end = self._table.places(hashes_of([_END]))[0]
        if end >= 0:
            sums += self.values[end]
            counts += 1
        if self.ngrams > 1 and len(self.buckets):
            bucket, bounds = self._ngrams(words)
            sums += _sums(self.buckets[bucket], bounds)
            counts += numpy.diff(bounds)
        with numpy.errstate(invalid="ignore", divide="ignore"):
            logits = sums / counts[:, None]
        logits -= logits.max(axis=1, keepdims=True)
        odds = numpy.exp(logits)
        return numpy.asarray(odds / odds.sum(axis=1, keepdims=True))

    def _ngrams(self, words: Segments) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64]]:
        """The buckets of all n-grams of two words and more, document by document, and their bounds.

        The mark of a line's end is the last word of every document.
        """
        document = numpy.arange(len(words.counts))
        hashes = numpy.insert(word_hashes(words), words.bounds[1:], _hash_of(_END))
        bounds = words.bounds + numpy.arange(len(words.bounds))
        ends = numpy.repeat(bounds[1:], numpy.diff(bounds))
        signed = hashes.view(numpy.int32).astype(numpy.int64).view(numpy.uint64)
        running = signed
        found: list[NDArray[numpy.int64]] = []
        owners: list[NDArray[numpy.int64]] = []
        owner = numpy.repeat(document, numpy.diff(bounds))
        for step in range(1, self.ngrams):
            running = running[:-1] * _NGRAM_FACTOR + signed[step:]
            inside = numpy.arange(len(running)) + step < ends[: len(running)]
            found.append((running[inside] % numpy.uint64(len(self.buckets))).astype(numpy.int64))
            owners.append(owner[: len(running)][inside])
        every, of = numpy.concatenate(found), numpy.concatenate(owners)
        if len(found) > 1:
            order = numpy.argsort(of, kind="stable")
            every, of = every[order], of[order]
        return every, numpy.searchsorted(of, numpy.arange(len(document) + 1))


def _sums(values: NDArray[numpy.float32], bounds: NDArray[numpy.int64]) -> NDArray[numpy.float64]:
    """[documents, labels] sums of ``values`` [n, labels]."""
    columns = [by_document(column.astype(numpy.float64), bounds) for column in values.T]
    return numpy.stack(columns, axis=1)


def _library_model(file: Path) -> Any:
    import_library()
    import fasttext

    if not file.is_file():
        raise PunaError("file not found", where=file, fix=FIX)
    try:
        return fasttext.load_model(str(file))
    except ValueError as error:
        raise PunaError("not a model of fastText", where=file, found=error) from None


def import_library() -> None:
    """Raise a :class:`PunaError` if the library is not installed, or only its half that cannot train."""
    try:
        import fasttext
    except ImportError:
        found = "it is not installed"
    else:
        if hasattr(fasttext, "train_supervised"):
            return
        found = "a package that only predicts"
    raise PunaError(
        "fastText is needed here", where="package fasttext", found=found, fix="pip install 'puna[curate]'"
    )


def word_hashes(words: Segments) -> NDArray[numpy.uint32]:
    """[n] fastText's 32-bit hash of each word: FNV-1a over the bytes of UTF-8, taken as signed.

    Words are hashed together, character by character, from the longest to the shortest.
    """
    codes = words.texts.codes
    lengths = numpy.minimum(words.lengths, _LONG + 1).astype(numpy.uint16)
    order = numpy.argsort(lengths, kind="stable")[::-1]
    ordered = lengths[order]
    starts = words.starts[order]
    hashes = numpy.full(words.count, _OFFSET, dtype=numpy.uint32)
    remaining = words.count - numpy.searchsorted(ordered[::-1], numpy.arange(_LONG), side="right")
    for place in range(_LONG):
        count = remaining[place]
        if not count:
            break
        character = codes[starts[:count] + place]
        wide = numpy.flatnonzero(character >= 0x80)
        before = hashes[wide]
        hashes[:count] = (hashes[:count] ^ character) * _PRIME
        if len(wide):
            hashes[wide] = _wide(before, character[wide])
    result = numpy.empty_like(hashes)
    result[order] = hashes
    for place in numpy.flatnonzero(words.lengths > _LONG).tolist():
        word = words.texts.joined[words.starts[place] : words.ends[place]]
        result[place] = _hash_of(word)
    return result


def _wide(hashes: NDArray[numpy.uint32], codes: NDArray[numpy.uint32]) -> NDArray[numpy.uint32]:
    """The hashes after one character each of two, three or four bytes."""
    lead: NDArray[Any] | int
    for shift in (18, 12, 6, 0):
        if shift == 18:
            takes, lead = codes >= 0x10000, 0xF0
        elif shift == 12:
            takes, lead = codes >= 0x800, numpy.where(codes < 0x10000, 0xE0, 0x80)
        elif shift == 6:
            takes, lead = codes >= 0x80, numpy.where(codes < 0x800, 0xC0, 0x80)
        else:
            takes, lead = codes >= 0x80, 0x80
        part = (codes >> numpy.uint32(shift)) & numpy.uint32(0x3F)
        byte = numpy.asarray(part | numpy.uint32(0xFFFFFF00) | lead, dtype=numpy.uint32)
        hashes = numpy.where(takes, (hashes ^ byte) * _PRIME, hashes)
    return hashes


def _hash_of(word: str) -> numpy.uint32:
    value = int(_OFFSET)
    for byte in word.encode("utf-8", "surrogatepass"):
        signed = byte | 0xFFFFFF00 if byte & 0x80 else byte
        value = ((value ^ signed) * int(_PRIME)) & 0xFFFFFFFF
    return numpy.uint32(value)
