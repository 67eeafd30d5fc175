"""Every threshold of the presets from both sides: pages made to lie around just that one.

A family of pages grows with a number; the papers' bounds are written down here once more. Of each family
just those pages are dropped whose signal is out of bounds, by the gate that is meant and no other.
"""

from __future__ import annotations

import numpy
import pytest

from puna.data.curate.bound_pages import (
    dclm_families,
    long_words,
    many_words,
    marked,
    n_grams,
    numbers,
    one_word_lines,
    page,
    repeated,
    repetition,
    short_words,
    stop_words,
    with_lines,
    words,
)
from puna.data.curate.execute import execute
from puna.data.curate.gates import reduced
from puna.data.curate.pipeline import load_pipeline, preset_names
from puna.data.curate.texts import Texts


def gopher():
    """Families of Gopher's rules: gate, bounds, pages, numbers."""
    return [
        ("words", (50, 100000), many_words, (49, 50, 100000, 100001)),
        ("word length", (3, None), short_words, (0, 1, 2)),
        ("word length", (None, 10), long_words, range(12, 20)),
        ("bullets", (None, 0.9), with_lines(begin="•"), (8, 9, 10)),
        ("line ellipses", (None, 0.3), with_lines(end=" end..."), (2, 3, 4)),
        ("alphabetic words", (0.8, None), numbers, (11, 12, 13)),
        *as_rows(repetition("")),
    ]


def as_rows(families):
    return [(f.gate, (f.minimum, f.maximum), f.make, f.numbers) for f in families]


def sentence_lines(k):
    return "\n".join(f"This is the line number {at} of some." for at in range(k))


def spoilt(spoil):
    return lambda k: "\n".join([sentence_lines(6), *[spoil] * k])


def three_lines(k):
    return "\n".join(["x" * 300, "y" * k, "z" * 300, "short"])


FAMILIES = {
    "gopher": [
        *gopher(),
        ("hashes", (None, 0.1), marked("#"), (5, 6, 7)),
        ("ellipses", (None, 0.1), marked("..."), (5, 6, 7)),
        ("stop words", (2, None), stop_words("the", "of"), (0, 1, 2)),
    ],
    "dclm-pages": [(name.removeprefix("dclm "), *row) for name, *row in as_rows(dclm_families()[:-1])],
    "c4": [
        ("lorem ipsum", (None, 0), spoilt("Here is lorem ipsum for you."), (0, 1)),
        ("curly brackets", (None, 0), spoilt("Here is a { for all of you."), (0, 1)),
        ("sentences", (3, None), sentence_lines, (1, 2, 3, 4)),
    ],
    "mc4": [("long lines", (200, None), three_lines, (199, 200))],
    "redpajama-v2-natural-language": [
        ("words", (50, 100000), many_words, (49, 50, 100000, 100001)),
        ("word length", (3, None), short_words, (0, 1, 2)),
        ("word length", (None, 10), long_words, range(12, 20)),
        ("symbols", (None, 0.1), marked("#"), range(3, 10)),
        ("bullets", (None, 0.9), with_lines(begin="•"), (8, 9, 10)),
        ("ellipses", (None, 0.3), with_lines(end=" end..."), (2, 3, 4)),
        ("alphabetic words", (None, 0.2), numbers, (11, 12, 13)),
    ],
    "redpajama-v2-repetition": as_rows(n_grams("")),
    "redpajama-v2-c4": [
        ("lorem ipsum", (None, 0), spoilt("Here is lorem ipsum for you."), (0, 1)),
        ("curly brackets", (None, 0), spoilt("Here is a { for all of you."), (0, 1)),
        ("sentences", (3, None), sentence_lines, (1, 2, 3)),
        ("javascript", (None, 0), spoilt("Turn javascript on to see this."), (0, 1)),
        ("line ends", (0.5, None), spoilt("This one does not end"), (5, 6, 7)),
    ],
}
PREFIX = {"dclm-pages": "dclm ", "gopher": "gopher ", "c4": "c4 ", "mc4": "mc4 "}


def gates_of(preset):
    return {gate.name: gate for gate in load_pipeline(preset).gates()}


@pytest.mark.parametrize(
    ("preset", "family"),
    [pytest.param(preset, row, id=f"{preset}-{row[0]}") for preset, rows in FAMILIES.items() for row in rows],
)
def test_a_threshold_from_both_sides(preset, family):
    name, (least, most), make, numbers_ = family
    gate = gates_of(preset)[PREFIX.get(preset, "rpv2 ") + name]
    texts = Texts([make(k) for k in numbers_])
    done = execute(load_pipeline(preset).steps, texts, everything=True)
    assert not done.failed
    values = reduced(gate, done.signals, texts.count)
    inside = numpy.ones(len(values), dtype=bool)
    if least is not None:
        inside &= values >= least
    if most is not None:
        inside &= values <= most
    # Pages far beyond the bound may break other rules first: looked at are those beside each crossing.
    crossings = numpy.flatnonzero(inside[1:] != inside[:-1])
    assert len(crossings)
    for place in crossings.tolist():
        beside = slice(place, place + 2)
        expected = ["" if within else gate.name for within in inside[beside].tolist()]
        assert done.dropped[beside] == expected


def test_every_gate_of_these_presets_has_its_pages():
    for preset, rows in FAMILIES.items():
        tested = {PREFIX.get(preset, "rpv2 ") + row[0] for row in rows}
        given_lists = {"rpv2 bad words"}  # needs a list that a user gives; see below
        assert set(gates_of(preset)) - given_lists == tested


def test_the_two_readings_of_a_copy_part():
    for copies, dclm in ((4, ""), (5, "dclm repeated lines")):
        # Of 14 lines 3 are extra and 4 duplicates; of 15 lines 4 are extra and 5 duplicates, a third.
        texts = Texts([repeated("\n")(copies)])
        done = {name: execute(load_pipeline(name).steps, texts).dropped for name in ("gopher", "dclm-pages")}
        assert done == {"gopher": [""], "dclm-pages": [dclm]}


def test_the_share_of_removed_words_from_both_sides():
    texts = Texts([one_word_lines(5), one_word_lines(6)])  # 5 of 105 and 6 of 106 words
    done = execute(load_pipeline("dclm-baseline").steps, texts)
    assert done.dropped == ["", "dclm removed words"]


@pytest.mark.parametrize(
    ("gate", "passing", "failing"),
    [
        ("dclm domains", "https://www.b.example/", "https://www.a.example/"),
        ("dclm strict urls", "https://b.example/st-ric", "https://b.example/s-t.rict"),
        ("dclm hard urls", "https://b.example/harder", "https://b.example/hard"),
        ("dclm soft urls", "https://b.example/soft", "https://b.example/soft/mild"),
    ],
)
def test_bans_by_url_from_both_sides(gate, passing, failing):
    lists = {"domains": ["a.example"], "strict": ["strict"], "hard": ["hard"], "soft": ["soft", "mild"]}
    pipeline = load_pipeline("dclm-baseline", settings={"dclm.urls": lists})
    text = page(words(100))
    done = execute(pipeline.steps, Texts([text] * 3, None, [passing, failing, ""]))
    assert done.dropped == ["", gate, ""]


def test_bad_words_of_a_list_from_both_sides(tmp_path):
    (tmp_path / "en.txt").write_text("number six\n", encoding="utf-8")
    pipeline = load_pipeline("redpajama-v2-c4", settings={"redpajama.content": {"bad_words": str(tmp_path)}})
    texts = Texts([sentence_lines(4), sentence_lines(4) + "\nThis is number six."])
    assert execute(pipeline.steps, texts).dropped == ["", "rpv2 bad words"]


def test_the_journals_and_the_preprints_c4():
    texts = Texts([sentence_lines(4), "\n".join(["Three words here."] * 5)])
    journal = execute(load_pipeline("c4").steps, texts).dropped
    changes = {"settings": {"c4.lines": {"min_words": 3}}, "gates": {"c4 sentences": {"minimum": 5}}}
    preprint = execute(load_pipeline("c4", **changes).steps, texts).dropped
    assert (journal, preprint) == (["", "c4 sentences"], ["c4 sentences", ""])


def test_all_presets_load_and_say_where_they_are_from():
    for name in preset_names():
        pipeline = load_pipeline(name)
        assert pipeline.name == name
        assert pipeline.source


def test_redpajamas_signals_decide_nothing():
    pipeline = load_pipeline("redpajama-v2")
    assert pipeline.gates() == []
    assert len(pipeline.signals()) == 31
