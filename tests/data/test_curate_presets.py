"""Every threshold of the presets from both sides: pages made to lie around just that one.

A family of pages grows with a number; the papers' bounds are written down here once more. Of each family
just those pages are dropped whose signal is out of bounds, by the gate that is meant and no other.
"""

from __future__ import annotations

import itertools
import string

import numpy
import pytest

from puna.data.curate.execute import execute
from puna.data.curate.gates import reduced
from puna.data.curate.pipeline import load_pipeline, preset_names
from puna.data.curate.texts import Texts


def fresh(length=5):
    """Words that never come twice."""
    return ("".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=length))


def words(count, length=5):
    """``count`` different words, beginning with four stop words."""
    return [*["the", "of", "and", "to"], *itertools.islice(fresh(length), count - 4)]


def page(items, per_line=10):
    rows = [items[at : at + per_line] for at in range(0, len(items), per_line)]
    return "\n".join(" ".join(row) for row in rows)


def many_words(k):
    return page(words(k))


def short_words(k):  # k words of 2 letters among words of 3
    return page(["the", "and", *itertools.islice(fresh(2), k), *itertools.islice(fresh(3), 60 - k)])


def long_words(k):  # words of 10 letters, k of them longer
    many = ["the", "and", *itertools.islice(fresh(10), 60)]
    return page([word + "x" * (1 < at < k) for at, word in enumerate(many)])


def marked(mark, total=60):
    def make(k):
        return page([f"{mark}{word}" if 4 <= at < k + 4 else word for at, word in enumerate(words(total))])

    return make


def numbers(k):
    return page([*words(60 - k), *map(str, range(10001, 10001 + k))])


def stop_words(*given):
    def make(k):
        return page([*given[:k], *itertools.islice(fresh(), 60)])

    return make


def with_lines(begin="", end=""):
    """Ten lines, of which k begin or end with something."""

    def make(k):
        rows = page(words(100)).split("\n")
        return "\n".join(f"{begin}{row}{end}" if at < k else row for at, row in enumerate(rows))

    return make


def repeated(separator):
    """Ten long lines, or paragraphs of three lines, and k times one short line between them."""

    def make(k):
        rows = page(words(300), 30).split("\n")
        if separator == "\n\n":
            rows = [page(row.split()) for row in rows]
        pairs = [[row, "short line"] if at < k else [row] for at, row in enumerate(rows)]
        return separator.join(itertools.chain(*pairs))

    return make


def long_lines(k):
    """Thirty lines, and twice a word of k letters alone in one."""
    rows = page(words(300)).split("\n")
    return "\n".join([*rows[:10], "x" * k, *rows[10:20], "x" * k, *rows[20:]])


def long_paragraphs(k):
    """Thirty paragraphs, and twice one of two short lines with k spaces behind the first."""
    rows, copy = page(words(300)).split("\n"), "aa" + " " * k + "\nbb"
    return "\n\n".join([*rows[:10], copy, *rows[10:20], copy, *rows[20:]])


def phrases(n, total=1200):
    """k copies of n words, always with another word between them, in a page of ``total`` words."""

    def make(k):
        source = words(total)
        phrase, others = [word + "q" for word in source[-n:]], iter(source)
        copies = itertools.chain(*([*phrase, next(others)] for _ in range(k)))
        head = list(copies)
        return page(head + list(itertools.islice(others, total - len(head))))

    return make


def gopher(counted, own):
    """Families of Gopher's rules: gate, bounds, pages, numbers."""
    return [
        ("words", (50, 100000), many_words, (49, 50, 100000, 100001)),
        ("word length", (3, None), short_words, (0, 1, 2)),
        ("word length", (None, 10), long_words, range(12, 20)),
        ("bullets", (None, 0.9), with_lines(begin="•"), (8, 9, 10)),
        ("ellipses" if own else "line ellipses", (None, 0.3), with_lines(end=" end..."), (2, 3, 4)),
        ("alphabetic words", (None, 0.2) if own else (0.8, None), numbers, (11, 12, 13)),
        ("paragraphs", (None, 0.3), repeated("\n\n"), range(10)),
        ("repeated lines", (None, 0.3), repeated("\n"), range(10)),
        ("line characters", (None, 0.2), long_lines, range(50, 1000, 25)),
        ("paragraph characters", (None, 0.2), long_paragraphs, range(50, 1000, 25)),
        *n_grams(),
    ]


def n_grams():
    tops, copies = {2: 0.2, 3: 0.18, 4: 0.16}, {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}
    return [
        *((f"top {n}-gram", (None, bound), phrases(n), range(20, 140)) for n, bound in tops.items()),
        *((f"{n}-grams", (None, bound), phrases(n), range(5, 45)) for n, bound in copies.items()),
    ]


def sentence_lines(k):
    return "\n".join(f"This is the line number {at} of some." for at in range(k))


def spoilt(spoil):
    return lambda k: "\n".join([sentence_lines(6), *[spoil] * k])


def one_word_lines(k):
    return page(words(100)) + "\n" + "\n".join(itertools.islice(fresh(6), k))


def three_lines(k):
    return "\n".join(["x" * 300, "y" * k, "z" * 300, "short"])


FAMILIES = {
    "gopher": [
        *gopher("extra", own=False),
        ("hashes", (None, 0.1), marked("#"), (5, 6, 7)),
        ("ellipses", (None, 0.1), marked("..."), (5, 6, 7)),
        ("stop words", (2, None), stop_words("the", "of"), (0, 1, 2)),
    ],
    "dclm-pages": [
        *gopher("duplicate", own=True),
        ("symbols", (None, 0.1), marked("#"), (5, 6, 7)),
        ("stop words", (2, None), stop_words("The", "THE"), (0, 1, 2)),
    ],
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
    "redpajama-v2-repetition": n_grams(),
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
