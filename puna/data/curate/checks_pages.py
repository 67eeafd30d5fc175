"""What DCLM (S33) and RedPajama-V2 (S52) claim of filters, measured: the stage ``curation_checks``.

Bounds decide as the paper says on both sides of each; steps that drop much for their cost, taken first, save
time and change no survivor; lines as spans cover a document; importance weights are the same in every
process; and corpora that should hold the same documents do.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy

from puna.core.errors import PunaError
from puna.core.stage import Context, Outcome
from puna.data.corpus import Corpus
from puna.data.curate.bound_pages import dclm_families
from puna.data.curate.checks_settings import CurationChecksParameters
from puna.data.curate.execute import execute
from puna.data.curate.gates import reduced
from puna.data.curate.learned.importance import ImportanceModel
from puna.data.curate.operator import Spans, apply_score, get_operator
from puna.data.curate.pipeline import Phase, Step, load_pipeline
from puna.data.curate.planner import plan
from puna.data.curate.texts import Texts

_BANS = "dclm.urls"  # bounds over lists of URLs that puna does not have; the tests give some
_SCORED = 200  # documents whose importance is worked out in each process
_HASH_SEEDS = ("1", "2")


def run(context: Context, parameters: CurationChecksParameters) -> Outcome:
    """Do the work of the stage."""
    corpus = Corpus.open(context.inputs["corpus"], kind="documents")
    texts = list(islice(corpus.texts(), parameters.documents))
    batches = [texts[at : at + parameters.batch] for at in range(0, len(texts), parameters.batch)]
    metrics = {"documents": float(len(texts))}
    metrics |= threshold_figures() | order_figures(parameters.preset, batches, parameters.repeats)
    metrics |= span_figures(batches)
    same = {name: Corpus.open(path) for name, path in (context.inputs.get("same") or {}).items()}
    if same:
        metrics |= same_figures(same)
    if context.inputs.get("importance") is not None:
        metrics |= importance_figures(Path(context.inputs["importance"]), texts[:_SCORED], context.out)
    return Outcome(metrics=metrics)


def threshold_figures() -> dict[str, float]:
    """Pages on both sides of each bound of ``dclm-baseline``: how many, and on how many it errs.

    A gate of the preset without a page, and a family without one on either side, count as an error each.
    """
    steps = load_pipeline("dclm-baseline").steps
    gates = {step.gate.name: step.gate for step in steps if step.gate and _BANS not in step.gate.signal}
    families = dclm_families()
    wrong, checked = len(set(gates) - {family.gate for family in families}), 0
    for family in families:
        gate = gates[family.gate]
        texts = Texts([family.make(k) for k in family.numbers])
        done = execute(steps, texts, everything=True)
        values = reduced(gate, done.signals, texts.count)
        inside = numpy.ones(texts.count, dtype=bool)
        if family.minimum is not None:
            inside &= values >= family.minimum
        if family.maximum is not None:
            inside &= values <= family.maximum
        crossings = numpy.flatnonzero(inside[1:] != inside[:-1]).tolist()
        wrong += not crossings
        # Pages far beyond a bound may break other rules first: looked at are those beside each crossing.
        for place in {beside for crossing in crossings for beside in (crossing, crossing + 1)}:
            checked += 1
            wrong += done.dropped[place] != ("" if inside[place] else gate.name)
    return {
        "thresholds.gates": float(len(gates)),
        "thresholds.checked": float(checked),
        "thresholds.wrong": float(wrong),
    }


def order_figures(preset: str, batches: Sequence[Sequence[str]], repeats: int) -> dict[str, float]:
    """A preset's scores and gates in its own order, as planned on the first batch, and dearest first.

    Processor seconds are medians of runs in turn. Documents per second of each score are those of the first
    batch, which all steps are run on as a whole.
    """
    steps = tuple(step for step in load_pipeline(preset).steps if step.kind in ("score", "gate"))
    execute(steps, Texts(batches[0]), everything=True)  # What is only done once in a process is not timed.
    whole = execute(steps, Texts(batches[0]), everything=True)
    labels = plan(Phase(0, None, steps), {label: asdict(count) for label, count in whole.counts.items()})
    by_label = {step.label: step for step in steps}
    orders = {
        "recipe": steps,
        "planned": tuple(by_label[label] for label in labels),
        "dearest": dearest_first(steps, {label: count.seconds for label, count in whole.counts.items()}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in orders}
    survivors: dict[str, list[str]] = {}
    for _ in range(repeats):
        for name, order in orders.items():
            survivors[name] = _survivors(order, batches, seconds[name])
    disagreements = sum(len(set(found)) > 1 for found in zip(*survivors.values(), strict=True))
    took = {name: max(statistics.median(times), 1e-9) for name, times in seconds.items()}
    speeds = {
        label: len(batches[0]) / max(count.seconds, 1e-9)
        for label, count in whole.counts.items()
        if by_label[label].kind == "score"
    }
    return {
        "order.disagreements": float(disagreements),
        "order.kept": float(sum(not reason for reason in survivors["recipe"])),
        "order.gain": took["dearest"] / took["planned"],
        "order.gain_over_recipe": took["recipe"] / took["planned"],
        "speed.slowest": min(speeds.values()),
        **{f"speed.{label}": speed for label, speed in speeds.items()},
    }


def dearest_first(steps: Sequence[Step], seconds: Mapping[str, float]) -> tuple[Step, ...]:
    """The scores by what they take, the dearest first, each followed by the gates that it settles."""
    order: list[Step] = []
    for score in sorted((s for s in steps if s.kind == "score"), key=lambda s: -seconds[s.label]):
        order.append(score)
        stored = {name for step in order for name in step.columns()}
        for step in steps:
            if step.gate is not None and step not in order and stored.issuperset(step.gate.signals()):
                order.append(step)
    return tuple(order)


def _survivors(steps: Sequence[Step], batches: Sequence[Sequence[str]], times: list[float]) -> list[str]:
    """ "" for each document that is kept and "dropped" for the others; the seconds are added to ``times``."""
    total, found = 0.0, []
    for batch in batches:
        texts = Texts(batch)
        started = time.process_time()
        done = execute(steps, texts)
        total += time.process_time() - started
        found += ["dropped" if reason else "" for reason in done.dropped]
    times.append(total)
    return found


def span_figures(batches: Sequence[Sequence[str]]) -> dict[str, float]:
    """Documents whose lines as spans leave a gap, overlap, or end elsewhere than the document."""
    operator = get_operator("score", "redpajama.lines")
    broken = spans = 0
    for batch in batches:
        texts = Texts(batch)
        for values in apply_score(operator, texts, operator.settings()).values():
            assert isinstance(values, Spans)
            spans += len(values.values)
            broken += sum(not good for good in tiles(values, texts.lengths.tolist()))
    return {"spans.broken": float(broken), "spans.lines": float(spans)}


def tiles(spans: Spans, lengths: Sequence[int]) -> list[bool]:
    """For each document of ``lengths`` characters, whether its spans cover it once, in order."""
    bounds = numpy.searchsorted(spans.document, numpy.arange(len(lengths) + 1))
    good = []
    for document, length in enumerate(lengths):
        own = slice(bounds[document], bounds[document + 1])
        ends = [0, *spans.ends[own].tolist()]
        good.append(spans.starts[own].tolist() == ends[:-1] and ends[-1] == length)
    return good


def same_figures(corpora: Mapping[str, Corpus]) -> dict[str, float]:
    """Documents that one of the corpora has and another has not, or with another text."""
    held: list[set[tuple[str, str]]] = [
        {(row["id"], row["text"]) for row in corpus.rows()} for corpus in corpora.values()
    ]
    return {"same.differing": float(len(held[0].union(*held[1:]) - held[0].intersection(*held[1:])))}


def importance_figures(model: Path, texts: Sequence[str], out: Path) -> dict[str, float]:
    """Documents whose importance is another one in a process whose string hashes are seeded otherwise."""
    file = out / "texts.npy"
    numpy.save(file, numpy.array([text.encode("utf-8", "surrogatepass").hex() for text in texts]))
    mine = score_digests(model, file)
    differing = 0
    for seed in _HASH_SEEDS:
        code = f"from {__name__} import score_digests; print(*score_digests({str(model)!r}, {str(file)!r}))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=False,
        )
        if done.returncode:
            raise PunaError("scoring in another process failed", found=done.stderr.strip()[-300:])
        differing += sum(one != other for one, other in zip(mine, done.stdout.split(), strict=True))
    file.unlink()
    return {"importance.differing": float(differing), "importance.documents": float(len(texts))}


def score_digests(model: Path | str, file: Path | str) -> list[str]:
    """A digest of each text's two importance scores, to the bit."""
    texts = Texts([bytes.fromhex(text).decode("utf-8", "surrogatepass") for text in numpy.load(file)])
    columns = numpy.stack(ImportanceModel.load(model).scores(texts), axis=1)
    return [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in columns]
