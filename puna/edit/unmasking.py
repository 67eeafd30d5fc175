"""All patterns of masks, each trained alike, one chosen on validation rows: the work of ``unmasking``.

System S75 (Dukić and Šnajder 2024, arXiv:2401.14556). Every pattern starts from the same weights, the same
head and adapter, and sees the same rows in the same order. Validation rows are taken out of the training
corpus; the test corpus is read for every pattern, for the table, and decides nothing.

A pattern that was measured is written down, so that a killed run goes on with the next.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.core.files import fingerprint, read_json, write_json
from puna.core.progress import say
from puna.core.seeds import derive, numpy_generator
from puna.core.stage import Context, Outcome
from puna.data.corpus import Corpus
from puna.evaluate.label_scores import Scores, majority, score
from puna.evaluate.labelling import Labelled, predictions
from puna.model.labels import LabelKind
from puna.text.labelled import encode_labelled
from puna.text.packing import Packed, pack
from puna.train.labelling import kind_of, loop_of, open_labeller

if TYPE_CHECKING:
    from puna.edit.unmasking_stages import Unmasking

_FIGURES = ("entity_f1", "accuracy", "macro_f1")


@dataclass(frozen=True)
class Sides:
    """What is learnt from, chosen by and told."""

    train: Labelled
    validation: Labelled
    test: Labelled

    @classmethod
    def split(cls, corpus: Path, test: Path, rows: int, seed: int) -> Sides:
        """Take ``rows`` rows out of the training corpus, drawn by ``seed``."""
        whole = Labelled.read(corpus)
        if not 0 < rows < len(whole.rows):
            raise PunaError(
                "validation rows are taken out of the training corpus",
                where="validation_rows",
                found=rows,
                expected=f"1 to {len(whole.rows) - 1}",
            )
        apart = set(numpy_generator(seed, "validation").permutation(len(whole.rows))[:rows].tolist())
        sides: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for number, row in enumerate(whole.rows):
            sides[number in apart].append(row)
        return cls(Labelled(whole.kind, sides[False]), Labelled(whole.kind, sides[True]), Labelled.read(test))


def run(context: Context, parameters: Unmasking) -> Outcome:
    """Train and measure every pattern, choose one, report the table."""
    corpus = Corpus.open(context.inputs["corpus"])
    kind = kind_of(corpus, parameters.train)
    own = context.seed if parameters.train.seed is None else parameters.train.seed
    seed = derive(own, context.name)
    sides = Sides.split(context.inputs["corpus"], context.inputs["test"], parameters.validation_rows, seed)
    recipe = {"recipe": parameters.train.model_dump(mode="json"), "seed": seed, "corpus": corpus.fingerprint}
    work = _Work(context, parameters, kind, sides, seed, recipe)
    found = {pattern: work.measured(pattern) for pattern in parameters.all_patterns()}
    seen = Counter(label for labels in sides.train.true for label in labels)
    always = score(majority(sides.test.true, seen), sides.test.true)
    by = next(name for name in _FIGURES if f"validation.{name}" in next(iter(found.values())))
    # Of equals the first, in the order of the table.
    chosen = max(found, key=lambda pattern: found[pattern][f"validation.{by}"])
    context.report["tables"] = [_table(found, always, by, chosen)]
    shutil.rmtree(context.out / "patterns", ignore_errors=True)
    return Outcome({}, _metrics(found, always, by, chosen))


@dataclass
class _Work:
    context: Context
    parameters: Unmasking
    kind: LabelKind
    sides: Sides
    seed: int
    recipe: dict[str, Any]
    packed: Packed | None = None

    def measured(self, pattern: str) -> dict[str, float]:
        """Figures of one pattern, trained now or before."""
        folder = self.context.out / "patterns" / pattern
        about = fingerprint({**self.recipe, "pattern": pattern, "model": str(self.context.inputs["model"])})
        if (folder / "figures.json").is_file():
            stored = read_json(folder / "figures.json")
            if stored["about"] == about:
                return dict(stored["figures"])
        figures = self._train(pattern, folder)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if "." in name)
        say(f"{pattern}: {shown}")
        write_json(folder / "figures.json", {"about": about, "figures": figures})
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return figures

    def _train(self, pattern: str, folder: Path) -> dict[str, float]:
        training, dtype = self.parameters.train, self.parameters.train.dtype or self.context.dtype
        source = self.context.inputs["model"]
        model = open_labeller(source, self.kind, training, pattern, dtype=dtype, seed=self.seed)
        if self.packed is None:
            train = self.sides.train
            rows = encode_labelled(train.rows, train.kind, model.tokenizer, self.kind.names)  # type: ignore[arg-type]
            self.packed = pack(rows, training.max_length, mode="fit")
        loop = loop_of(
            model,
            self.packed,
            training,
            folder,
            seed=self.seed,
            recipe={**self.recipe, "pattern": pattern},
            device=self.context.device,
        )
        state = loop.run()
        loop.optimizer.close()
        figures: dict[str, float] = {"steps": float(state.step), "tokens": float(state.tokens)}
        for side, labelled in (("validation", self.sides.validation), ("test", self.sides.test)):
            said = predictions(model, labelled, max_length=training.max_length)
            for name, value in score(said, labelled.true).metrics().items():
                figures[f"{side}.{name}"] = value
        return figures


def _metrics(found: dict[str, dict[str, float]], always: Scores, by: str, chosen: str) -> dict[str, float]:
    """Every figure by pattern, those of the chosen one, of the causal one, and the range of the others."""
    causal = "0" * len(chosen)
    others = [figures for pattern, figures in found.items() if pattern != causal]
    figures = {
        f"{name}.{pattern}": value
        for pattern, all_ in found.items()
        for name, value in all_.items()
        if name.endswith(by) or name == "test.accuracy"
    }
    figures |= always.metrics(".majority")
    figures |= {
        "patterns": float(len(found)),
        "chosen_layers": chosen.count("1") / len(chosen),
        f"chosen.{by}": found[chosen][f"test.{by}"],
        f"best_on_test.{by}": max(each[f"test.{by}"] for each in found.values()),
    }
    if causal in found and others:
        for name in {by, "accuracy"}:
            figures[f"causal.{name}"] = found[causal][f"test.{name}"]
            figures[f"worst_unmasked.{name}"] = min(each[f"test.{name}"] for each in others)
            figures[f"best_unmasked.{name}"] = max(each[f"test.{name}"] for each in others)
    return figures


def _table(found: dict[str, dict[str, float]], always: Scores, by: str, chosen: str) -> dict[str, Any]:
    """A row for each pattern: validation, which chose, and test."""
    names = [name for name in _FIGURES if f"test.{name}" in found[chosen]]
    rows = [
        [
            pattern + (" (chosen)" if pattern == chosen else ""),
            f"{figures[f'validation.{by}']:.3f}",
            *(f"{figures[f'test.{name}']:.3f}" for name in names),
        ]
        for pattern, figures in found.items()
    ]
    said = always.metrics()
    rows.append(["majority", "", *(f"{said[name]:.3f}" if name in said else "-" for name in names)])
    spoken = [name.replace("_f1", " F1") for name in names]
    columns = ["unmasked groups, low first", f"validation {by.replace('_f1', ' F1')}", *spoken]
    return {"title": "Masks removed by group of layers", "columns": columns, "rows": rows}
