"""A new decoder out of nothing but a tokenizer and sizes: what pretraining starts from.

Matrices are drawn from N(0, 0.02), norms are 1, as a Llama of transformers begins
(``initializer_range``). The draw depends on the generator alone, so that two models of one seed and shape
are equal to the bit, whatever they learn afterwards.
"""

from __future__ import annotations

import torch

from puna.core.errors import PunaError
from puna.model.llama import Llama
from puna.model.spec import LlamaSpec
from puna.text.template import find_template
from puna.text.tokenizer import Tokenizer


def initialise(spec: LlamaSpec, tokenizer: Tokenizer, generator: torch.Generator) -> Llama:
    """A decoder of ``spec`` in float32 that speaks ``tokenizer``; its embedding has a row for each token."""
    if spec.vocab_size < tokenizer.vocab_size:
        raise PunaError(
            "the embedding has fewer rows than the tokenizer has tokens",
            where="vocab_size",
            found=spec.vocab_size,
            expected=f"at least {tokenizer.vocab_size}",
        )
    model = Llama(spec, generator=generator)
    model.tokenizer, model.template = tokenizer, find_template(tokenizer)
    return model
