"""Every bound of every preset, by documents on both sides of it: the bounds are read out of the presets.

Presets whose gates are tested page by page in test_curate_presets are left to it. Of all others each gate
needs documents of its signal here: a new gate over a new signal fails until it has them.
"""

from __future__ import annotations

import itertools
import json
from functools import cache

import numpy
import pytest
from test_curate_presets import FAMILIES, one_word_lines

from puna.core import assets
from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.data.curate import languages as detectors
from puna.data.curate.duplicates.in_memory import over_batches
from puna.data.curate.execute import execute
from puna.data.curate.gates import bounds_for, passes, reduced
from puna.data.curate.pipeline import load_pipeline, preset_names
from puna.data.curate.texts import Texts

ELSEWHERE = {*FAMILIES, "dclm-baseline"}  # test_curate_presets has pages for each gate of these
PASSES = {
    "minimum": numpy.greater_equal,
    "maximum": numpy.less_equal,
    "above": numpy.greater,
    "below": numpy.less,
}


def near(number):
    return range(max(round(number) - 1, 0), round(number) + 2)


def characters(mark, other, total=1000):
    """Texts of which about the wanted share is one character."""
    return lambda bound: [mark * k + other * (total - k) for k in near(bound * total)]


def times(piece, between=""):
    return lambda bound: [between.join([piece] * k) for k in near(bound)]


@cache
def letters(count):
    drawn = numpy_generator(0, "test", "bounds").integers(0, 26, count)
    return "".join(map(chr, drawn + 97))


def repeated_letters(bound):
    return [letters(3000) + "x" * k for k in range(0, 9000, 60)]


def repeated_words(bound):
    pairs = itertools.product("abcdefghij", "klmnopqrst", "uvwxy")
    different = " ".join(itertools.islice(map("".join, pairs), 400))
    return [f"{different} {'same ' * k}".strip() for k in range(0, 2400, 8)]


def flagged(bound):
    return [" ".join(["flagged"] * k + ["plain"] * (20_000 - k)) for k in near(bound * 20_000)]


def sentences(words):
    return lambda bound: [" ".join([f"{' '.join(['क'] * words)}।"] * k) for k in range(round(bound) + 3)]


def lines_of_words(bound):
    return ["।".join([" ".join(["क"] * k)] * 10) for k in range(1, round(bound) + 3)]


def less_and_less_sure(bound):
    """English that letters of many scripts follow, more and more of them."""
    english = "This is an easy sentence and everybody who reads it knows at once which language it is in. "
    scripts = [(0x61, 0x7B), (0xE0, 0x17F), (0x3B1, 0x3CA), (0x430, 0x450), (0x5D0, 0x5EB), (0x905, 0x930)]
    codes = numpy.concatenate(
        [numpy.arange(*ends) for ends in (*scripts, (0x4E00, 0x4E40), (0xAC00, 0xAC20))]
    )
    mixed = "".join(map(chr, numpy_generator(0, "test", "bounds").permutation(codes)))
    return [english + " ".join(mixed[a : a + 4] for a in range(0, 4 * k, 4)) for k in range(120)]


def scanned(bound):
    """Pages of twenty paragraphs, of which some are of three languages."""
    return [("", _page(k)) for k in near(bound * 20)]


def _page(unsure):
    def word(language):
        told = {"detectedLanguages": [{"languageCode": language, "confidence": 0.9}]}
        return {"symbols": [{"text": "x"}], "property": told}

    box = {
        "normalizedVertices": [{"x": x, "y": y} for x, y in ((0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9))]
    }
    paragraphs = []
    for place in range(20):
        x, y = 0.1 + place / 50, 0.1 + place / 50
        corners = ((x, y), (x + 0.01, y), (x + 0.01, y + 0.01), (x, y + 0.01))
        own = {"normalizedVertices": [{"x": a, "y": b} for a, b in corners]}
        words = [word(language) for language in (("hi", "mr", "ta") if place < unsure else ("hi",) * 3)]
        paragraphs.append({"boundingBox": own, "words": words})
    return json.dumps({"blocks": [{"boundingBox": box, "paragraphs": paragraphs}]})


DOCUMENTS = {
    "data_juicer.alphanumeric.ratio": characters("a", "!"),
    "data_juicer.special_characters.ratio": characters("!", "a"),
    "data_juicer.average_line_length.characters": times("a"),
    "data_juicer.maximum_line_length.characters": times("a"),
    "data_juicer.text_length.characters": times("a"),
    "data_juicer.words.count": times("ab", " "),
    "data_juicer.character_repetition.ratio": repeated_letters,
    "data_juicer.word_repetition.ratio": repeated_words,
    "data_juicer.flagged_words.ratio": flagged,
    "data_juicer.language.probability": less_and_less_sure,
    "language.detected.probability": less_and_less_sure,
    "setu.statistics.lines": sentences(3),
    "setu.statistics.mean_line_words": lines_of_words,
    "setu.statistics.other_scripts": characters("中", "क"),
    "setu.statistics.word_repetition": repeated_words,
    "setu.statistics.character_repetition": repeated_letters,
    "setu.symbols.ratio": characters("😀", "क"),
    "setu.page_text.unsure": scanned,
    "dclm.modify_lines.removed_share": lambda bound: [one_word_lines(k) for k in range(12)],
    "text.sizes.words": times("ab", " "),
    "text.sizes.line_words": lambda bound: ["\n".join([" ".join(["ab"] * k)] * 3) for k in range(1, 5)],
}
YES_OR_NO = {
    # Whether the language is the wanted one: a document in it, one in another, and one in none.
    "language.detected.wanted",
    "language.vote.wanted",
}
COPIES = {"dedup.minhash.duplicate", "dedup.simhash.duplicate", "dedup.exact.duplicate"}


def steps_and_gates():
    """Each gate that is not tested elsewhere with the step that stores its signal, once, with its presets."""
    tested = [gate.model_dump() for preset in ELSEWHERE for gate in load_pipeline(preset).gates()]
    found = {}
    for preset in preset_names():
        if preset in ELSEWHERE:
            continue
        pipeline = load_pipeline(preset)
        for gate in pipeline.gates():
            if gate.model_dump() in tested:
                continue
            step = next(s for s in pipeline.steps if gate.signal in s.signals())
            languages_ = () if gate.signal in YES_OR_NO else json.dumps(step.as_json(), sort_keys=True)
            found.setdefault((gate.model_dump_json(), languages_), (preset, step, gate))
    return [pytest.param(*row, id=f"{row[0]}-{row[2].name}") for row in found.values()]


@cache
def needs_lid():
    pytest.importorskip("fasttext")
    try:
        assets.fetch(detectors.LID)
    except PunaError as error:
        pytest.skip(f"lid.176 is not within reach: {error}")


_DONE = {}


def signals_of(step, signal, bound):
    """The signals of documents around a bound, worked out once for what asks for the same."""
    key = (json.dumps(step.as_json(), sort_keys=True), signal, bound)
    if key not in _DONE:
        made = DOCUMENTS[signal](bound)
        pairs = made if signal == "setu.page_text.unsure" else [(text, "") for text in made]
        texts, metas = zip(*pairs, strict=True)
        done = execute([step], Texts(texts, metas=metas), everything=True)
        assert not done.failed
        _DONE[key] = done.signals, len(texts)
    return _DONE[key]


@pytest.mark.parametrize(("preset", "step", "gate"), steps_and_gates())
def test_documents_on_both_sides_of_every_bound(preset, step, gate, tmp_path_factory):
    if gate.signal in COPIES:
        return _test_copies(step, gate)
    if gate.signal in YES_OR_NO:
        return _test_yes_or_no(step, gate)
    assert gate.signal in DOCUMENTS, f"{preset}: documents around {gate.signal} are missing"
    if gate.signal.endswith(".probability"):
        needs_lid()
    if gate.signal == "data_juicer.flagged_words.ratio":
        file = tmp_path_factory.getbasetemp() / "flagged.txt"
        file.write_text("flagged\n")
        step = type(step)(step.label, step.operator, step.settings.model_copy(update={"words": str(file)}))
    for tag in ("", *gate.languages):
        for key, bound in bounds_for(gate, tag).items():
            shared = DOCUMENTS[gate.signal] in (repeated_letters, repeated_words, less_and_less_sure)
            signals, count = signals_of(step, gate.signal, None if shared else bound)
            values = reduced(gate, signals, count)
            inside = PASSES[key](values, bound) & ~numpy.isnan(values)
            crossings = numpy.flatnonzero(inside[1:] != inside[:-1])
            assert len(crossings), f"{preset}: no documents around {gate.name}: {key} {bound}"
            passing = passes(gate, signals, [tag] * count)
            for place in crossings.tolist():
                pair = slice(place, place + 2)
                assert passing[pair].tolist() == inside[pair].tolist(), (tag, key, bound, values[pair])
    return None


def _test_copies(step, gate):
    text = " ".join(letters(3000)[a : a + 6] for a in range(0, 3000, 6))
    other = text[::-1]
    told = list(
        over_batches(step.operator.name, [Texts([text, other, text, ""])], **step.settings.model_dump())
    )
    passing = passes(gate, {gate.signal: numpy.asarray(told[0].signals["duplicate"], float)}, [""] * 4)
    assert passing.tolist() == [True, True, False, True]


def _test_yes_or_no(step, gate):
    needs_lid()
    pytest.importorskip("gcld3")
    pytest.importorskip("py3langid")
    wanted = "hi" if step.label == "language.vote" else "en"
    step = type(step)(step.label, step.operator, step.settings.model_copy(update={"languages": [wanted]}))
    texts = ["नमस्ते, आप कैसे हैं और यह किताब किसकी है?", "This is a sentence that is written in English.", ""]
    done = execute([step], Texts(texts), everything=True)
    passing = passes(gate, done.signals, ["", "", ""])
    assert passing.tolist() == [wanted == "hi", wanted == "en", False]


def test_gates_of_dclm_baseline_are_those_that_are_tested():
    pages = {gate.name for gate in load_pipeline("dclm-pages").gates()}
    own = [gate.name for gate in load_pipeline("dclm-baseline").gates() if gate.name not in pages]
    urls = ["dclm domains", "dclm strict urls", "dclm hard urls", "dclm soft urls"]
    assert own == [*urls, "dclm removed words"]
