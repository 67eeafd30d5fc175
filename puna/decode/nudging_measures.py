"""What nudging does to a base: how many tokens come from the nudger, and whether answers end properly."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.seeds import numpy_generator
from puna.core.stage import Context, Outcome
from puna.data.corpus import Corpus
from puna.decode.engine import Completion, Engine
from puna.decode.nudging import NudgingSettings, plain_prompt, without_trailing_repeats
from puna.decode.respond import asked, open_messages
from puna.decode.routing_stages import require_rows
from puna.decode.sampling import Sampling
from puna.decode.text_view import TextView
from puna.text import pretrained

if TYPE_CHECKING:
    from puna.decode.routing_stages import NudgingStage
    from puna.model.llama import Llama
    from puna.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Nudged:
    """Answers at one confidence: shares of tokens by the nudger and of answers that ended properly."""

    completions: list[Completion]

    @property
    def share(self) -> float:
        """Share of the tokens, in the base's vocabulary, that the nudger wrote."""
        rows = [row for completion in self.completions for row in completion.trace]
        return sum(row.source == "nudge" for row in rows) / len(rows)

    @property
    def stops(self) -> float:
        """Share of the answers that ended because their writer stopped, not at a limit."""
        return stops(self.completions)

    @property
    def repeats(self) -> float:
        """Share of the answers that end in a repeat of 30 characters or more."""
        texts = [completion.text for completion in self.completions]
        return sum(without_trailing_repeats(text) != text for text in texts) / len(texts)


def stops(completions: Sequence[Completion]) -> float:
    """Share of texts that ended with a stop."""
    return sum(completion.finish_reason == "stop" for completion in completions) / len(completions)


class Bench:
    """A base, a nudger and conversations to answer, greedily."""

    def __init__(
        self,
        base: Llama,
        nudger: Llama,
        conversations: Sequence[Messages],
        settings: NudgingSettings,
        tokens: int,
    ) -> None:
        self.base = Engine(base, models={settings.nudger: nudger})
        self.nudger = Engine(nudger)
        self.conversations, self.settings, self.tokens = list(conversations), settings, tokens

    def nudged(self, **changes: Any) -> Nudged:
        """The answers with these changes of the settings."""
        chosen = {"name": "nudging", **self.settings.model_dump(), **changes}
        return Nudged(self.base.generate(self.conversations, Sampling(max_tokens=self.tokens), chosen))

    def plain(self) -> list[Completion]:
        """The base's own answers to its plain prompts."""
        prompts = [self._plain(conversation) for conversation in self.conversations]
        return self.base.generate(prompts, Sampling(max_tokens=self.tokens))

    def own(self) -> list[Completion]:
        """The nudger's own answers."""
        return self.nudger.generate(self.conversations, Sampling(max_tokens=self.tokens))

    def forced_then_greedy(self, found: Nudged) -> float:
        """Of answers at confidence 0, the share that is a forced word and then the base's greedy tokens.

        The comparison goes as far as the base would go on itself.
        """
        prompts, forced = [], []
        for conversation, completion in zip(self.conversations, found.completions, strict=True):
            sources = [row.source for row in completion.trace]
            forced.append(sources.index("base") if "base" in sources else len(sources))
            prompts.append([*self.base.encode(self._plain(conversation)), *completion.ids[: forced[-1]]])
        greedy = self.base.generate(prompts, Sampling(max_tokens=self.tokens))
        return sum(map(_goes_on_as, found.completions, forced, greedy)) / len(prompts)

    def _plain(self, conversation: Messages) -> str:
        return plain_prompt(conversation, self.settings.base_prompt)


def _goes_on_as(found: Completion, forced: int, own: Completion) -> bool:
    """Whether ``found`` holds the base's ``own`` tokens behind ``forced`` ones, and tells them as its."""
    rest = found.ids[forced:]
    count = min(len(rest), len(own.ids) - (own.finish_reason == "stop"))
    writers = {row.source for row in found.trace[forced : forced + count]}
    return own.ids[:count] == rest[:count] and writers <= {"base"}


def same_text(found: Sequence[Completion], own: Sequence[Completion]) -> float:
    """Share of texts of which one is the beginning of the other: limits count tokens of two vocabularies."""
    pairs = [(one.text, other.text) for one, other in zip(found, own, strict=True)]
    return sum(one.startswith(other) or other.startswith(one) for one, other in pairs) / len(pairs)


def broken_round_trips(texts: Sequence[str], tokenizers: Sequence[Tokenizer], seed: int) -> int:
    """How many texts change when they grow piece by piece through the vocabularies in turn.

    A text is cut at random characters; after each piece every vocabulary takes the text over from the
    one before, as its tokens spell it.
    """
    broken = 0
    for number, text in enumerate(texts):
        generator = numpy_generator(seed, "round trip", number)
        cuts = sorted({int(cut) for cut in generator.integers(1, max(2, len(text)), 8)} | {len(text)})
        views = [TextView(tokenizer) for tokenizer in tokenizers]
        said, start = "", 0
        for cut in cuts:
            said += text[start:cut]
            start = cut
            for view, tokenizer in zip(views, tokenizers, strict=True):
                view.follow(said)
                said = tokenizer.decode(view.ids)
        broken += said != text
    return broken


def run(context: Context, parameters: NudgingStage) -> Outcome:
    """The stage ``nudging``."""
    base, nudger = (
        pretrained.load(context.inputs[name], dtype=context.dtype, device=context.device)
        for name in ("base", "nudger")
    )
    corpus = Corpus.open(context.inputs["corpus"])
    rows = open_messages(corpus, None)
    require_rows(len(rows), parameters.rows, corpus.path)
    settings = NudgingSettings(
        base_prompt=parameters.base_prompt,
        nudge_tokens=parameters.nudge_tokens,
        repeat_rule=parameters.repeat_rule,
    )
    before = [{"role": "system", "content": parameters.instruction}] if parameters.instruction else []
    conversations = [[*before, *asked(row)] for row in rows[: parameters.rows]]
    bench = Bench(base, nudger, conversations, settings, parameters.max_tokens)
    plain, own = bench.plain(), bench.own()
    metrics = {"stops.base": stops(plain), "stops.nudger": stops(own)}
    found = {confidence: bench.nudged(confidence=confidence) for confidence in parameters.confidences}
    for confidence, nudged in found.items():
        metrics |= {
            f"share.{confidence:g}": nudged.share,
            f"stops.{confidence:g}": nudged.stops,
            f"repeats.{confidence:g}": nudged.repeats,
        }
    shares = [nudged.share for nudged in found.values()]
    metrics["largest_fall_of_share"] = max(
        (before - after for before, after in itertools.pairwise(shares)), default=0.0
    )
    judged = found[parameters.judged_at]
    metrics |= {"share": judged.share, "stops": judged.stops}
    metrics["forced_then_greedy"] = bench.forced_then_greedy(bench.nudged(confidence=0.0, repeat_rule=False))
    always = bench.nudged(confidence=1.1, prefix_rule=False, same_nudges=1000)
    metrics["nudgers_own"] = same_text(always.completions, own)
    vocabularies = [model.tokenizer for model in (base, nudger) if model.tokenizer is not None]
    if "tokenizer" in context.inputs:
        further = pretrained.read_tokenizer(Path(context.inputs["tokenizer"]))
        assert further is not None
        vocabularies.append(further)
    texts = [message["content"] for row in rows for message in row["messages"]][: parameters.round_trips]
    metrics["round_trips"] = float(len(texts))
    metrics["broken_round_trips"] = float(broken_round_trips(texts, vocabularies, context.seed))
    context.report["tables"] = [_table(metrics, parameters)]
    context.report["samples"] = [
        {
            "prompt": conversation[-1]["content"],
            "outputs": {"base": mine.text, "nudged": both.text, "nudger": theirs.text},
        }
        for conversation, mine, both, theirs in zip(
            conversations, plain, judged.completions, own, strict=True
        )
    ][:4]
    return Outcome(metrics=metrics)


def _table(metrics: Mapping[str, float], parameters: NudgingStage) -> dict[str, Any]:
    rows = [["base alone", "0.00", f"{metrics['stops.base']:.2f}", ""]]
    for confidence in parameters.confidences:
        figures = (metrics[f"{name}.{confidence:g}"] for name in ("share", "stops", "repeats"))
        rows.append([f"nudged below {confidence:g}", *(f"{figure:.2f}" for figure in figures)])
    rows.append(["nudger alone", "1.00", f"{metrics['stops.nudger']:.2f}", ""])
    columns = ["", "share of nudged tokens", "answers that end properly", "that end in a repeat"]
    return {"title": "Nudging", "columns": columns, "rows": rows}
