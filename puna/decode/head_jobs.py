"""The work of the stages ``acceptance_head`` and ``judge_head``: open, encode, train, save, report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.core.stage import Context, Outcome
from puna.data.corpus import Corpus
from puna.decode.acceptance import train_acceptance_head
from puna.decode.heads import Head, HeadTraining, save_head
from puna.decode.judge import train_judge_head
from puna.decode.mistakes import Passage, spoil
from puna.decode.respond import asked, open_messages
from puna.decode.sampling import Sampling
from puna.text import pretrained
from puna.text.encode import encode_prompt, encode_rows

if TYPE_CHECKING:
    from puna.decode.draft_stages import AcceptanceHead, JudgeHead
    from puna.model.llama import Llama


def _open(context: Context, name: str) -> Llama:
    model = pretrained.load(context.inputs[name], dtype=context.dtype, device=context.device).eval()
    if model.tokenizer is None:
        raise PunaError("the model has no tokenizer", where=model.source, fix="put tokenizer.json beside it")
    return model


def make_acceptance_head(context: Context, parameters: AcceptanceHead) -> Outcome:
    """The stage ``acceptance_head``."""
    target, draft = _open(context, "target"), _open(context, "draft")
    rows = [row for path in context.inputs["corpus"].values() for row in open_messages(Corpus.open(path))]
    assert target.tokenizer is not None
    texts = encode_rows(rows, "messages", target.tokenizer, target.template)
    sampling = Sampling(temperature=parameters.temperature, top_k=parameters.top_k, top_p=parameters.top_p)
    training = HeadTraining(
        parameters.epochs,
        parameters.batch_texts,
        parameters.learning_rate,
        parameters.warmup_ratio,
        parameters.rejection_weight,
    )
    head, figures, losses = train_acceptance_head(
        target,
        draft,
        texts,
        sampling,
        training,
        blocks=parameters.blocks,
        shared=parameters.shared,
        mix=parameters.mix,
        draft_vocabulary=parameters.draft_vocabulary,
        held_out_share=parameters.held_out_share,
        batch_tokens=parameters.batch_tokens,
        seed=context.seed,
    )
    return _leave(context, head, figures, losses)


def make_judge_head(context: Context, parameters: JudgeHead) -> Outcome:
    """The stage ``judge_head``."""
    model = _open(context, "model")
    assert model.tokenizer is not None
    chosen: list[Passage] = []
    for name, path in context.inputs["corpus"].items():
        passages = _passages(model, name, Corpus.open(path))
        order = numpy_generator(context.seed, "passages", name).permutation(len(passages))
        chosen += [passages[int(place)] for place in order[: parameters.texts]]
    spoilt = spoil(chosen, model.tokenizer, tokens=parameters.tokens, seed=context.seed)
    training = HeadTraining(
        parameters.epochs, parameters.batch_texts, parameters.learning_rate, parameters.warmup_ratio
    )
    head, figures, losses = train_judge_head(
        model,
        spoilt,
        training,
        held_out_share=parameters.held_out_share,
        balance=parameters.balance,
        batch_tokens=parameters.batch_tokens,
        seed=context.seed,
    )
    return _leave(context, head, {"without_a_spot": float(len(chosen) - len(spoilt)), **figures}, losses)


def _passages(model: Llama, name: str, corpus: Corpus) -> list[Passage]:
    """The texts of a corpus: documents, or the last answers of conversations behind what was asked."""
    tokenizer: Any = model.tokenizer
    start = [tokenizer.bos_id] if tokenizer.adds_bos else []
    if corpus.kind == "documents":
        return [Passage(start, row["text"], name) for row in corpus.rows()]
    found: list[Passage] = []
    for row in open_messages(corpus):
        if row["messages"][-1]["role"] == "assistant" and asked(row):
            if model.template is None:
                raise PunaError("conversations need a chat template", where=model.source)
            before = encode_prompt(tokenizer, model.template, asked(row))
            found.append(Passage(before, row["messages"][-1]["content"], name))
    return found


def _leave(context: Context, head: Head, figures: dict[str, float], losses: Sequence[float]) -> Outcome:
    context.report.setdefault("curves", []).append(
        {
            "title": "Loss of the head",
            "x": "steps",
            "y": "nats",
            "series": [{"name": "training", "x": list(range(1, len(losses) + 1)), "y": list(losses)}],
        }
    )
    return Outcome({"head": save_head(head, context.out / "head.safetensors")}, figures)
