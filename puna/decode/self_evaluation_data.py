"""Rows to learn self-evaluation from: a model's own answers, whole and cut, each with the right verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from puna.core.seeds import derive, numpy_generator
from puna.core.stage import Context, Outcome
from puna.data.corpus import write_corpus
from puna.data.ledger import Ledger
from puna.decode.checked_tasks import make_tasks
from puna.decode.engine import Engine
from puna.decode.sampling import Sampling
from puna.decode.self_evaluation import judged, wins_or_ties
from puna.decode.self_evaluation_measures import Answers, draw_answers
from puna.text import pretrained

if TYPE_CHECKING:
    from numpy.random import Generator

    from puna.decode.routing_stages import SelfEvaluationData
    from puna.text.tokenizer import Tokenizer


def run(context: Context, parameters: SelfEvaluationData) -> Outcome:
    """The stage ``self_evaluation_data``."""
    model = pretrained.load(context.inputs["model"], dtype=context.dtype, device=context.device)
    engine = Engine(model)
    seed = derive(context.seed, context.name)
    tasks = make_tasks(parameters.tasks, parameters.questions, seed, held_out=False)
    sampling = Sampling(
        max_tokens=parameters.max_tokens, temperature=parameters.temperature, seed=seed % 2**31
    )
    answers = draw_answers(engine, tasks, sampling, parameters.samples, anneal=False)
    ledger = Ledger()
    rows, start_over = _rows(answers, parameters, engine.tokenizer, seed, ledger)
    made = write_corpus(
        context.out / "corpus",
        "messages",
        rows,
        provenance=[{"source": str(model.source), "licence": "that of the model"}],
        ledger=ledger,
    )
    rewards = [reward for each in answers for reward in each.rewards]
    return Outcome(
        {"corpus": made.path},
        {
            "rows": float(made.count),
            "reward": sum(rewards) / len(rewards),
            "start_over": start_over,
            "undecided": sum(len(set(each.rewards)) == 1 for each in answers) / len(answers),
        },
    )


def _rows(
    answers: Sequence[Answers],
    parameters: SelfEvaluationData,
    tokenizer: Tokenizer,
    seed: int,
    ledger: Ledger,
) -> tuple[list[dict[str, Any]], float]:
    """All rows to learn, and the share of "start over" among the verdicts before they are balanced."""
    tally, whole = ledger.step("judged answers", "answers"), ledger.step("answers as they are", "answers")
    verdicts: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    rows: list[dict[str, Any]] = []
    for number, each in enumerate(answers):
        generator = numpy_generator(seed, "judged", number)
        order = [int(place) for place in generator.permutation(len(each.texts))]
        said = [place for place in reversed(order) if each.texts[place].strip()]
        if said and generator.random() < parameters.kept_share:
            answer = {"role": "assistant", "content": each.texts[said[0]].strip()}
            whole.keep()
            rows.append(_row(f"kept{number}-{said[0]}", each, [*each.task.messages, answer]))
        for count, own in enumerate(order):
            if parameters.rows_per_question is not None and count >= parameters.rows_per_question:
                tally.drop("more than the rows of a question")
                continue
            others = [place for place in range(len(each.texts)) if place != own]
            other = others[int(generator.integers(len(others)))]
            better = not wins_or_ties(each.rewards[own], each.rewards[other], parameters.epsilon)
            text = _maybe_cut(each.ids[own], parameters.cut_share, tokenizer, generator)
            if not text.strip():
                tally.drop("nothing was said")
                continue
            row = _row(f"judged{number}-{own}", each, judged(each.task.messages, text, better))
            verdicts[better].append(row)
    found = sum(map(len, verdicts.values()))
    most = min(map(len, verdicts.values())) if parameters.balanced else found
    for better, judgements in verdicts.items():
        order = numpy_generator(seed, "balanced", better).permutation(len(judgements)).tolist()
        for place in order[:most]:
            tally.keep()
            rows.append(judgements[place])
        for _ in order[most:]:
            tally.drop("more than the other verdict has")
    return rows, len(verdicts[True]) / max(1, found)


def _row(name: str, each: Answers, messages: list[dict[str, str]]) -> dict[str, Any]:
    return {"id": name, "messages": messages, "source": f"checked tasks: {each.task.kind}", "language": "en"}


def _maybe_cut(ids: Sequence[int], share: float, tokenizer: Tokenizer, generator: Generator) -> str:
    """The answer, or with probability ``share`` its beginning up to a random token."""
    cut = generator.random() < share
    length = int(generator.integers(1, max(2, len(ids)))) if cut else len(ids)
    return tokenizer.decode(ids[:length])
