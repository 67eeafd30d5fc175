"""Questions with known answers: errors, gaps and duplicates planted in real tables, by seed.

A question's rows are drawn once, so no row is both asked about and shown as an example, and what was
planted is no other value of its column. Half of the questions, or the ``share`` that is asked for, are
positive. Reasons are said of what was planted or of how two rows compare.
"""

from __future__ import annotations

import difflib
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.data.tables.questions import NO, YES, Question
from puna.data.tables.rows import Row
from puna.data.tables.table import Table, febrl_people

Generator = numpy.random.Generator
ALIKE = 0.75
"""Two cells of at least this ratio of matching characters (difflib's) are called alike."""


def misspelt(value: str, generator: Generator) -> str:
    """The value with one letter swapped with the next, left out, doubled or another; never the same."""
    letters = [place for place, letter in enumerate(value) if letter.isalnum()]
    if not letters:
        raise PunaError("a value without letters or digits cannot be misspelt", found=repr(value))
    while True:
        place = letters[int(generator.integers(len(letters)))]
        before, letter, after = value[:place], value[place], value[place + 1 :]
        kind = int(generator.integers(4))
        if kind == 0 and after[:1].isalnum():
            changed = before + after[0] + letter + after[1:]
        elif kind == 1 and len(value) > 2:
            changed = before + after
        elif kind == 2:
            changed = before + letter * 2 + after
        else:
            pool = string.digits if letter.isdigit() else string.ascii_lowercase
            changed = before + pool[int(generator.integers(len(pool)))] + after
        if changed.casefold() != value.casefold():
            return changed


def error_questions(
    table: Table, columns: Sequence[str], count: int, *, share: float, seed: int
) -> list[Question]:
    """Is this cell wrong? Of ``share`` of the questions it is: its value is :func:`misspelt`."""
    generator = numpy_generator(seed, "planted errors", table.name)
    known = {column: {str(value).casefold() for value in table.values(column)} for column in columns}
    made = []
    for row, positive in zip(
        _draw(table, columns, count, generator), _flags(count, share, generator), strict=True
    ):
        column = columns[int(generator.integers(len(columns)))]
        value = str(row[column])
        if positive:
            wrong = _until(
                lambda value=value: misspelt(value, generator),  # type: ignore[misc]
                lambda text, column=column: text.casefold() not in known[column],  # type: ignore[misc]
                f"a misspelling of {value!r} that is no other value of {column}",
            )
            row = {**row, column: wrong}
            reason = f'"{wrong}" is a misspelling of "{value}".'
        else:
            reason = f'"{value}" is spelt as it should be.'
        made.append(
            Question("error_detection", (row,), column, answer=YES if positive else NO, reason=reason)
        )
    return made


def imputation_questions(
    table: Table, column: str, count: int, *, choices: int | None, seed: int
) -> list[Question]:
    """What does this empty cell hold? Of rows with one of the ``choices`` commonest values, or of all."""
    generator = numpy_generator(seed, "planted gaps", table.name)
    common = commonest(table, column, choices)
    rows = [row for row in table.rows if row[column] in common]
    made = []
    for row in _draw(Table(table.name, table.columns, rows), [column], count, generator):
        value = str(row[column])
        told = next(((name, cell) for name, cell in row.items() if name != column and cell), None)
        reason = f'{column} "{value}" goes with {told[0]} "{told[1]}".' if told else f'It is "{value}".'
        gap = {**row, column: None}
        offered = common if choices is not None else ()
        made.append(Question("imputation", (gap,), column, offered, value, reason))
    return made


def commonest(table: Table, column: str, count: int | None) -> tuple[str, ...]:
    """The ``count`` values that a column holds most often, the commonest first; all of them for None."""
    counts = Counter(value for value in table.values(column) if value is not None)
    return tuple(value for value, _ in counts.most_common(count))


def duplicate_questions(
    table: Table, columns: Sequence[str], count: int, *, share: float, edits: int, seed: int
) -> list[Question]:
    """Are these two rows the same? A duplicate is the row with ``edits`` cells misspelt or emptied."""
    generator = numpy_generator(seed, "planted duplicates", table.name)
    flags = _flags(count, share, generator)
    rows = iter(_draw(table, columns, count + flags.count(False), generator))
    made = []
    for positive in flags:
        first = next(rows)
        second = _duplicate(first, columns, edits, generator) if positive else next(rows)
        made.append(_pair("entity_matching", first, second, positive, generator))
    return made


def febrl_questions(table: Table, count: int, *, share: float, seed: int) -> list[Question]:
    """Are these two records one person? By FEBRL's true links; others are records of two persons."""
    generator = numpy_generator(seed, "true links", table.name)
    people = febrl_people(table)
    flags = _flags(count, share, generator)
    needed = count + flags.count(False)
    if len(people) < needed:
        raise _too_few(table.name, len(people), needed)
    drawn = iter([people[int(place)] for place in generator.permutation(len(people))[:needed]])
    made = []
    for positive in flags:
        records = next(drawn)
        first, second = (records[int(place)] for place in generator.permutation(len(records))[:2])
        if not positive:
            others = next(drawn)
            second = others[int(generator.integers(len(others)))]
        made.append(_pair("entity_matching", first, second, positive, generator))
    return made


def schema_questions(table: Table, count: int, *, share: float, values: int, seed: int) -> list[Question]:
    """Do these attributes mean the same? One table cut in two halves, the second's names abbreviated.

    An attribute is told by its name and ``values`` different values of its half.
    """
    generator = numpy_generator(seed, "planted schemas", table.name)
    rows = [table.rows[int(place)] for place in generator.permutation(len(table.rows))]
    halves = (rows[: len(rows) // 2], rows[len(rows) // 2 :])
    columns = [name for name in table.columns if all(any(row[name] for row in half) for half in halves)]
    if len(columns) < 2:
        raise _too_few(f"{table.name}: columns", len(columns), 2)
    made = []
    for positive in _flags(count, share, generator):
        left = columns[int(generator.integers(len(columns)))]
        others = [name for name in columns if name != left]
        right = left if positive else others[int(generator.integers(len(others)))]
        first = _attribute(left, left, halves[0], values, generator)
        second = _attribute(abbreviated(right), right, halves[1], values, generator)
        made.append(_pair("schema_matching", first, second, positive, generator))
    return made


def abbreviated(name: str) -> str:
    """A column's name as others might write it: vowels left out but for a word's first letter."""
    words = name.replace("_", " ").replace(".", " ").split()
    short = [word[0] + "".join(letter for letter in word[1:] if letter not in "aeiou") for word in words]
    return "".join(word.capitalize() for word in short)


def with_noise(questions: Sequence[Question], columns: int, seed: int) -> list[Question]:
    """The questions with so many further columns that say nothing: codes, drawn for every row anew.

    They stand at random places between the others, the same in all rows.
    """
    if not columns:
        return list(questions)
    generator = numpy_generator(seed, "noise columns")
    names = list(questions[0].records[0])
    for number in range(1, columns + 1):
        names.insert(int(generator.integers(len(names) + 1)), f"code_{number}")

    def noisy(row: Row) -> Row:
        return {
            name: row[name] if name in row else str(int(generator.integers(10**5, 10**6))) for name in names
        }

    return [replace(question, records=tuple(map(noisy, question.records))) for question in questions]


def as_examples(questions: Sequence[Question], count: int) -> list[Question]:
    """The questions, the first ``count`` of them as examples with both answers, as far as there are."""
    shown: list[int] = []
    answers = list(dict.fromkeys(question.answer for question in questions))
    places = {
        answer: [place for place, q in enumerate(questions) if q.answer == answer] for answer in answers
    }
    # In turn, so that examples are balanced and the last answer is not always the same.
    while len(shown) < count:
        for answer in answers:
            if places[answer] and len(shown) < count:
                shown.append(places[answer].pop(0))
        if not any(places.values()):
            raise _too_few("examples", len(shown), count)
    chosen = set(shown)
    examples = [replace(questions[place], role="example") for place in shown]
    return examples + [question for place, question in enumerate(questions) if place not in chosen]


def compared(first: Row, second: Row) -> str:
    """In words, which cells of two rows agree, are alike, and differ."""
    kinds: dict[str, list[str]] = {"agree": [], "are alike": [], "differ": []}
    for name in first:
        kind = agreement(first[name], second.get(name))
        if kind != "unknown":
            kinds[kind].append(name)
    said = [f"{', '.join(names)} {kind}" for kind, names in kinds.items() if names]
    return "; ".join(said)[:1].upper() + "; ".join(said)[1:] + "." if said else "Nothing can be compared."


def agreement(first: str | None, second: str | None) -> str:
    """How two cells compare: agree, are alike, differ, or unknown where one is null."""
    if first is None or second is None:
        return "unknown"
    one, other = first.casefold(), second.casefold()
    if one == other:
        return "agree"
    alike = difflib.SequenceMatcher(None, one, other, autojunk=False).ratio() >= ALIKE
    return "are alike" if alike else "differ"


def _pair(task: str, first: Row, second: Row, positive: bool, generator: Generator) -> Question:
    rows = (first, second) if generator.integers(2) else (second, first)
    reason = compared(first, second)
    if task == "schema_matching":
        same = "hold the same kind of values" if positive else "hold values of different kinds"
        reason = f"{first['name']} and {second['name']} {same}."
    answer = YES if positive else NO
    return Question(task, rows, answer=answer, reason=reason)  # type: ignore[arg-type]


def _duplicate(row: Row, columns: Sequence[str], edits: int, generator: Generator) -> Row:
    changed = dict(row)
    order = [columns[int(place)] for place in generator.permutation(len(columns))]
    for name in order[:edits]:
        value = changed[name]
        emptied = value is None or not any(letter.isalnum() for letter in value) or generator.random() < 0.2
        changed[name] = None if emptied else misspelt(str(value), generator)
    return changed


def _attribute(
    shown: str, column: str, rows: Sequence[Row], values: int, generator: Generator
) -> dict[str, str | None]:
    known = sorted({str(row[column]) for row in rows if row[column]})
    drawn = [known[int(place)] for place in generator.permutation(len(known))[:values]]
    return {"name": shown, "values": "; ".join(drawn)}


def _draw(table: Table, columns: Sequence[str], count: int, generator: Generator) -> list[Row]:
    """``count`` different rows whose cells of ``columns`` hold letters or digits."""
    for column in columns:
        table.require(column)
    usable = [row for row in table.rows if all(_readable(row[column]) for column in columns)]
    if len(usable) < count:
        raise _too_few(table.name, len(usable), count)
    return [usable[int(place)] for place in generator.permutation(len(usable))[:count]]


def _readable(value: str | None) -> bool:
    return value is not None and any(letter.isalnum() for letter in value)


def _flags(count: int, share: float, generator: Generator) -> list[bool]:
    """``count`` flags, the share of them true that comes nearest, in random order."""
    positive = round(share * count)
    flags = numpy.arange(count) < positive
    return [bool(flag) for flag in generator.permutation(flags)]


def _until(draw: Callable[[], str], fits: Callable[[str], bool], what: str) -> str:
    for _ in range(1000):
        found = draw()
        if fits(found):
            return found
    raise PunaError("nothing was found to plant", expected=what)


def _too_few(what: str, found: int, wanted: int) -> PunaError:
    return PunaError(
        "there are too few to draw from",
        where=what,
        found=found,
        expected=f"at least {wanted}",
        fix="ask fewer questions, show fewer examples, or give a larger table",
    )
