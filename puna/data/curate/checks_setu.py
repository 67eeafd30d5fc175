"""What Setu (S60, arXiv:2403.06350) claims, measured: the stage ``setu_checks``.

Its limits by language decide on both sides of each bound as its table says; a vote knows more short mixed
lines than any of its voters; boxes of a page equal values worked out by hand.
"""

from __future__ import annotations

import json
import math
import time
from itertools import islice

import numpy

from puna.core import seeds
from puna.core.errors import PunaError
from puna.core.stage import Context, Outcome
from puna.data.corpus import Corpus
from puna.data.curate.checks_settings import SetuChecksParameters
from puna.data.curate.gates import passes
from puna.data.curate.languages import detect, vote
from puna.data.curate.operator import apply_map, get_operator
from puna.data.curate.pipeline import load_pipeline
from puna.data.curate.texts import Texts

# The released configurations once more, as what is flagged: lines and words of a line up to a number
# (inclusive), shares from a number on (inclusive). "" stands for all languages that are not told.
_TABLE: dict[str, tuple[str, float, dict[str, float]]] = {
    "few lines": ("up to", 4, {"as": 3, "brx": 3, "gu": 3}),
    "short lines": ("up to", 5, {"gu": 4}),
    "other scripts": ("from", 0.05, {"as": 0.03, "brx": 0.06, "gu": 0.06}),
    "repeated words": ("from", 0.4, {"hi": 0.5, "kn": 0.5, "gu": 0.3}),
    "repeated characters": ("from", 0.2, {"as": 0.1}),
}
_LANGUAGES = [
    "as",
    "bn",
    "brx",
    "doi",
    "en",
    "gu",
    "hi",
    "kn",
    "ks",
    "kok",
    "mai",
    "ml",
    "mni",
    "mr",
    "ne",
    "or",
    "pa",
    "sa",
    "sat",
    "sd",
    "ta",
    "te",
    "ur",
]


def run(context: Context, parameters: SetuChecksParameters) -> Outcome:
    """Do the work of the stage."""
    corpora = {name: Corpus.open(path, kind="documents") for name, path in context.inputs["corpora"].items()}
    if len(corpora) < 2:
        raise PunaError("give corpora of at least two languages, under their tags", found=", ".join(corpora))
    metrics = flag_figures() | vote_figures(corpora, parameters, context.seed) | box_figures()
    return Outcome(metrics=metrics)


def flag_figures() -> dict[str, float]:
    """Decisions of the gates in ``setu-flags`` that are not what the table says, at and beside each limit."""
    gates = {gate.name: gate for gate in load_pipeline("setu-flags").gates()}
    wrong = checked = 0
    for name, (side, general, own) in _TABLE.items():
        gate = gates[name]
        for language in _LANGUAGES:
            limit = own.get(language, general)
            below, above = math.nextafter(limit, -math.inf), math.nextafter(limit, math.inf)
            values = numpy.array([below, limit, above])
            flagged = values <= limit if side == "up to" else values >= limit
            passing = passes(gate, {gate.signal: values}, [language] * 3)
            wrong += int((passing == flagged).sum())
            checked += 3
    return {"flags.wrong": float(wrong), "flags.checked": float(checked)}


def vote_figures(corpora: dict[str, Corpus], parameters: SetuChecksParameters, seed: int) -> dict[str, float]:
    """Shares of short lines whose language each voter, and the vote, tells right; lines per second."""
    generator = seeds.numpy_generator(seed, "lines")
    least, most = parameters.words
    lines: dict[str, list[str]] = {}
    for language, corpus in corpora.items():
        texts = (" ".join(text.split()) for text in islice(corpus.texts(), 50_000))
        found = [text for text in dict.fromkeys(texts) if least <= len(text.split()) <= most]
        order = generator.permutation(len(found))[: parameters.lines].tolist()
        lines[language] = [found[place] for place in order]
    mixed: list[str] = []
    labels: list[str] = []
    for language, own in lines.items():
        # English words stand in lines of all languages; in English ones, words of its own.
        others = lines.get("en") or own
        for line in own:
            if generator.random() < parameters.mixed:
                other = others[int(generator.integers(0, len(others)))]
                line = f"{line} {' '.join(other.split()[:2])}"
            mixed.append(line)
            labels.append(language)
    if not mixed:
        raise PunaError("no line of so many words", where="setu_checks", found=f"{least} to {most} words")
    batch = Texts(mixed)
    metrics = {"lines": float(len(mixed))}
    for detector in parameters.detectors:
        detect(Texts(["start"]), detector)  # The model is loaded before the clock runs.
    started = time.process_time()
    said = [detect(batch, detector) for detector in parameters.detectors]
    always = [name in parameters.always for name in parameters.detectors]
    won = vote(said, parameters.minimum, always)
    metrics["vote.documents_per_second"] = len(mixed) / max(time.process_time() - started, 1e-9)

    def right(languages: list[str]) -> float:
        return sum(a == b for a, b in zip(languages, labels, strict=True)) / len(labels)

    for detector, one in zip(parameters.detectors, said, strict=True):
        metrics[f"{detector}.right"] = right(one.languages)
    metrics["vote.right"] = right(won.languages)
    metrics["alone.right"] = max(metrics[f"{name}.right"] for name in parameters.detectors)
    # As released, where both branches of the gate add a voice, so that it decides nothing.
    ungated = vote(said, 0.0)
    metrics["vote.right_without_gate"] = right(ungated.languages)
    metrics["vote.changed_by_gate"] = sum(
        a != b for a, b in zip(won.languages, ungated.languages, strict=True)
    ) / len(labels)
    return metrics


def _box(left: float, top: float, right: float, bottom: float) -> dict[str, object]:
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return {"boundingBox": {"normalizedVertices": [{"x": x, "y": y} for x, y in corners]}}


def box_figures() -> dict[str, float]:
    """The largest difference of a page's measures from values by hand, and whether the nested box went.

    The page: a block of width 0.5 and height 0.4 with paragraphs of 0.5 x 0.2, one nested in it, and one
    of 0.3 x 0.1 below it; and a block of 0.4 x 0.65 with a paragraph of 0.4 x 0.25 that overlaps the last.
    """
    word = {"symbols": [{"text": "a"}]}
    first = [(0.0, 0.0, 0.5, 0.2), (0.1, 0.05, 0.3, 0.15), (0.0, 0.2, 0.3, 0.3)]
    second = [(0.2, 0.25, 0.6, 0.5)]
    blocks = [
        {**_box(*outline), "paragraphs": [{**_box(*one), "words": [word]} for one in paragraphs]}
        for outline, paragraphs in (((0.0, 0.0, 0.5, 0.4), first), ((0.2, 0.25, 0.6, 0.9), second))
    ]
    operator = get_operator("map", "setu.page_text")
    made = apply_map(operator, Texts([""], metas=[json.dumps({"blocks": blocks})]), operator.settings())
    by_hand = {
        "nested": 1.0,
        "horizontal_coverage": 0.6,
        "vertical_coverage": 0.5,
        "largest_overlap": 0.005 / 0.125,
        "least_density": 0.1 / 0.26,
    }
    errors = [abs(float(made.signals[name][0]) - value) for name, value in by_hand.items()]  # type: ignore[index]
    return {"boxes.error": max(errors), "boxes.paragraphs_left": float(len(made.texts[0] or ""))}
