"""Rows to learn self-evaluation from: a model's own answers, whole and cut, each with the right verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    made = write_corpus(
        context.out / "corpus",
        "messages",
        _rows(answers, parameters, engine.tokenizer, seed, ledger),
        provenance=[{"source": str(model.source), "licence": "that of the model"}],
        ledger=ledger,
    )
    rewards = [reward for each in answers for reward in each.rewards]
    judged_rows = [row for row in made.rows() if row["id"].startswith("judged")]
    verdicts = [row["messages"][-1]["content"] for row in judged_rows]
    return Outcome(
        {"corpus": made.path},
        {
            "rows": float(made.count),
            "reward": sum(rewards) / len(rewards),
            "start_over": verdicts.count("Yes") / len(verdicts),
            "undecided": sum(len(set(each.rewards)) == 1 for each in answers) / len(answers),
        },
    )


def _rows(
    answers: Sequence[Answers],
    parameters: SelfEvaluationData,
    tokenizer: Tokenizer,
    seed: int,
    ledger: Ledger,
) -> Iterator[dict[str, Any]]:
    tally, whole = ledger.step("judged answers", "answers"), ledger.step("answers as they are", "answers")
    for number, each in enumerate(answers):
        generator = numpy_generator(seed, "judged", number)
        order = [int(place) for place in generator.permutation(len(each.texts))]
        kept = [place for place in reversed(order) if each.texts[place].strip()]
        for place in kept[: parameters.kept_per_question]:
            answer = {"role": "assistant", "content": each.texts[place].strip()}
            whole.keep()
            yield _row(f"kept{number}-{place}", each, [*each.task.messages, answer])
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
            tally.keep()
            yield _row(f"judged{number}-{own}", each, judged(each.task.messages, text, better))


def _row(name: str, each: Answers, messages: list[dict[str, str]]) -> dict[str, Any]:
    return {"id": name, "messages": messages, "source": f"checked tasks: {each.task.kind}", "language": "en"}


def _maybe_cut(ids: Sequence[int], share: float, tokenizer: Tokenizer, generator: Generator) -> str:
    """The answer, or with probability ``share`` its beginning up to a random token."""
    cut = generator.random() < share
    length = int(generator.integers(1, max(2, len(ids)))) if cut else len(ids)
    return tokenizer.decode(ids[:length])
