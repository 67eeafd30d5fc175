"""The stage ``feed_forward_skip``: a plan out of calibration, judged beside other ways to do as little."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from puna.core.stage import Context, Outcome
from puna.data.corpus import Corpus
from puna.decode.feed_forward_skipping import write_plan
from puna.decode.respond import asked, open_messages
from puna.decode.routing_stages import require_rows
from puna.decode.skip_measures import (
    Reading,
    Text,
    block_cosines,
    calibrate,
    least_needed_blocks,
    operations_error,
    read_texts,
    step_times,
    without_blocks,
)
from puna.model.feed_forward_skip import FeedForwardSkip, SkipPlan, plan_skip
from puna.model.paged import BLOCK
from puna.model.steppers import make_stepper
from puna.text import pretrained
from puna.text.encode import encode_prompt

if TYPE_CHECKING:
    from puna.decode.routing_stages import FeedForwardSkipStage
    from puna.model.llama import Llama


def run(context: Context, parameters: FeedForwardSkipStage) -> Outcome:
    """Calibrate, choose, compare, time."""
    model = pretrained.load(context.inputs["model"], dtype=context.dtype, device=context.device).eval()
    every = _texts(context, parameters, model)
    calibration, held_out = every[: parameters.calibration_rows], every[parameters.calibration_rows :]
    cosines = calibrate(model, calibration)
    candidate, cost = _candidate(model, calibration, cosines, parameters)
    plan = _judged(candidate, cost, parameters)
    metrics = {
        "nothing_to_skip": float(plan.skip is None),
        "cosine.first": plan.cosines[0],
        "cosine.largest": max(plan.cosines),
    }
    table: dict[str, Reading] = {"in full": read_texts(model, held_out, None)}
    if candidate.skip is not None:
        metrics["calibration_rise"] = cost
        metrics |= _compare(model, calibration, held_out, candidate.skip, parameters, table)
        metrics |= _exact(model, held_out, candidate.skip)
        texts = held_out[: parameters.timed_rows]
        skips = [None, candidate.skip]
        room = 2 * max(len(ids) + BLOCK for ids, _ in texts)
        stepper = make_stepper(model, cache_tokens=room, kernels=parameters.kernels)
        full, skipping = step_times(stepper, texts, parameters.timed_tokens, skips, parameters.timed_rounds)
        metrics |= {"seconds.full": full, "seconds.skip": skipping, "time_saved": 1 - skipping / full}
    context.report["tables"] = [_table(table), _layers(plan)]
    return Outcome({"plan": write_plan(plan, context.out / "plan.json")}, metrics)


def _texts(context: Context, parameters: FeedForwardSkipStage, model: Llama) -> list[Text]:
    """Conversations up to the end of the assistant's last turn; its first tokens belong to the beginning."""
    corpus = Corpus.open(context.inputs["corpus"])
    assert model.tokenizer is not None and model.template is not None
    texts: list[Text] = []
    for row in open_messages(corpus, None):
        if row["messages"][-1]["role"] != "assistant":
            continue
        prompt = encode_prompt(model.tokenizer, model.template, asked(row))
        answer = model.tokenizer.encode_continuation(row["messages"][-1]["content"])
        if len(answer) >= parameters.warm_up + 8:
            texts.append(([*prompt, *answer], len(prompt) + parameters.warm_up))
    require_rows(len(texts), parameters.rows, corpus.path)
    return texts[: parameters.rows]


def _candidate(
    model: Llama, texts: list[Text], cosines: torch.Tensor, parameters: FeedForwardSkipStage
) -> tuple[SkipPlan, float]:
    """Cold ends and threshold that cost least on the calibration texts, and that cost in nats a token."""
    full = read_texts(model, texts, None).loss
    found: list[tuple[float, SkipPlan]] = []
    for cold, percentile in itertools.product(parameters.cold_ends, parameters.percentiles):
        plan = plan_skip(
            cosines,
            share=parameters.share,
            cold=cold,
            percentile=percentile,
            saturated=parameters.saturated,
        )
        if plan.skip is None:
            found.append((math.inf, plan))
        elif (reached := _reaching(model, texts, plan, parameters.share)) is not None:
            found.append((reached[1].loss - full, reached[0]))
    cost, best = min(found, key=lambda each: each[0], default=(math.inf, _unreachable(cosines, parameters)))
    return best, cost


def _reaching(
    model: Llama, texts: list[Text], plan: SkipPlan, share: float
) -> tuple[SkipPlan, Reading] | None:
    """The plan with the smallest budget that leaves out nine tenths of the share; None if none does.

    What is skipped changes the cosines behind it, so that the plan's own expectation is often missed.
    """
    assert plan.skip is not None
    for budget in range(plan.skip.budget, plan.skip.last - plan.skip.first + 1):
        skip = replace(plan.skip, budget=budget)
        reading = read_texts(model, texts, skip)
        if reading.share >= 0.9 * share:
            return replace(plan, skip=skip, expected_share=reading.share), reading
    return None


def _unreachable(cosines: torch.Tensor, parameters: FeedForwardSkipStage) -> SkipPlan:
    means = tuple(float(mean) for mean in cosines.double().mean(1))
    return SkipPlan(None, 0.0, means, f"no threshold leaves out a share of {parameters.share:g} of all")


def _judged(candidate: SkipPlan, cost: float, parameters: FeedForwardSkipStage) -> SkipPlan:
    """The candidate, or nothing to skip if it costs too much."""
    if candidate.skip is None or cost <= parameters.tolerance:
        return candidate
    reason = (
        f"leaving out {parameters.share:.0%} costs {cost:.3f} nats a token on the calibration texts, "
        f"more than {parameters.tolerance:g}"
    )
    return SkipPlan(None, 0.0, candidate.cosines, reason)


def _compare(
    model: Llama,
    calibration: list[Text],
    held_out: list[Text],
    skip: FeedForwardSkip,
    parameters: FeedForwardSkipStage,
    table: dict[str, Reading],
) -> dict[str, float]:
    """Losses on the held-out texts with the skip, random ones, and whole layers dropped."""
    layers = len(model.spec.blocks)
    table["skipping"] = read_texts(model, held_out, skip)
    share = table["skipping"].share
    before, behind = parameters.cold_ends[0]
    middle = layers - before - behind
    random = FeedForwardSkip(
        before, layers - behind - 1, rule="random", share=min(1.0, share * layers / middle)
    )
    table["random skips"] = read_texts(model, held_out, random)
    count = max(1, int(share * layers))  # the fewest whole layers: the baseline's advantage
    turned = block_cosines(model, [ids for ids, _ in calibration])
    options = []
    for blocks in least_needed_blocks(turned, count):
        with without_blocks(model, blocks):
            options.append((read_texts(model, calibration, None).loss, blocks))
    dropped = min(options)[1]
    with without_blocks(model, dropped):
        table[f"layers {', '.join(map(str, dropped))} dropped"] = whole = read_texts(model, held_out, None)
    full = table["in full"].loss
    return {
        "share": share,
        "share.random": table["random skips"].share,
        "share.layers": count / layers,
        "nll.full": full,
        "rise.skip": table["skipping"].loss - full,
        "rise.random": table["random skips"].loss - full,
        "rise.layers": whole.loss - full,
        "first": skip.first,
        "last": skip.last,
        "threshold": skip.threshold,
        "budget": skip.budget,
    }


def _exact(model: Llama, texts: list[Text], skip: FeedForwardSkip) -> dict[str, float]:
    """The invariants: a threshold above 1 changes no bit, caches are whole, operations are those counted."""
    ids, start = texts[0]
    never = FeedForwardSkip(skip.first, skip.last, 1.5)
    full = read_texts(model, [(ids, start)], None)
    same = read_texts(model, [(ids, start)], never)
    return {
        "neutral_difference": abs(full.losses[0] - same.losses[0]) + same.skipped,
        "cache_difference": max(read_texts(model, texts, each).stored for each in (None, skip)),
        "operations_error": operations_error(model, ids, start, skip),
    }


def _table(table: dict[str, Reading]) -> dict[str, Any]:
    full = table["in full"].loss
    rows = [
        [name, f"{reading.share:.3f}", f"{reading.loss:.3f}", f"{reading.loss - full:+.3f}"]
        for name, reading in table.items()
    ]
    columns = ["", "feed-forwards skipped", "nats a token", "rise"]
    return {"title": "Held-out answers", "columns": columns, "rows": rows}


def _layers(plan: SkipPlan) -> dict[str, Any]:
    rows = [[layer, f"{cosine:.4f}"] for layer, cosine in enumerate(plan.cosines)]
    return {
        "title": "Mean cosine of the stream before and after each feed-forward",
        "columns": ["layer", "cosine"],
        "rows": rows,
        "note": plan.reason,
    }
