"""Which tokenizer a merged model has, and which row of each model is a token's: said, never guessed.

Rows belong together by the spelling of their token, not by their number. A token that a model has not takes
the base's row there, or, where the base has not got it either, the mean of the rows of those that have: then
that model has no part in it. Rows beyond the vocabulary, which only pad, take the mean of the base's rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import tokenizers
import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.edit.merging.config import MergeConfig, ModelRef
from puna.model.weights import EMBEDDING, HEAD
from puna.text import pretrained
from puna.text.stored_weights import Parts, Weights, parts_of
from puna.text.tokenizer import Tokenizer

Indices = numpy.ndarray[Any, numpy.dtype[numpy.int64]]


@dataclass
class Vocabulary:
    """The merged model's tokenizer (None if no model has one), its rows, and where each model has them.

    ``rows`` is empty where every model has the same rows; else it holds for each model the row of every
    token of the merged model, or -1.
    """

    tokenizer: Tokenizer | None
    size: int
    rows: dict[ModelRef, Indices] = field(default_factory=dict)
    base: ModelRef | None = None
    models: Mapping[ModelRef, Weights] = field(default_factory=dict)

    def remaps(self, name: str) -> bool:
        """Whether rows of the tensor ``name`` are looked up by their token."""
        return bool(self.rows) and name in (EMBEDDING, HEAD)

    def view(self, name: str, model: ModelRef, weights: Weights) -> Parts:
        """The model's tensors, those with a row for each token in the merged model's order."""
        return _Remapped(self, model) if self.remaps(name) else weights


@dataclass
class _Remapped:
    """One model's embedding or head in the order of the merged vocabulary."""

    vocabulary: Vocabulary
    model: ModelRef

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        size = self.vocabulary.size
        ours = self.vocabulary.models[self.model].shapes
        return {name: (size, ours[name][1]) for name in (EMBEDDING, HEAD) if name in ours}

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Whole rows, as the parts of a tensor are."""
        width = self.shapes[name][1]
        first, last = start // width, stop // width
        found = torch.empty(last - first, width)
        mine = self.vocabulary.rows[self.model][first:last]
        self._copy(found, name, self.model, mine, numpy.flatnonzero(mine >= 0))
        missing = numpy.flatnonzero(mine < 0)
        if len(missing):
            self._fill(found, name, first, missing)
        return found.view(-1)

    def _fill(self, found: Tensor, name: str, first: int, missing: Indices) -> None:
        """Rows of tokens that this model has not: the base's, else the mean of the others'."""
        vocabulary = self.vocabulary
        assert vocabulary.base is not None  # set with the rows
        base = vocabulary.rows[vocabulary.base][first : first + len(found)]
        there = missing[base[missing] >= 0]
        self._copy(found, name, vocabulary.base, base, there)
        for place in missing[base[missing] < 0]:
            having = [
                (model, rows[first + place : first + place + 1])
                for model, rows in vocabulary.rows.items()
                if rows[first + place] >= 0
            ]
            row = torch.zeros(1, found.shape[1])
            for model, number in having:
                one = torch.empty(1, found.shape[1])
                self._copy(one, name, model, number, numpy.zeros(1, numpy.int64))
                row += one / len(having)
            found[place] = row[0] if having else self._mean_row(name)

    def _mean_row(self, name: str) -> Tensor:
        """The mean of the base's rows: a padded row's logit is then never the largest."""
        assert self.vocabulary.base is not None  # set with the rows
        base = self.vocabulary.models[self.vocabulary.base]
        rows, width = base.shapes[name]
        total = torch.zeros(width, dtype=torch.float64)
        for place in parts_of(base.shapes[name]):
            total += base.part(name, *place).view(-1, width).sum(0, dtype=torch.float64)
        return (total / rows).float()

    def _copy(self, found: Tensor, name: str, model: ModelRef, rows: Indices, places: Indices) -> None:
        """Copy a model's ``rows`` at ``places`` to the same places of ``found``, run by run."""
        weights, width = self.vocabulary.models[model], found.shape[1]
        if not len(places):
            return
        wanted = rows[places]
        cuts = numpy.flatnonzero((numpy.diff(wanted) != 1) | (numpy.diff(places) != 1)) + 1
        for run in numpy.split(numpy.arange(len(places)), cuts):
            begin, row, count = int(places[run[0]]), int(wanted[run[0]]), len(run)
            part = weights.part(name, row * width, (row + count) * width)
            found[begin : begin + count] = part.view(count, width)


def settle_vocabulary(config: MergeConfig, models: Mapping[ModelRef, Weights], first: ModelRef) -> Vocabulary:
    """Decide on the merged model's tokenizer as ``tokenizer_source`` says.

    Without it all models must have the same tokens under the same ids. Spare rows of an embedding may differ.
    """
    found = {model: _tokenizer_of(weights) for model, weights in models.items()}
    known = {model: tokenizer for model, tokenizer in found.items() if tokenizer is not None}
    source = config.tokenizer_source
    lead = found[first] or next(iter(known.values()), None)
    vocabularies = [tokenizer.vocabulary() for tokenizer in known.values()]
    alike = all(vocabulary == vocabularies[0] for vocabulary in vocabularies)
    if not alike and source is None:
        raise PunaError(
            "the models' tokenizers differ",
            where=config.where,
            found=", ".join(f"{model}: {len(t.vocabulary()):,} tokens" for model, t in known.items()),
            expected="the same tokens under the same ids",
            fix="say which the merged model has: tokenizer_source: base, union, or one of the models",
        )
    if source == "union":
        lead = _union(lead, list(known.values()), config.where)
    elif source not in (None, "base"):
        lead = _named(str(source), found, config.where)
    tokenizer = _with_template(lead, config, list(known.values()))
    rows = {model: weights.spec.vocab_size for model, weights in models.items()}
    size = rows[first]
    if tokenizer is not None and (source not in (None, "base") or config.pad_to_multiple_of):
        multiple = config.pad_to_multiple_of or 1
        size = -(-tokenizer.vocab_size // multiple) * multiple
    if alike and len({*rows.values(), size}) == 1:
        return Vocabulary(tokenizer, size)
    if tokenizer is None or len(known) < len(models):
        raise PunaError(
            "embeddings differ in rows and a model has no tokenizer to tell them apart by",
            where=config.where,
            found=", ".join(f"{model}: {count:,} rows" for model, count in rows.items()),
            fix="put the tokenizers beside the models",
        )
    indices = {model: _rows_of(tokenizer, known[model], size, rows[model]) for model in models}
    return Vocabulary(tokenizer, size, indices, first, models)


def _tokenizer_of(weights: Weights) -> Tokenizer | None:
    beside = pretrained.read_tokenizer(weights.adapter.where) if weights.adapter else None
    return beside or pretrained.read_tokenizer(weights.where)


def _named(source: str, found: Mapping[ModelRef, Tokenizer | None], where: str) -> Tokenizer:
    by_name = {str(model): tokenizer for model, tokenizer in found.items()}
    tokenizer = by_name.get(source) or pretrained.read_tokenizer(pretrained.locate(source))
    if tokenizer is None:
        raise PunaError("there is no tokenizer", where=f"{where}: tokenizer_source", found=source)
    return tokenizer


def _union(lead: Tokenizer | None, others: Sequence[Tokenizer], where: str) -> Tokenizer | None:
    """The first tokenizer with the others' added tokens; those that split words otherwise have no union."""
    if lead is None:
        return None
    present = lead.vocabulary()
    extra: dict[str, tokenizers.AddedToken] = {}
    for other in others:
        added = {token.content: token for token in other.core.get_added_tokens_decoder().values()}
        ids = other.vocabulary()  # in no order
        missing = sorted((token for token in ids if token not in present), key=ids.__getitem__)
        plain = [token for token in missing if token not in added]
        if plain:
            raise PunaError(
                "these tokenizers split text in different ways, so that no union of them is a tokenizer",
                where=f"{where}: tokenizer_source",
                found=f"{len(plain):,} tokens, such as {plain[0]!r}, that one has and the base has not",
                expected="tokenizers that differ in added tokens alone",
                fix="take base, or one of the models",
            )
        extra |= {token: added[token] for token in missing}
    merged = _copy_of(lead, lead.chat_template)
    merged.core.add_tokens([token for token in extra.values() if not token.special])
    merged.core.add_special_tokens([token for token in extra.values() if token.special])
    return merged


def _copy_of(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    config = {
        **tokenizer.strings,
        **tokenizer.settings,
        "chat_template": template,
        "add_bos_token": tokenizer.adds_bos,
    }
    core = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    return Tokenizer(core, config, tokenizer.stop_tokens)


def _with_template(
    lead: Tokenizer | None, config: MergeConfig, every: Sequence[Tokenizer]
) -> Tokenizer | None:
    """The tokenizer with the chat template that the config asks for."""
    wanted = config.chat_template
    if lead is None or wanted is None:
        return lead
    if wanted == "auto":
        sources = [tokenizer.chat_template for tokenizer in every if tokenizer.chat_template]
        wanted = max(dict.fromkeys(sources), key=sources.count, default=None)
    elif "{" not in wanted:
        raise PunaError(
            "not a chat template",
            where=f"{config.where}: chat_template",
            found=wanted,
            expected="auto, the template that most of the models have, or a template in Jinja",
        )
    return _copy_of(lead, wanted)


def _rows_of(merged: Tokenizer, own: Tokenizer, size: int, rows: int) -> Indices:
    """The row in ``own`` of each row of the merged vocabulary, -1 where there is none."""
    found = numpy.full(size, -1, numpy.int64)
    theirs = own.vocabulary()
    for token, place in merged.vocabulary().items():
        row = theirs.get(token, -1)
        if row < rows:
            found[place] = row
    return found
