"""The work of the stages ``prune`` and ``prune_and_train``.

System S27, Adapt-Accel: the model is pruned to a size between the whole and the target, trained on the
next part of one stream of text, pruned again. One learning-rate schedule spans all rounds, and what is left
of AdamW's moments goes on with the weights it belongs to.

A round's units are written down before its training starts, and its checkpoints lie in ``rounds/N``: a
killed run goes on in the round it was in.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.assets import cache_folder
from puna.core.errors import PunaError
from puna.core.files import fingerprint, read_json, write_json
from puna.core.seeds import derive
from puna.core.stage import Context, Outcome
from puna.edit.calibration import calibration_batches
from puna.edit.pruning.prune import Pruned
from puna.edit.pruning.prune import prune as take_out
from puna.model.kept_units import write_kept
from puna.model.probe import difference, probe
from puna.model.slicing import Masks, slice_tensors, sliced, soft_mask
from puna.model.units import Kept, block_parameters, count
from puna.text import pretrained
from puna.text.packing import Batch
from puna.train import job
from puna.train.loop import Loop, LoopSettings

if TYPE_CHECKING:
    from puna.edit.pruning.stages import Prune, PruneAndTrain, Pruning
    from puna.model.llama import Llama
    from puna.model.spec import LlamaSpec

_KEPT = "kept.json"
CONTEXT = 512
"""Tokens behind which a decoding step is counted."""


def run_prune(context: Context, parameters: Prune) -> Outcome:
    """Open, prune, compare masked and sliced, save, report."""
    model = _opened(context, context.dtype)
    seed = derive(context.seed, context.name)
    batches = _calibration(model, Path(context.inputs["corpus"]), parameters, seed)
    pruned = take_out(model, batches, parameters.settings(), seed=seed, folder=cache_folder() / "statistics")
    metrics = _figures(model.spec, pruned.kept, parameters.share)
    metrics |= _importance_figures(pruned)
    metrics["masked_difference"] = _masked_difference(context, pruned.kept)
    small = pruned.model.to(pretrained.DTYPES[parameters.save_dtype])
    context.report["tables"] = [layer_table(model.spec, small.spec)]
    folder = pretrained.save(small, context.out / "model")
    write_kept(folder, pruned.kept)
    return Outcome({"model": folder}, metrics)


def _opened(context: Context, dtype: str) -> Llama:
    return pretrained.load_plain(context.inputs["model"], dtype=dtype, device=context.device).eval()


def _calibration(model: Llama, corpus: Path, pruning: Pruning, seed: int) -> list[Batch]:
    return calibration_batches(
        model,
        corpus,
        rows=pruning.calibration_rows,
        length=pruning.calibration_length,
        batch_rows=pruning.calibration_batch_rows,
        seed=seed,
    )


def _figures(whole: LlamaSpec, kept: Kept, share: float) -> dict[str, float]:
    """What was taken out against what was to be, and what the rest costs against the whole."""
    before, after = count(whole, context=CONTEXT), count(whole, kept, context=CONTEXT)
    removed = before.block_parameters - after.block_parameters
    wanted = share * before.block_parameters
    return {
        "parameters": float(after.parameters),
        "removed_share": removed / before.block_parameters,
        "target_error": abs(removed - wanted) / wanted if wanted else 0.0,
        "parameter_share": after.parameters / before.parameters,
        "step_operations_share": after.step_operations / before.step_operations,
        "cache_share": after.cache_bytes / before.cache_bytes if before.cache_bytes else 0.0,
        "smallest_width": float(min(len(channels) for channels in kept.channels)),
        "largest_width": float(max(len(channels) for channels in kept.channels)),
    }


def _importance_figures(pruned: Pruned) -> dict[str, float]:
    """How far centred importances are from mean 0 and largest magnitude 1, over all steps."""
    if not pruned.importances:
        return {"steps": float(pruned.steps)}
    means = [abs(math.fsum(values) / len(values)) for values in pruned.importances]
    largest = [abs(max(map(abs, values)) - 1) for values in pruned.importances]
    return {
        "steps": float(pruned.steps),
        "importance_mean": max(means),
        "importance_largest_error": max(largest),
    }


def _masked_difference(context: Context, kept: Kept) -> float:
    """Largest difference of logits of the masked whole and the sliced model, over the largest logit.

    In float32, on the tokens of the probe.
    """
    model = _opened(context, "float32")
    with soft_mask(model, Masks.of(model.spec, kept)):
        masked = probe(model)
    return difference(masked, probe(sliced(model, kept))) / float(masked.abs().max())


def layer_table(before: LlamaSpec, after: LlamaSpec) -> dict[str, Any]:
    """What each layer has left, for the report."""
    rows = [[str(layer), str(block.kv_heads), str(block.width)] for layer, block in enumerate(after.blocks)]
    first = before.blocks[0]
    return {
        "title": f"Layers: of {first.kv_heads} key-value heads and {first.width} channels in the first",
        "columns": ["layer", "key-value heads", "channels"],
        "rows": rows,
    }


def run_rounds(context: Context, parameters: PruneAndTrain) -> Outcome:
    """Prune and train in rounds: :mod:`puna.train.job` with a course of its own."""
    rounds = _Rounds(context, parameters)
    outcome = job.run(context, parameters.train, rounds.course)
    assert rounds.whole is not None
    figures = _figures(rounds.whole, rounds.kept[-1], parameters.prune.share)
    shutil.rmtree(context.out / "rounds", ignore_errors=True)
    write_kept(outcome.outputs["model"], rounds.kept[-1])
    return Outcome({"model": outcome.outputs["model"]}, outcome.metrics | figures)


class _Rounds:
    """The course of a training that prunes before each of its rounds."""

    def __init__(self, context: Context, parameters: PruneAndTrain) -> None:
        self.context, self.parameters = context, parameters
        self.whole: LlamaSpec | None = None
        self.kept: list[Kept] = []  # of the whole decoder, by round

    def course(self, model: Llama, settings: LoopSettings, make_loop: job.MakeLoop) -> Loop:
        """Run all rounds, or those that are left; gives the loop of the last."""
        count_ = self.parameters.rounds
        if settings.total_steps < count_:
            raise PunaError(
                "every round needs a step of training",
                where="rounds",
                found=f"{count_} rounds, {settings.total_steps} steps",
            )
        self.whole = model.spec
        first = self._reached()
        loop: Loop | None = None
        for number in range(first, count_):
            kept = self._choose(model if loop is None else loop.model, number)
            loop = self._begin(model, loop, kept, make_loop, settings, number)
            loop.run()
            if number:
                shutil.rmtree(self._folder(number - 1) / "checkpoints", ignore_errors=True)
        assert loop is not None
        return loop

    def _folder(self, number: int) -> Path:
        return self.context.out / "rounds" / str(number)

    def _reached(self) -> int:
        """The last round that has a checkpoint, or the first; its units and those before it are read."""
        numbers = range(self.parameters.rounds)
        found = [n for n in numbers if any((self._folder(n) / "checkpoints").glob("checkpoint-*"))]
        first = max(found, default=0)
        self.kept = [Kept.from_json(read_json(self._folder(n) / _KEPT)) for n in range(first)]
        return first

    def _choose(self, model: Llama, number: int) -> Kept:
        """The units of the whole decoder that this round keeps, written down: chosen once."""
        file = self._folder(number) / _KEPT
        if file.is_file() and any((file.parent / "checkpoints").glob("checkpoint-*")):
            kept = Kept.from_json(read_json(file))
        else:
            earlier = self.kept[-1] if self.kept else Kept.everything(model.spec)
            kept = earlier.then(self._prune(model, number).kept)
            write_json(file, dataclasses.asdict(kept))
        self.kept.append(kept)
        return kept

    def _prune(self, model: Llama, number: int) -> Pruned:
        """Down to a size that lies on the straight line from the whole to the target."""
        assert self.whole is not None
        pruning = self.parameters.prune
        total, now = block_parameters(self.whole), block_parameters(model.spec)
        wanted = total * (1 - pruning.share * (number + 1) / self.parameters.rounds)
        seed = derive(self.context.seed, self.context.name, "round", number)
        batches = _calibration(model, Path(self.context.inputs["calibration"]), pruning, seed)
        settings = dataclasses.replace(pruning.settings(), share=max(0.0, 1 - wanted / now))
        return take_out(model, batches, settings, seed=seed)

    def _begin(
        self,
        whole: Llama,
        before: Loop | None,
        kept: Kept,
        make_loop: job.MakeLoop,
        settings: LoopSettings,
        number: int,
    ) -> Loop:
        """The loop of a round, with the weights and moments that the round before has left."""
        folder = self._folder(number) / "checkpoints"
        end = self._ends(settings)[number]
        changes: dict[str, Any] = {} if before is None else {"begin": before.state}
        small = sliced(whole, kept) if before is None else self._smaller(before.model)
        small.recomputed_layers = min(whole.recomputed_layers, len(small.spec.blocks))
        loop = make_loop(
            small,
            settings=dataclasses.replace(settings, stop_after=end),
            recipe={"round": number, "kept": fingerprint(dataclasses.asdict(kept))},
            checkpoints=folder,
            **changes,
        )
        if before is not None:
            self._hand_over(before, loop)
        return loop

    def _ends(self, settings: LoopSettings) -> list[int]:
        """The last step of each round."""
        rounds = self.parameters.rounds
        return [round(settings.total_steps * (number + 1) / rounds) for number in range(rounds)]

    def _smaller(self, model: Llama) -> Llama:
        """The trained model without what this round takes."""
        return sliced(model, _relative(self.kept[-2], self.kept[-1]))

    def _hand_over(self, before: Loop, loop: Loop) -> None:
        """Float32 weights and AdamW's moments of what is left."""
        small = before.model.spec
        later = _relative(self.kept[-2], self.kept[-1])
        weights = slice_tensors(before.optimizer.weights(), small, later)
        moments: dict[str, Any] = {}
        for prefix in ("first/", "second/"):
            own = {
                name.removeprefix(prefix): tensor
                for name, tensor in before.optimizer.moments().items()
                if name.startswith(prefix)
            }
            cut = slice_tensors(own, small, later, correct=False)
            moments |= {prefix + name: tensor for name, tensor in cut.items()}
        before.optimizer.close()
        loop.optimizer.restore(weights, moments, before.state.step)


def _relative(earlier: Kept, later: Kept) -> Kept:
    """``later``, in the numbers of the decoder that ``earlier`` has left."""

    def places(among: Sequence[int], chosen: Sequence[int]) -> tuple[int, ...]:
        where = {number: place for place, number in enumerate(among)}
        return tuple(where[number] for number in chosen)

    return Kept(
        tuple(places(earlier.head_groups[layer], later.head_groups[layer]) for layer in earlier.blocks),
        tuple(places(earlier.channels[layer], later.channels[layer]) for layer in earlier.blocks),
        places(earlier.hidden, later.hidden),
        places(earlier.blocks, later.blocks),
    )
