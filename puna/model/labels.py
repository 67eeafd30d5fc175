"""Labels in place of words: one linear layer over the final normalised states of a decoder.

Systems S14, LS-LLaMA (Li and others 2023, arXiv:2310.01208), and S75, decoders as taggers (Dukić and
Šnajder 2024, arXiv:2401.14556). A text is labelled from the state of its last token, or the mean or
maximum of all its tokens' states; a word from the state of its first token. Padding is in none of them,
and seen by no token: the published code of S14 zeroes the mask, so that padding is attended to and
averaged in, and a text's label depends on the texts beside it.

The head has transformers' name, ``score``, and the language model's head is left out. What a class of
transformers computes (labels of texts by the last token of a causal decoder, labels of words) is written so
that it opens there; the rest gets puna.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from puna.core.errors import PunaError, unknown_name
from puna.core.seeds import torch_generator

if TYPE_CHECKING:
    from puna.model.llama import Llama

Per = Literal["text", "word"]
Pooling = Literal["last", "mean", "max"]
SCORE = "score"
"""The head's name among a decoder's modules."""
_KEY = "puna_labels"
_CLASSES: dict[str, Per] = {"SequenceClassification": "text", "TokenClassification": "word"}
_DEVIATION = 0.02  # of a head that is drawn: transformers' initializer_range


@dataclass(frozen=True)
class LabelKind:
    """The labels by their numbers, what gets one, and how a text's states become one state.

    ``pooling`` means nothing for words. ``bias`` adds a number to each label's logit.
    """

    names: tuple[str, ...]
    per: Per = "text"
    pooling: Pooling = "last"
    bias: bool = False

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names) or len(self.names) < 2:
            raise PunaError("labels need at least two different names", found=", ".join(self.names))
        if self.per not in get_args(Per):
            raise unknown_name("thing to label", self.per, get_args(Per))
        if self.pooling not in get_args(Pooling):
            raise unknown_name("pooling", self.pooling, get_args(Pooling))

    @property
    def plain(self) -> bool:
        """Whether a class of transformers computes this head, on a decoder that it computes."""
        return self.per == "word" or (self.pooling == "last" and not self.bias)

    def to_config(self, architecture: str) -> dict[str, Any]:
        """What a config says of the labels; ``architecture`` is the name of the language model's class."""
        wanted = next(name for name, per in _CLASSES.items() if per == self.per)
        return {
            "architectures": [architecture.replace("CausalLM", wanted)],
            "id2label": {str(number): name for number, name in enumerate(self.names)},
            "label2id": {name: number for number, name in enumerate(self.names)},
            _KEY: {"per": self.per, "pooling": self.pooling},
        }


def labels_in(config: Mapping[str, Any], *, bias: bool, where: object) -> LabelKind | None:
    """The labels that a checkpoint's config states, ours or transformers'; None for a language model."""
    architecture = str((config.get("architectures") or [""])[0])
    per = next((per for name, per in _CLASSES.items() if architecture.endswith(f"For{name}")), None)
    if per is None:
        return None
    stated = config.get("id2label")
    if not isinstance(stated, Mapping) or sorted(map(str, stated)) != sorted(map(str, range(len(stated)))):
        raise PunaError("labels need names by number", where=where, found=stated, expected="id2label")
    names = {int(number): str(name) for number, name in stated.items()}
    own = config.get(_KEY) or {}
    ordered = tuple(names[number] for number in range(len(names)))
    return LabelKind(ordered, own.get("per", per), own.get("pooling", "last"), bias)


def add_label_head(model: Llama, kind: LabelKind, *, seed: int | None = None) -> None:
    """Put a head for ``kind`` on ``model``, in place, and take the language model's away.

    Its matrix is drawn from N(0, 0.02) by ``seed``; without one it is left for a reader to fill.
    """
    if model.labels is not None:
        raise PunaError("the model has a head for labels already", where=model.source)
    size, width = len(kind.names), model.spec.hidden_size
    if not model.spec.tied:
        del model.lm_head
        model.spec = model.spec.replace(tied=True)
    with torch.device("meta"):
        head = nn.Linear(width, size, bias=kind.bias, dtype=model.dtype)
    if seed is not None and model.device.type != "meta":
        head.to_empty(device=model.device)
        drawn = torch.empty(size, width).normal_(0, _DEVIATION, generator=torch_generator(seed, "label head"))
        with torch.no_grad():
            head.weight.copy_(drawn)
            if head.bias is not None:
                head.bias.zero_()
    model.score = head
    model.labels = kind


def states_of_texts(hidden: Tensor, segments: Tensor | None, pooling: Pooling) -> Tensor:
    """One state [documents, width] for each document of ``hidden`` [rows, time, width], in reading order.

    ``segments`` [rows, time] as in :meth:`puna.model.llama.Llama.hidden`; None: a document a row. Padding
    enters nothing.
    """
    flat = hidden.flatten(0, 1)
    if segments is None:
        counts = [hidden.shape[1]] * hidden.shape[0]
    else:
        real = (segments >= 0).flatten()
        most = int(segments.max()) + 1
        rows = torch.arange(len(segments), device=segments.device)[:, None]
        owners = (segments + rows * most).flatten()[real]
        counts = torch.unique_consecutive(owners, return_counts=True)[1].tolist()
        flat = flat[real]
    parts = torch.split(flat, counts)
    if pooling == "last":
        return torch.stack([part[-1] for part in parts])
    # One by one: a scattered sum has no fixed order on a GPU.
    return torch.stack([part.mean(0) if pooling == "mean" else part.amax(0) for part in parts])


def label_logits(
    model: Llama, input_ids: Tensor, positions: Tensor | None = None, segments: Tensor | None = None
) -> Tensor:
    """Float32 logits over labels: [documents, labels] of texts, [rows, time, labels] where words have them.

    Arguments as in :meth:`puna.model.llama.Llama.hidden`.
    """
    kind = labels_of(model)
    hidden = model.hidden(input_ids, positions, segments)
    states = hidden if kind.per == "word" else states_of_texts(hidden, segments, kind.pooling)
    return cast(Tensor, head_of(model)(states).float())


def head_of(model: Llama) -> nn.Linear:
    """The layer over the states that makes a label's logit of each."""
    return cast(nn.Linear, model.score)


def labels_of(model: Llama) -> LabelKind:
    """The labels of ``model``; a :class:`PunaError` if it has none."""
    if model.labels is None:
        raise PunaError(
            "the model has no head for labels",
            where=model.source,
            found="a language model",
            fix="train one: puna stage label",
        )
    return model.labels


def require_words(model: Llama, purpose: str) -> None:
    """Refuse a model that says labels, or one whose layers see what is to be predicted, for ``purpose``."""
    if model.labels is not None:
        raise PunaError(
            f"{purpose} needs a language model",
            where=model.source,
            found=f"a model of {len(model.labels.names)} labels, without a head for words",
        )
    both_ways = model.spec.layers_both_ways
    if both_ways:
        raise PunaError(
            f"{purpose} needs a causal model: unmasked layers see the tokens that are to be predicted",
            where=model.source,
            found=f"layers {', '.join(map(str, both_ways))} are not causal",
        )
