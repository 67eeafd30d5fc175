"""The rows of the training benchmark: one corpus for both sides, and which rows each step learns from.

puna opens the corpus as a user's run does. The peer gets the same token ids and the same loss mask, in the
order of puna's feed, out of a file of steps; what it really fed is compared with that file afterwards.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from puna.core.files import fingerprint, read_json, write_json

MODEL = "smollm2-135m-instruct"
SEED = 11
SOURCES = ("django", "plone")  # Dutch catalogues that puna's own recipes learn from
LONGEST, MEAN_TOKENS, SHORTEST = 1000, 250, 50
SPREAD = 0.8  # of the logarithm of a conversation's length


@dataclass(frozen=True)
class Document:
    """One document or conversation: its token ids and whether each is learnt."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]

    @property
    def targets(self) -> int:
        """Tokens that are learnt; the first one of a document never is."""
        return sum(self.trained[1:])

    @property
    def digest(self) -> str:
        """A fingerprint of ids and mask, to compare what both sides learnt from."""
        return digest(self.ids, self.trained)


Row = tuple[Document, ...]  # documents packed together
Step = tuple[Row, ...]  # the rows of an optimiser step


def digest(ids: Iterable[int], trained: Iterable[bool]) -> str:
    """A fingerprint of token ids and of which of them, after the first, are learnt."""
    mask = [False, *list(trained)[1:]]
    text = f"{list(ids)}{[place for place, is_trained in enumerate(mask) if is_trained]}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digests(steps: Sequence[Step]) -> list[str]:
    """A fingerprint of each step's documents, whatever their order inside the step."""
    return [fingerprint(sorted(document.digest for row in step for document in row)) for step in steps]


def write_steps(path: Path, steps: Sequence[Step]) -> None:
    """Write the steps as JSON."""
    write_json(
        path,
        [[[[list(d.ids), [int(t) for t in d.trained]] for d in row] for row in step] for step in steps],
    )


def read_steps(path: Path) -> list[Step]:
    """What :func:`write_steps` wrote."""
    return [
        tuple(tuple(Document(tuple(ids), tuple(map(bool, mask))) for ids, mask in row) for row in step)
        for step in read_json(path)
    ]


def model_folder(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a checkpoint folder in bfloat16, which both sides open."""
    import torch

    import puna

    target = folder / "model"
    if not (target / "config.json").is_file():
        puna.save(puna.load(MODEL, dtype=torch.bfloat16), target)
    return target


def drawn_model(folder: Path, name: str, changes: dict[str, Any]) -> Path:
    """A checkpoint folder of another size with random weights and SmolLM2's tokenizer."""
    import torch

    import puna
    from puna.core.seeds import torch_generator
    from puna.model.llama import Llama
    from puna.model.spec import LlamaSpec

    target = folder / f"model-{name}"
    if not (target / "config.json").is_file():
        base = puna.load(MODEL, dtype=torch.bfloat16)
        spec = LlamaSpec.from_config({**base.spec.to_config(), **changes})
        generator = torch_generator(SEED, "benchmark", name)
        drawn = Llama(spec, dtype=torch.bfloat16, generator=generator)
        drawn.tokenizer, drawn.template = base.tokenizer, base.template
        puna.save(drawn, target)
    return target


def sentence_pairs(folder: Path) -> list[tuple[str, str]]:
    """English and Dutch sentences of the catalogues, in a random order that the seed fixes."""
    from puna.core.seeds import numpy_generator
    from puna.data.corpus import Corpus
    from puna.run.alone import run_stage

    settings = {
        "kind": "sentence_pairs",
        "language": "nl",
        "sources": [{"asset": name} for name in SOURCES],
        "min_words": 2,
        "max_characters": 600,
    }
    run_stage("corpus", {}, folder / "pairs", settings, seed=SEED, device="cpu")
    pairs = [
        (str(row["source_text"]), str(row["target_text"]))
        for row in Corpus.open(folder / "pairs" / "train").rows()
    ]
    order = numpy_generator(SEED, "benchmark", "pairs").permutation(len(pairs))
    return [pairs[int(place)] for place in order]


def wanted_lengths(count: int) -> list[int]:
    """Lengths of conversations in tokens: log-normal, most of them short and a few long."""
    from puna.core.seeds import numpy_generator

    generator = numpy_generator(SEED, "benchmark", "lengths")
    middle = numpy.log(MEAN_TOKENS) - SPREAD**2 / 2
    drawn = numpy.exp(generator.normal(middle, SPREAD, count))
    return [int(length) for length in numpy.clip(drawn, SHORTEST, LONGEST)]


def turn(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """A request to translate some sentences into Dutch, and the answer that translators gave."""
    if len(pairs) == 1:
        return [
            {"role": "user", "content": f"Vertaal naar het Nederlands: {pairs[0][0]}"},
            {"role": "assistant", "content": pairs[0][1]},
        ]
    asked = "\n".join(f"{number}. {english}" for number, (english, _) in enumerate(pairs, 1))
    answered = "\n".join(f"{number}. {dutch}" for number, (_, dutch) in enumerate(pairs, 1))
    return [
        {"role": "user", "content": f"Vertaal naar het Nederlands:\n{asked}"},
        {"role": "assistant", "content": answered},
    ]


def conversations(folder: Path, model: Path, tokens: int) -> Iterator[list[dict[str, str]]]:
    """Conversations of mixed length of about ``tokens`` tokens together; each sentence is used once."""
    from puna.core.seeds import numpy_generator
    from puna.text.encode import encode_messages
    from puna.text.pretrained import read_tokenizer
    from puna.text.template import find_template

    tokenizer = read_tokenizer(model)
    assert tokenizer is not None
    template = find_template(tokenizer)
    assert template is not None
    pairs = iter(sentence_pairs(folder))
    sizes = numpy_generator(SEED, "benchmark", "turns")
    made = 0
    for wanted in wanted_lengths(tokens):  # more than are needed
        messages: list[dict[str, str]] = []
        length = 0
        while length < wanted:
            most = int(sizes.integers(1, 7)) if wanted - length > 150 else 1
            taken = [pair for _, pair in zip(range(most), pairs, strict=False)]
            if not taken:
                raise SystemExit(f"the catalogues hold no {tokens} tokens; ask for fewer steps")
            longer = [*messages, *turn(taken)]
            longer_length = len(encode_messages(tokenizer, template, longer))
            if longer_length > LONGEST and messages:
                break
            messages, length = longer, longer_length
        if length <= LONGEST:
            made += length
            yield messages
        if made >= tokens:
            return


def chat_rows(folder: Path, model: Path, tokens: int) -> Iterator[dict[str, Any]]:
    """Rows of a corpus of messages."""
    for number, messages in enumerate(conversations(folder, model, tokens)):
        yield {"id": f"chat-{number}", "messages": messages, "source": "catalogues", "language": "nl"}


def preference_rows(folder: Path, model: Path, tokens: int) -> Iterator[dict[str, Any]]:
    """Rows of a corpus of preferences: the translators' answer, and the answer of the next conversation."""
    whole = list(conversations(folder, model, tokens // 2))
    for number, messages in enumerate(whole):
        other = whole[(number + 1) % len(whole)]
        yield {
            "id": f"pair-{number}",
            "prompt": messages[:-1],
            "chosen": messages[-1:],
            "rejected": other[-1:],
            "source": "catalogues",
            "language": "nl",
        }


def document_rows(folder: Path, model: Path, tokens: int) -> Iterator[dict[str, Any]]:
    """One Dutch document of exactly ``tokens`` tokens: packed rows are full, and each is one piece of text.

    So nothing has to be masked on either side. The catalogues are repeated if they hold fewer tokens.
    """
    from puna.text.encode import encode_document
    from puna.text.pretrained import read_tokenizer

    tokenizer = read_tokenizer(model)
    assert tokenizer is not None
    lines = [dutch for _, dutch in sentence_pairs(folder)]
    ids = tokenizer.encode("\n".join(lines))
    ids = ids * (tokens // len(ids) + 2)
    for start in range(1000):
        text = tokenizer.decode(ids[start : start + tokens - 1])
        # Cut where the pieces of the text come out the same again, with the EOS after them.
        if len(encode_document(tokenizer, text)) == tokens:
            yield {"id": "catalogues", "text": text, "source": "catalogues", "language": "nl"}
            return
    raise SystemExit(f"no stretch of the catalogues has {tokens} tokens")


ROWS = {"messages": chat_rows, "preferences": preference_rows, "documents": document_rows}


def write_rows(folder: Path, name: str, kind: str, rows: Iterable[dict[str, Any]]) -> Path:
    """A corpus of these rows, in place of one that was there before."""
    from puna.data.corpus import write_corpus
    from puna.data.ledger import Ledger

    target = folder / name
    provenance = [{"source": source, "licence": "see puna assets"} for source in SOURCES]
    write_corpus(target, kind, rows, provenance=provenance, ledger=Ledger())
    return target


def encoded(model: Path, kind: str, rows: Iterable[dict[str, Any]]) -> list[Any]:
    """Rows as puna's training encodes them."""
    from puna.text.encode import encode_rows
    from puna.text.pretrained import read_tokenizer
    from puna.text.template import find_template

    tokenizer = read_tokenizer(model)
    assert tokenizer is not None
    return encode_rows(rows, kind, tokenizer, find_template(tokenizer))


def packed_rows(model: Path, kind: str, rows: list[dict[str, Any]], settings: dict[str, Any]) -> Any:
    """Rows as puna packs them for training."""
    from puna.text.packing import pack, usual_mode

    return pack(encoded(model, kind, rows), settings["max_length"], mode=usual_mode(kind))


def without_short_rows(packed: Any, rows: list[dict[str, Any]], limit: float) -> list[dict[str, Any]]:
    """The rows of a corpus without those that ended up in packed rows of at most ``limit`` tokens.

    Best fit opened those rows for what had no room elsewhere, so the others are packed as before.
    """
    short = {piece.document.source for row in packed if row.tokens <= limit for piece in row.slices}
    return [row for row in rows if str(row["id"]) not in short]


def planned_steps(packed: Any, settings: dict[str, Any]) -> list[Step]:
    """The steps of puna's first epoch over packed rows, by puna's own feed."""
    from puna.core.seeds import derive
    from puna.train.loader import Feed

    feed = Feed(
        packed,
        batch_tokens=settings["batch_tokens"],
        micro_batch_tokens=settings["micro_batch_tokens"],
        seed=derive(SEED, "train"),
    )
    return [tuple(_row(feed.rows[int(number)]) for number in step.rows) for step in feed.steps(0)]


def _row(row: Any) -> Row:
    return tuple(
        Document(
            tuple(piece.document.ids[piece.start : piece.stop]),
            tuple(piece.document.trained[piece.start : piece.stop]),
        )
        for piece in row.slices
    )


def completion(ids: Sequence[int], trained: Sequence[bool]) -> Document:
    """One side of a preference pair: only its last answer is learnt, and what follows that is left out."""
    end = max(place for place, learnt in enumerate(trained) if learnt) + 1
    start = end
    while start and trained[start - 1]:
        start -= 1
    mask = [place >= start for place in range(end)]
    return Document(tuple(ids[:end]), tuple(mask))


def distribution(lengths: Sequence[int]) -> str:
    """Quantiles of lengths, for the reader of a table."""
    figures = numpy.percentile(lengths, [0, 10, 50, 90, 100]).astype(int)
    names = ("shortest", "10%", "median", "90%", "longest")
    told = ", ".join(f"{name} {figure}" for name, figure in zip(names, figures, strict=True))
    return f"{len(lengths)} of mean {numpy.mean(lengths):.0f} tokens: {told}"


def same_documents(planned: Sequence[Step], fed: Sequence[str]) -> bool:
    """Whether the peer fed exactly the documents and masks of the planned steps, in their order."""
    return list(fed) == digests(planned)


def counted(steps: Sequence[Step]) -> Counter[str]:
    """Tokens and targets of some steps."""
    documents = [document for step in steps for row in step for document in row]
    return Counter(tokens=sum(len(d.ids) for d in documents), targets=sum(d.targets for d in documents))
