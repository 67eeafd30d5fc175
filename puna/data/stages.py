"""The stages of this room: ``corpus`` (sources -> corpus), ``curate`` (sources -> pool of documents with
signals -> corpus of those that pass), ``sample`` (corpus -> part of it),
``infill`` (documents -> documents with their middle last),
``task_mixture`` (corpora of tasks -> so many conversations of each),
``next_word_labels`` (words that a rule labels),
``instructions`` (pairs, chats -> messages), ``preferences`` (messages -> pairs of answers), ``planted``
(documents -> questions whose answer is known), ``table_questions`` (a table -> questions about it),
the checks of claims, ``duplicate_checks``, ``curation_checks``, ``juicer_checks`` and ``setu_checks``; what
learns models that score documents stands in ``curate.learned.stages``."""

from __future__ import annotations

from typing import Any

from puna.core.errors import PunaError
from puna.core.stage import Context, Cost, Input, Kind, Outcome, stage
from puna.data.curate.checks_settings import (
    CurationChecksParameters,
    JuicerChecksParameters,
    SetuChecksParameters,
)
from puna.data.curate.duplicates.settings import DuplicateChecksParameters
from puna.data.curate.learned import stages as learned_stages  # noqa: F401  registers its stages
from puna.data.curate.settings import CurateParameters
from puna.data.next_word import NextWordParameters
from puna.data.settings import (
    CorpusParameters,
    InfillParameters,
    InstructionsParameters,
    PlantedParameters,
    PreferencesParameters,
    SampleParameters,
    TaskMixtureParameters,
)
from puna.data.sources.files import FileSettings
from puna.data.tables.settings import TableQuestions
from puna.data.web_archive import WebArchiveParameters

# Rough rates, for plans only.
_BYTES_PER_TOKEN = 4
_BYTES_PER_DRAWN_TOKEN = 2.5  # text in a language the tokenizer was not made for
_TOKENS_PER_SECOND = 30_000
_CURATED_TOKENS_PER_SECOND = 500_000
_CURATION_MEMORY = 1.5e9  # bytes, two processes
_SIDES: dict[str, Kind] = {"train": "corpus", "held_out": "corpus"}


def _corpus_cost(parameters: CorpusParameters, shapes: Any) -> Cost:
    """What the recipe expects of the text, or else what the sizes of plain files of it tell."""
    tokens: dict[str, float] = {side: float(n) for side, n in parameters.expected_tokens.items()}
    if "train" not in tokens:
        for source in parameters.sources:
            if not isinstance(source, FileSettings):
                raise PunaError(
                    "a plan cannot know how much text this source gives",
                    where=source.title,
                    fix="say it in the recipe: expected_tokens: {train: ...}",
                )
        sizes = (file.stat().st_size for source in parameters.sources for file in source.files())
        tokens["train"] = sum(sizes) / _BYTES_PER_TOKEN
    total = sum(tokens.values())
    return Cost(tokens=total, seconds=total / _TOKENS_PER_SECOND, corpora=tokens, kind=parameters.kind)


def _instructions_cost(parameters: InstructionsParameters, shapes: Any) -> Cost:
    """As many tokens as the recipe expects, or as the corpora hold that go in."""
    return Cost(
        tokens=parameters.expected_tokens or shapes.tokens,
        seconds=shapes.tokens / _TOKENS_PER_SECOND,
        kind="messages",
    )


@stage(
    "corpus",
    parameters=CorpusParameters,
    outputs=_SIDES,
    plan=_corpus_cost,
    reads=CorpusParameters.files,
)
def corpus(context: Context, parameters: CorpusParameters) -> Outcome:
    """Read sources into a corpus, split by source document and checked for leaks.

    Time grows linearly with the text; memory holds a hash per row and per held-out run of words.
    """
    from puna.data.build import build

    return build(parameters, context.out, seed=context.seed).outcome(context.report)


def _sample_cost(parameters: SampleParameters, shapes: Any) -> Cost:
    """As many tokens as the recipe expects or the bytes drawn usually make, and not more than there are."""
    drawn = shapes.tokens if parameters.bytes is None else parameters.bytes / _BYTES_PER_DRAWN_TOKEN
    drawn = parameters.expected_tokens or parameters.tokens or drawn
    drawn = min(shapes.tokens, drawn)
    return Cost(
        tokens=drawn,
        corpora={"corpus": drawn, "rest": shapes.tokens - drawn},
        seconds=shapes.tokens / _TOKENS_PER_SECOND,
        kind=shapes.kinds.get("corpus"),
    )


@stage(
    "sample",
    parameters=SampleParameters,
    inputs={"corpus": Input("corpus"), "tokenizer": Input("tokenizer", optional=True)},
    outputs={"corpus": "corpus", "rest": "corpus"},
    plan=_sample_cost,
)
def sample(context: Context, parameters: SampleParameters) -> Outcome:
    """Draw part of a corpus by bytes, rows or tokens, for stages that must learn from equally much.

    What was not drawn is the output ``rest``, where there is something; a cut document's end is nowhere.
    Time grows linearly with the corpus; memory holds a number per row.
    """
    from puna.data.corpus import Corpus
    from puna.data.describe import counts_table, metrics
    from puna.data.leak import LeakCheck
    from puna.data.sample import draw_sample
    from puna.text.pretrained import required_tokenizer

    seed = context.seed if parameters.seed is None else parameters.seed
    source = Corpus.open(context.inputs["corpus"])
    where = context.inputs.get("tokenizer")
    tokenizer = None if where is None else required_tokenizer(where)
    found = draw_sample(source, parameters, context.out, seed=seed, tokenizer=tokenizer)
    drawn = found.corpus
    context.report.setdefault("tables", []).append(counts_table({"drawn": drawn}))
    figures = metrics({"drawn": drawn}, LeakCheck())
    if found.tokens is not None:
        figures["tokens"] = float(found.tokens)
    outputs = {"corpus": drawn.path} | ({"rest": found.rest.path} if found.rest is not None else {})
    return Outcome(outputs, figures)


def _infill_cost(parameters: InfillParameters, shapes: Any) -> Cost:
    """As many tokens as the recipe expects, or every document once for each epoch."""
    tokens = parameters.expected_tokens or parameters.epochs * shapes.tokens
    return Cost(tokens=tokens, seconds=tokens / _TOKENS_PER_SECOND, kind="documents")


@stage(
    "infill",
    parameters=InfillParameters,
    inputs={"corpus": Input("corpus")},
    outputs={"corpus": "corpus"},
    plan=_infill_cost,
)
def infill(context: Context, parameters: InfillParameters) -> Outcome:
    """Put the middle of documents last, between markers, with cuts drawn anew for every epoch (S46).

    Time grows linearly with text times epochs; memory holds a few bytes per document.
    """
    from puna.data.infilling import run

    return run(context, parameters)


def _task_mixture_cost(parameters: TaskMixtureParameters, shapes: Any) -> Cost:
    """As many tokens as the recipe expects or the caps let through, and not more than there are."""
    caps = [cap.tokens for cap in parameters.caps.values()]
    capped = float(sum(tokens or 0 for tokens in caps)) if None not in caps else shapes.tokens
    return Cost(
        tokens=parameters.expected_tokens or min(shapes.tokens, capped),
        seconds=shapes.tokens / _TOKENS_PER_SECOND,
        kind="messages",
    )


@stage(
    "task_mixture",
    parameters=TaskMixtureParameters,
    inputs={
        "corpora": Input("corpus", many=True),
        "held_out": Input("corpus", many=True, optional=True),
        "model": Input("model", optional=True),
    },
    outputs={"corpus": "corpus"},
    plan=_task_mixture_cost,
)
def task_mixture(context: Context, parameters: TaskMixtureParameters) -> Outcome:
    """Draw so many conversations of each source, its tasks in turn, none of them cut or lost (S73).

    Time grows linearly with the corpora, which are read twice; memory holds a few numbers per row.
    """
    from puna.data.task_mixture import run

    return run(context, parameters)


@stage(
    "instructions",
    parameters=InstructionsParameters,
    inputs={
        "pairs": Input("corpus", many=True, optional=True),
        "messages": Input("corpus", many=True, optional=True),
        "held_out": Input("corpus", many=True, optional=True),
    },
    outputs=_SIDES,
    plan=_instructions_cost,
)
def instructions(context: Context, parameters: InstructionsParameters) -> Outcome:
    """Make conversations out of sentence pairs and mix in corpora of conversations.

    Time and memory grow linearly with the number of rows, which are held in memory to be shuffled.
    """
    from puna.data.instructions import build_instructions

    return build_instructions(parameters, context.inputs, context.out, seed=context.seed).outcome(
        context.report
    )


def _preferences_cost(parameters: PreferencesParameters, shapes: Any) -> Cost:
    """As many tokens as the recipe expects, or both answers with their prompts twice what goes in."""
    expected = parameters.expected_tokens
    tokens: dict[str, float] = {
        "train": expected.get("train", 2 * shapes.tokens_of("messages")),
        "held_out": expected.get("held_out", 2 * shapes.tokens_of("held_out")),
    }
    total = sum(tokens.values())
    seconds = total / _TOKENS_PER_SECOND
    return Cost(tokens=total, seconds=seconds, corpora=tokens, kind="preferences")


@stage(
    "preferences",
    parameters=PreferencesParameters,
    inputs={
        "messages": Input("corpus", many=True),
        "pairs": Input("corpus", many=True, optional=True),
        "held_out": Input("corpus", many=True, optional=True),
    },
    outputs=_SIDES,
    plan=_preferences_cost,
)
def preferences(context: Context, parameters: PreferencesParameters) -> Outcome:
    """Make preference pairs out of conversations: their last answer, and a spoilt one that is rejected.

    Time and memory grow linearly with the number of conversations, which are held in memory.
    """
    from puna.data.preferences import build_preferences, corruptions_table

    built = build_preferences(parameters, context.inputs, context.out, seed=context.seed)
    outcome = built.outcome(context.report)
    context.report["tables"].append(corruptions_table(built.corpora))
    return outcome


def _planted_cost(parameters: PlantedParameters, shapes: Any) -> Cost:
    """As many tokens as the recipe expects, or as the texts' characters usually make."""
    tokens = parameters.expected_tokens or parameters.rows * parameters.characters / _BYTES_PER_TOKEN
    return Cost(tokens=float(tokens), seconds=shapes.tokens / _TOKENS_PER_SECOND, kind="messages")


@stage(
    "planted",
    parameters=PlantedParameters,
    inputs={"corpus": Input("corpus")},
    outputs={"corpus": "corpus"},
    plan=_planted_cost,
)
def planted(context: Context, parameters: PlantedParameters) -> Outcome:
    """Plant facts in documents and ask about them: conversations whose answer is known.

    Time and memory grow linearly with the number of documents, which are held in memory.
    """
    from puna.data.corpus import Corpus, write_corpus
    from puna.data.instructions import inherited
    from puna.data.planted import Planter

    source = Corpus.open(context.inputs["corpus"], kind="documents")
    planter = Planter(parameters, context.seed)
    made = write_corpus(
        context.out / "corpus",
        "messages",
        planter.rows(source),
        provenance=inherited([source]),
        ledger=planter.ledger,
    )
    counts = made.meta["counts"]
    figures = {"rows": float(counts["rows"]), "words": float(counts["words"])}
    return Outcome({"corpus": made.path}, figures)


def _next_word_cost(parameters: NextWordParameters, shapes: Any) -> Cost:
    """As many tokens as the recipe expects, or a token for each word of rows of middle length."""
    middle = (parameters.shortest + parameters.longest) / 2
    tokens = {"train": parameters.rows * middle, "held_out": parameters.held_out_rows * middle}
    tokens |= {str(side): float(count) for side, count in parameters.expected_tokens.items()}
    return Cost(tokens=sum(tokens.values()), seconds=1.0, corpora=tokens, kind="labelled_words")


@stage(
    "next_word_labels",
    parameters=NextWordParameters,
    outputs=_SIDES,
    plan=_next_word_cost,
)
def next_word_labels(context: Context, parameters: NextWordParameters) -> Outcome:
    """Draw words that are labelled by the word behind them: a test of who looks ahead (S14, S75).

    Time and memory grow linearly with the number of rows.
    """
    from puna.data.corpus import write_corpus
    from puna.data.next_word import next_word_rows

    outputs, figures = {}, {}
    for side in _SIDES:
        rows = next_word_rows(parameters, side, context.seed)
        about = [{"source": "next_word", "licence": "CC0-1.0"}]
        made = write_corpus(context.out / side, "labelled_words", rows, provenance=about, ledger={})
        outputs[side] = made.path
        figures[f"rows.{side}"] = float(made.count)
        figures[f"marked.{side}"] = made.meta["labels"].get("B-MARK", 0) / sum(made.meta["labels"].values())
    return Outcome(outputs, figures)


@stage(
    "table_questions",
    parameters=TableQuestions,
    outputs={"questions": "file"},
    plan=lambda parameters, shapes: Cost(tokens=0.0),
    reads=TableQuestions.files,
)
def table_questions(context: Context, parameters: TableQuestions) -> Outcome:
    """Make questions about a table: of errors, gaps, attributes or duplicates, planted or as they are (S71).

    One JSON line a question, for the stage ``ask_tables``. Time and memory grow linearly with the table.
    """
    from puna.data.tables.making import run

    return run(context, parameters)


def _curate_cost(parameters: CurateParameters, shapes: Any) -> Cost:
    """As many tokens as are expected, or as plain files hold before anything is dropped, or as the corpus."""
    tokens = float(parameters.expected_tokens or 0)
    if not tokens:
        sizes = [file.stat().st_size for file in parameters.files() if file.suffix != ".yaml"]
        tokens = sum(sizes) / _BYTES_PER_TOKEN or shapes.tokens
    seconds = tokens / _CURATED_TOKENS_PER_SECOND
    return Cost(tokens=tokens, seconds=seconds, memory=_CURATION_MEMORY, kind="documents")


@stage(
    "curate",
    parameters=CurateParameters,
    inputs={
        "corpus": Input("corpus", optional=True),
        "archive": Input("file", optional=True),
        "pool": Input("state", optional=True),
        "models": Input("file", many=True, optional=True),
    },
    outputs={"corpus": "corpus", "pool": "state"},
    plan=_curate_cost,
    reads=CurateParameters.files,
    resumes="work",
)
def curate(context: Context, parameters: CurateParameters) -> Outcome:
    """Take documents through a pipeline of operators and gates; what passes is a corpus.

    An ``archive`` is a WARC file. ``models`` are files for steps with a setting ``model``, under the name of
    the operator with _ for its point: ``models: {quality_fasttext: classifier}``.

    Time grows linearly with the text, and with the processes that share it; memory is that of a batch for
    each, plus what global operators say they need.
    """
    from puna.data.curate.stage import run

    return run(context, parameters)


@stage("web_archive", parameters=WebArchiveParameters, outputs={"archive": "file"})
def web_archive(context: Context, parameters: WebArchiveParameters) -> Outcome:
    """Write HTML pages of packages into a WARC file, as a crawler writes what it fetched.

    Time grows linearly with the pages; memory holds one.
    """
    from puna.data.web_archive import write_web_archive

    file = context.out / "pages.warc.gz"
    context.out.mkdir(parents=True, exist_ok=True)
    return Outcome({"archive": file}, write_web_archive(parameters, file))


@stage(
    "duplicate_checks",
    parameters=DuplicateChecksParameters,
    plan=lambda parameters, shapes: Cost(tokens=0.0, seconds=10.0),
)
def duplicate_checks(context: Context, parameters: DuplicateChecksParameters) -> Outcome:
    """Measure what is promised of duplicates: bands, the curve of what is found, filters, clusters, copies.

    Time grows linearly with what is drawn; it takes seconds.
    """
    from puna.data.curate.duplicates.checks import checks

    return Outcome(metrics=checks(parameters, context.seed))


@stage(
    "curation_checks",
    parameters=CurationChecksParameters,
    inputs={
        "corpus": Input("corpus"),
        "same": Input("corpus", many=True, optional=True),
        "importance": Input("file", optional=True),
    },
)
def curation_checks(context: Context, parameters: CurationChecksParameters) -> Outcome:
    """Measure what filters promise: bounds from both sides, orders of steps, spans, scores elsewhere.

    Corpora under ``same`` should hold the same documents. ``importance`` is a model of the stage
    ``importance_model``. Time grows linearly with the documents times the repeats.
    """
    from puna.data.curate.checks_pages import run

    return run(context, parameters)


@stage("juicer_checks", parameters=JuicerChecksParameters, inputs={"corpus": Input("corpus")})
def juicer_checks(context: Context, parameters: JuicerChecksParameters) -> Outcome:
    """Measure what Data-Juicer claims: orders, shared words, stored signals, Pareto's rule, duplicates.

    Time grows with the documents times the orders; memory is that of the documents and a batch.
    """
    from puna.data.curate.checks_juicer import run

    return run(context, parameters)


@stage("setu_checks", parameters=SetuChecksParameters, inputs={"corpora": Input("corpus", many=True)})
def setu_checks(context: Context, parameters: SetuChecksParameters) -> Outcome:
    """Measure what Setu claims: limits by language from both sides, a vote on languages, boxes of pages.

    Corpora are given under their languages' tags. Time grows linearly with the lines.
    """
    from puna.data.curate.checks_setu import run

    return run(context, parameters)
