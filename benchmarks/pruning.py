"""Whether a pruned model is as much faster in the engine as it has fewer operations.

    python -m benchmarks.pruning [--model smollm2-135m-instruct] [--dtype bfloat16] [--quantize int8]

The whole model and smaller ones read the same tokens with the engine's own kernels, in turn, step by step:
decoding steps of one text and of eight behind a context, and a prompt. Of each step's times the median of
all rounds counts. Which units go is drawn at random: time does not depend on it. Peer: the whole model in
the same process. Before the speed-ups stands what the count of operations promises: with
the head for decoding, without it for a prompt, whose last token alone is given to the head.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from puna.model.llama import Llama
    from puna.model.spec import LlamaSpec
    from puna.model.stepper import Stepper

SHARES = (0.2, 0.5, 0.7)
CONTEXT, PROMPT, TEXTS = 256, 256, 8


def smaller(model: Llama) -> dict[str, Llama]:
    """Models with less of everything, unequally by layers, and one with whole layers dropped."""
    from puna.core.seeds import numpy_generator
    from puna.edit.pruning.allocate import removals
    from puna.edit.shorten import shorten
    from puna.model.slicing import sliced
    from puna.model.units import Kept

    found: dict[str, Llama] = {"whole": model}
    spec = model.spec
    for share in SHARES:
        # Layers that lose half as much again, and half as little, by turns.
        shares = [min(0.99, share * (1.5 if layer % 2 else 0.5)) for layer in range(len(spec.blocks))]
        gone = removals(spec, ("head_group", "channel"), shares, {})
        generator = numpy_generator(0, "benchmarks", "pruning", str(share))

        def part(
            kind: Any, layer: int, total: int, gone: Any = gone, generator: Any = generator
        ) -> tuple[int, ...]:
            left = total - gone.get((kind, layer), 0)
            return tuple(sorted(generator.permutation(total)[:left].tolist()))

        everything = Kept.everything(spec)
        groups = tuple(part("head_group", layer, block.kv_heads) for layer, block in enumerate(spec.blocks))
        channels = tuple(part("channel", layer, block.width) for layer, block in enumerate(spec.blocks))
        kept = Kept(groups, channels, everything.hidden, everything.blocks)
        found[f"{share:.0%} of heads and channels"] = sliced(model, kept)
    half = len(spec.blocks) // 2
    found["half of the layers"] = shorten(model, range(half))
    return found


class Bench:
    """A stepper with texts behind a context, and steps that are undone."""

    def __init__(self, stepper: Stepper) -> None:
        from puna.model.stepper import Read

        self.stepper, self.read = stepper, Read
        stepper.pool.sharing = False
        ids = [5 + place % 900 for place in range(CONTEXT)]
        self.texts = [stepper.sequence() for _ in range(TEXTS)]
        for text in self.texts:
            stepper.step([Read(text, ids, 0)])
        self.prompt = stepper.sequence()

    def decode(self, texts: int) -> float:
        """Seconds of a decoding step of so many texts, head included."""
        import torch

        reads = [self.read(text, [17]) for text in self.texts[:texts]]
        begun = time.perf_counter()
        self.stepper.logits(torch.cat(self.stepper.step(reads)))
        took = time.perf_counter() - begun
        for text in self.texts[:texts]:
            text.crop(CONTEXT)
        return took

    def prefill(self) -> float:
        """Seconds of reading a prompt."""
        begun = time.perf_counter()
        self.stepper.logits(
            self.stepper.step([self.read(self.prompt, [5 + n % 900 for n in range(PROMPT)])])[0]
        )
        took = time.perf_counter() - begun
        self.prompt.crop(0)
        return took


def measure(models: dict[str, Llama], quantize: Any, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by model and kind of step; all models in turn in every round, the first not counted."""
    from puna.model.steppers import make_stepper

    room = (TEXTS + 1) * (CONTEXT + PROMPT)
    benches = {
        name: Bench(make_stepper(model, quantize=quantize, cache_tokens=room, kernels="native"))
        for name, model in models.items()
    }
    taken: dict[str, dict[str, list[float]]] = {
        name: {"one text": [], "eight texts": [], "prompt": []} for name in benches
    }
    for turn in range(rounds + 1):
        for name, bench in benches.items():
            times = {"one text": bench.decode(1), "eight texts": bench.decode(TEXTS)}
            if turn % 8 == 1:
                times["prompt"] = bench.prefill()
            for kind, seconds in times.items():
                if turn:
                    taken[name][kind].append(seconds)
    return taken


def main() -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    import puna
    from puna.model.sizes import step_operations

    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", default="smollm2-135m-instruct")
    arguments.add_argument("--dtype", default="bfloat16")
    arguments.add_argument("--quantize", choices=["int8", "int4"], default=None)
    arguments.add_argument("--rounds", type=int, default=48)
    options = arguments.parse_args()
    models = smaller(puna.load(options.model, dtype=options.dtype).eval())
    taken = measure(models, options.quantize, options.rounds)
    medians = {
        name: {kind: statistics.median(times) for kind, times in kinds.items()}
        for name, kinds in taken.items()
    }

    def fewer(spec: LlamaSpec, *, head: bool) -> float:
        less = 0.0 if head else 2.0 * spec.vocab_size * spec.hidden_size
        return (step_operations(models["whole"].spec, CONTEXT) - less) / (
            step_operations(spec, CONTEXT) - less
        )

    table = Table(
        title=f"times faster than the whole {options.model}, {options.quantize or options.dtype}, in turn"
    )
    for column in ("", "parameters", "operations", "one text", "eight texts", "without head", "prompt"):
        table.add_column(column, justify="left" if not column else "right")
    for name, model in models.items():
        faster = [medians["whole"][kind] / medians[name][kind] for kind in medians[name]]
        table.add_row(
            name,
            f"{model.spec.parameter_count() / 1e6:.1f}M",
            *(f"{ratio:.2f}x" for ratio in (fewer(model.spec, head=True), *faster[:2])),
            *(f"{ratio:.2f}x" for ratio in (fewer(model.spec, head=False), faster[2])),
        )
    Console().print(table)
    steps = ", ".join(f"{kind} {seconds * 1e3:.1f} ms" for kind, seconds in medians["whole"].items())
    print(f"whole: {steps}; context {CONTEXT}, prompt {PROMPT} tokens, {options.rounds} rounds")


if __name__ == "__main__":
    main()
