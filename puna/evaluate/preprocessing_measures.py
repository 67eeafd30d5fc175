"""What the stage ``ask_tables`` measures: scores beside baselines, tokens, alignment, agreement."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.core.files import write_text
from puna.core.stage import Context, Outcome
from puna.data.tables.questions import NO, YES, Question, read
from puna.data.tables.rows import render
from puna.evaluate import table_scores
from puna.evaluate.askers import Asker, EndpointAsker, EngineAsker
from puna.evaluate.preprocessing import Answered, preprocess

if TYPE_CHECKING:
    from puna.evaluate.preprocessing_stage import AskTables


def run(context: Context, parameters: AskTables) -> Outcome:
    """The stage ``ask_tables``."""
    named = context.inputs["questions"]
    for way, settings in parameters.ways.items():
        for name in settings.questions:
            if name not in named:
                raise PunaError(
                    f"there are no questions {name!r}", where=f"ways.{way}", found=", ".join(named)
                )
    asker = _asker(context, parameters)
    metrics: dict[str, float] = {}
    lines: list[str] = []
    tables, samples = [], []
    for name, path in named.items():
        questions = read(path)
        asked = [question for question in questions if question.role == "asked"]
        labelled = [question for question in questions if question.role == "example"]
        if not asked:
            raise PunaError("the file holds no question to ask", where=path, fix="give one the role asked")
        found = {
            way: preprocess(asker, asked, labelled, settings, context.seed)
            for way, settings in parameters.ways.items()
            if not settings.questions or name in settings.questions
        }
        known = all(question.answer is not None for question in asked)
        figures = _figures(found, asked, known)
        if known:
            figures |= table_scores.baselines(asked, labelled, context.seed)
        metrics |= {
            f"{way}.{name}.{metric}": value
            for way, values in figures.items()
            for metric, value in values.items()
        }
        for one, other in (pair for pair in parameters.compare if set(pair) <= set(found)):
            alike = table_scores.agreement(found[one].answers, found[other].answers)
            metrics[f"agree.{one}.{other}.{name}"] = alike
        tables.append(_table(name, asked[0].task, figures))
        samples += _samples(name, asked, found)
        lines += _lines(name, asked, found)
    context.report.setdefault("tables", []).extend(tables)
    context.report.setdefault("samples", []).extend(samples)
    answers = context.out / "answers.jsonl"
    write_text(answers, "".join(lines))
    return Outcome({"answers": answers}, metrics)


def _asker(context: Context, parameters: AskTables) -> Asker:
    if "model" in context.inputs:
        if parameters.endpoint is not None:
            raise PunaError("both a model and an endpoint are given", fix="leave one of them out")
        from puna.decode.engine import Engine
        from puna.text import pretrained

        model = pretrained.load(context.inputs["model"], dtype=context.dtype, device=context.device)
        return EngineAsker(Engine(model, quantize=parameters.quantize))
    if parameters.endpoint is None:
        raise PunaError("nobody is asked", fix="give the input model, or the parameter endpoint")
    if parameters.quantize is not None:
        raise PunaError("a server lays its weights out itself", found=f"quantize: {parameters.quantize}")
    told = parameters.endpoint
    return EndpointAsker(told.url, told.model, key=told.key, parallel=told.parallel)


def _figures(
    found: Mapping[str, Answered], asked: Sequence[Question], known: bool
) -> dict[str, dict[str, float]]:
    figures = {}
    for way, answered in found.items():
        figures[way] = answered.counts()
        figures[way]["columns"] = float(len(answered.columns))
        if known:
            figures[way] |= table_scores.scores(answered.answers, asked)
            ranked = _ranking(answered, asked)
            if ranked is not None:
                figures[way]["ranking"] = ranked
    return figures


def _ranking(answered: Answered, asked: Sequence[Question]) -> float | None:
    """The AUC of scored yes-or-no answers; None where there is none."""
    scores = [each for each in answered.scores if each is not None]
    if len(scores) < len(asked) or not table_scores.is_yes_no(asked):
        return None
    odds = [
        dict(zip(question.choices, each, strict=True)) for question, each in zip(asked, scores, strict=True)
    ]
    found = table_scores.ranking([each[YES] - each[NO] for each in odds], [q.answer for q in asked])
    return None if math.isnan(found) else found


def _lines(name: str, asked: Sequence[Question], found: Mapping[str, Answered]) -> list[str]:
    """One line of JSON a question: what it was about, what is known, and what each way answered."""
    lines = []
    for place, question in enumerate(asked):
        ways = {way: _said(answered, place) for way, answered in found.items()}
        row = {
            "questions": name,
            "task": question.task,
            "records": question.records,
            "column": question.column,
            "known": question.answer,
            "answers": ways,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return lines


def _said(answered: Answered, place: int) -> dict[str, Any]:
    scores = answered.scores[place]
    return {
        "answer": answered.answers[place],
        "attempts": answered.attempts[place],
        **({"scores": list(scores)} if scores is not None else {}),
        **({"problem": answered.problems[place]} if place in answered.problems else {}),
    }


_COLUMNS = ("f1", "accuracy", "ranking", "tokens", "answered", "answered_again", "failed")


def _table(name: str, task: str, figures: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    rows = [
        [way, *(_number(values.get(column), column) for column in _COLUMNS)]
        for way, values in figures.items()
    ]
    headings = ["", "F1", "accuracy", "ranking (AUC)", "prompt tokens a row", "answered", "again", "failed"]
    return {"title": f"{name}: {task.replace('_', ' ')}", "columns": headings, "rows": rows}


def _number(value: float | None, column: str) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if column in ("f1", "accuracy", "ranking") else f"{value:.0f}"


def _samples(name: str, asked: Sequence[Question], found: Mapping[str, Answered]) -> list[dict[str, Any]]:
    """The first two questions with what each way answered."""
    samples = []
    for place, question in enumerate(asked[:2]):
        text = "\n".join(render(row) for row in question.records)
        about = f" {question.column}?" if question.column else ""
        outputs = {way: str(answered.answers[place]) for way, answered in found.items()}
        samples.append(
            {"prompt": f"{name}:{about}\n{text}", "outputs": {"known": str(question.answer), **outputs}}
        )
    return samples
