"""Instruction residuals: what instruction tuning changed of a base, put on a later base (system S40).

Of one family (arXiv:2410.10739): a base, its instruct sibling, and the base after more pre-training. The
residual is instruct - base over all tensors, and the new instruct model is ``continued + scale * residual``;
nothing is trained. A tied head is one tensor and counted once. Tensors are read part by part in float32.

What has to be right for the sum to mean anything is checked: names and shapes, tying, rope (that of base
and instruct must be one; the new model has the continued base's), the same tokens under the same ids, and
that the continued base comes from the base at all: the cosine of their matrices, near 1 for a model that was
trained on and near 0 for a stranger of the same shape. Tokenizer, chat template and stop tokens are the
instruct model's.

Simplified: a vocabulary that instruction tuning extended is refused; extend the base's first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.files import folder_aside
from puna.edit.merging.delta import DeltaSet, added
from puna.model.hf import write_configs
from puna.model.llama import Llama
from puna.model.probe import difference, probe
from puna.model.spec import LlamaSpec
from puna.model.tensor_writer import TensorWriter
from puna.model.weights import set_parameter
from puna.text import pretrained
from puna.text.stored_weights import Weights, parts_of
from puna.text.template import find_template
from puna.text.tokenizer import Tokenizer


@dataclass
class _Products:
    """Inner products of base, residual and update (continued - base), over some tensors."""

    base: float = 0.0
    residual: float = 0.0
    update: float = 0.0
    base_continued: float = 0.0
    continued: float = 0.0
    residual_update: float = 0.0

    def add(self, base: Tensor, residual: Tensor, continued: Tensor) -> None:
        one, other, last = base.double(), residual.double(), continued.double()
        moved = last - one
        self.base += float(one @ one)
        self.residual += float(other @ other)
        self.update += float(moved @ moved)
        self.base_continued += float(one @ last)
        self.continued += float(last @ last)
        self.residual_update += float(other @ moved)


def _cosine(product: float, one: float, other: float) -> float:
    """The cosine of two vectors by their products; 0 where one of them is zero."""
    return product / math.sqrt(one * other) if one and other else 0.0


@dataclass
class Residual:
    """The residual of ``instruct`` over ``base``, to be put on ``continued``; :meth:`open` checks them."""

    base: Weights
    instruct: Weights
    continued: Weights
    delta: DeltaSet
    spec: LlamaSpec
    tokenizer: Tokenizer | None

    @classmethod
    def open(cls, base: str | Path, instruct: str | Path, continued: str | Path) -> Residual:
        """Open three models; what does not belong together by shape, rope, tying or tokens is refused."""
        ours, tuned, trained = (Weights.open(source) for source in (base, instruct, continued))
        for other in (tuned, trained):
            _check_spec(ours, other)
        if [block.rope for block in tuned.spec.blocks] != [block.rope for block in ours.spec.blocks]:
            raise PunaError(
                "base and instruct model turn positions in different ways: their difference is no residual",
                where=tuned.label,
                found=tuned.spec.blocks[0].rope,
                expected=f"{ours.spec.blocks[0].rope} as in {ours.label}",
                fix="take the base that the instruct model was trained from",
            )
        tokenizers = {weights.label: pretrained.read_tokenizer(weights.where) for weights in (ours, trained)}
        tokenizer = pretrained.read_tokenizer(tuned.where)
        for label, other_tokenizer in tokenizers.items():
            if tokenizer and other_tokenizer and other_tokenizer.vocabulary() != tokenizer.vocabulary():
                raise PunaError(
                    "the models' tokenizers differ",
                    where=label,
                    found=f"{len(other_tokenizer.vocabulary()):,} tokens",
                    expected=f"the {len(tokenizer.vocabulary()):,} of {tuned.label}, under the same ids",
                    fix="a residual belongs to rows: give all three one vocabulary first",
                )
        return cls(ours, tuned, trained, DeltaSet.between(ours, tuned), trained.spec, tokenizer)

    def write(
        self, folder: str | Path, *, scale: float, dtype: torch.dtype, least_likeness: float
    ) -> dict[str, float]:
        """Write ``continued + scale * residual`` as a folder that transformers opens; returns what was seen.

        ``likeness`` and ``residual_likeness``: cosines of the matrices of base and continued base, and of
        residual and update; ``residual`` and ``update``: norms over the base's. A likeness below
        ``least_likeness`` is an error, and nothing is written.
        """
        whole, matrices = _Products(), _Products()
        shell = self.shell()
        with folder_aside(Path(folder)) as aside:
            write_configs(shell.spec, dtype, aside)
            with TensorWriter(aside, self.base.shapes, dtype) as writer:
                for name, shape in self.base.shapes.items():
                    for start, stop in parts_of(shape):
                        part = self.continued.part(name, start, stop)
                        residual = self.delta.part(name, start, stop)
                        for products in (whole, matrices) if len(shape) > 1 else (whole,):
                            products.add(self.base.seen_part(name, start, stop), residual, part)
                        writer.add(name, added(part, residual.mul_(scale)))
            likeness = _cosine(matrices.base_continued, matrices.base, matrices.continued)
            if likeness < least_likeness:
                raise PunaError(
                    "the continued model does not come from this base: the residual means nothing there",
                    where=self.continued.label,
                    found=f"a cosine of {likeness:.4f} between its matrices and those of {self.base.label}",
                    expected=f"at least {least_likeness}",
                    fix="give a model that was trained on from this base",
                )
            if shell.tokenizer is not None:
                source = shell.template.source if shell.template is not None else None
                shell.tokenizer.save(aside, template=source)
        return {
            "scale": scale,
            "likeness": likeness,
            "residual": math.sqrt(whole.residual / whole.base),
            "update": math.sqrt(whole.update / whole.base),
            "residual_likeness": _cosine(whole.residual_update, whole.residual, whole.update),
        }

    def shell(self) -> Llama:
        """A decoder of the continued base's spec, with the instruct model's words and without storage."""
        shell = Llama(self.spec, device="meta")
        shell.tokenizer = self.tokenizer
        shell.template = find_template(self.tokenizer) if self.tokenizer is not None else None
        pretrained.settle_tokens(shell)
        return shell

    def checks(self) -> dict[str, float]:
        """What the sum owes where nothing was learnt in between: base + residual against the instruct model.

        Largest differences of logits of fixed tokens: all in ``float32``, with the residual rounded to
        bfloat16 (``bfloat16_residual``) and with the sum rounded to it (``bfloat16``); ``largest`` is the
        largest logit.
        ``self_residual``: the largest weight of the instruct model's residual over itself.
        """
        self_delta = DeltaSet.between(self.instruct, self.instruct)
        largest = max(float(self_delta.tensor(name).abs().max()) for name in self_delta.shapes)
        wanted = probe(self._filled(lambda name: _whole(self.instruct, name)))

        def away(rounded_residual: bool, rounded_sum: bool) -> float:
            def tensor(name: str) -> Tensor:
                delta = self.delta.tensor(name)
                delta = delta.bfloat16().float() if rounded_residual else delta
                total = added(_whole(self.base, name), delta)
                return total.bfloat16().float() if rounded_sum else total

            return difference(wanted, probe(self._filled(tensor)))

        return {
            "float32": away(False, False),
            "bfloat16_residual": away(True, False),
            "bfloat16": away(False, True),
            "largest": float(wanted.abs().max()),
            "self_residual": largest,
        }

    def _filled(self, tensor: Callable[[str], Tensor]) -> Llama:
        """A decoder of the instruct model's spec with the weights that ``tensor`` gives by name."""
        model = Llama(self.instruct.spec, device="meta")
        for name in self.instruct.shapes:
            set_parameter(model, name, tensor(name))
        return model.eval()


def _whole(weights: Weights, name: str) -> Tensor:
    shape = weights.shapes[name]
    return torch.cat([weights.part(name, *place) for place in parts_of(shape)]).view(shape)


def _check_spec(base: Weights, other: Weights) -> None:
    """Refuse a model that is not of the base's rows, tying and shapes."""
    ours, theirs = base.spec, other.spec
    if theirs.vocab_size != ours.vocab_size:
        raise PunaError(
            "the vocabularies differ in size",
            where=other.label,
            found=f"{theirs.vocab_size:,} rows",
            expected=f"{ours.vocab_size:,} as in {base.label}",
            fix="give base and continued base the tokens that the chat added, before they are trained on",
        )
    if theirs.tied != ours.tied:
        raise PunaError(
            "one model ties its head to the embedding and the other does not",
            where=other.label,
            found="tied" if theirs.tied else "a head of its own",
            expected=f"as in {base.label}",
            fix="the residual of a head would be counted twice, or not at all: take models of one family",
        )
    DeltaSet.between(base, other)  # names and shapes
