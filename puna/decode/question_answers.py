"""S20: synthetic questions and answers about science texts as plain text to learn from, arXiv:2407.18743.

The paper gives snippets of pages of nine disciplines to Mistral-7B-Instruct and joins the pairs that it
writes. Here question and answer are asked for one after the other, with the snippet before both, so that
either can be told apart: a share of the questions can be given another's answer, as the paper's study of
wrong answers does. Which texts are of science is for whoever chooses the corpus.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.core.seeds import derive, numpy_generator
from puna.core.stage import Context, Outcome
from puna.data.corpus import Corpus, write_corpus
from puna.data.ledger import Ledger
from puna.decode.engine import Engine
from puna.decode.sampling import Sampling
from puna.text import pretrained

if TYPE_CHECKING:
    from puna.decode.question_stages import QuestionAnswers

_PLACE = re.compile(r"\{(\w+)\}")


def run(context: Context, parameters: QuestionAnswers) -> Outcome:
    """The stage."""
    source = Corpus.open(context.inputs["corpus"], kind="documents")
    model = pretrained.load(context.inputs["model"], dtype=context.dtype, device=context.device)
    rows = drawn(source, parameters.rows, context.seed)
    snippets = [snippet(row["text"], parameters.characters) for row in rows]
    engine = Engine(model, quantize=parameters.quantize, kernels=parameters.kernels)

    def ask(prompts: Sequence[str], tokens: int, purpose: str) -> list[str]:
        sampling = Sampling(
            max_tokens=tokens,
            temperature=parameters.temperature,
            top_k=parameters.top_k,
            top_p=parameters.top_p,
            seed=derive(context.seed, "question answers", purpose),
        )
        asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return [" ".join(completion.text.split()) for completion in engine.generate(asked, sampling)]

    questions = ask(
        [filled(parameters.question, text=text) for text in snippets], parameters.question_tokens, "question"
    )
    answers = ask(
        [
            filled(parameters.answer, text=text, question=question)
            for text, question in zip(snippets, questions, strict=True)
        ],
        parameters.answer_tokens,
        "answer",
    )
    told = [bool(question and answer) for question, answer in zip(questions, answers, strict=True)]
    places = [place for place, is_told in enumerate(told) if is_told]
    if not places:
        raise PunaError("the model wrote no question with an answer", where=str(model.source))
    about = [*source.meta["provenance"], {"source": str(model.source), "licence": "that of the model"}]

    def written(name: str, given: Mapping[int, str]) -> Corpus:
        ledger = Ledger()
        joined = _joined(rows, questions, given, parameters.joined, ledger)
        return write_corpus(context.out / name, "documents", joined, provenance=about, ledger=ledger)

    made = written("corpus", {place: answers[place] for place in places})
    outputs = {"corpus": made.path}
    figures = {"rows": float(made.count), "dropped": float(len(rows) - len(places))}
    if parameters.wrong:
        swapped = exchanged(len(places), parameters.wrong, context.seed)
        given = {place: answers[places[other]] for place, other in zip(places, swapped, strict=True)}
        outputs["spoilt"] = written("spoilt", given).path
        figures["wrong"] = float(sum(place != other for place, other in enumerate(swapped)))
    context.report.setdefault("samples", []).extend(
        {"prompt": snippets[place], "outputs": {"question": questions[place], "answer": answers[place]}}
        for place in places[:5]
    )
    return Outcome(outputs, figures | {"bytes": float(made.meta["counts"]["bytes"])})


def drawn(source: Corpus, count: int, seed: int) -> list[dict[str, Any]]:
    """At most so many rows, drawn by the seed, in the corpus's order."""
    places = numpy_generator(seed, "snippets").permutation(source.count)[:count]
    wanted = set(places.tolist())
    return [row for place, row in enumerate(source.rows()) if place in wanted]


def snippet(text: str, characters: int) -> str:
    """The beginning of a text, of so many characters at most, cut at white space where there is some."""
    if len(text) <= characters:
        return text.strip()
    cut = text[: characters + 1]
    end = max(cut.rfind(" "), cut.rfind("\n"))
    return (cut[:end] if end > 0 else text[:characters]).strip()


def filled(form: str, **values: str) -> str:
    """The form with its places filled; what stands in a value is no place."""
    return _PLACE.sub(lambda found: values.get(found[1], found[0]), form)


def exchanged(count: int, share: float, seed: int) -> list[int]:
    """Whose answer each of ``count`` questions gets: those of a share, two at least if any, go round."""
    result = list(range(count))
    chosen = round(share * count)
    if chosen and count > 1:
        ring = numpy_generator(seed, "wrong answers").permutation(count)[: max(chosen, 2)].tolist()
        for place, other in zip(ring, [*ring[1:], ring[0]], strict=True):
            result[place] = other
    return result


def _joined(
    rows: Sequence[Mapping[str, Any]],
    questions: Sequence[str],
    answers: Mapping[int, str],
    form: str,
    ledger: Ledger,
) -> Iterator[dict[str, Any]]:
    tally = ledger.step("questions", "rows")
    for place, row in enumerate(rows):
        if place not in answers:
            tally.drop("no question or no answer")
            continue
        tally.keep()
        text = filled(form, question=questions[place], answer=answers[place])
        yield {"id": row["id"], "text": text, "source": row["source"], "language": row["language"]}
