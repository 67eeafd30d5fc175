"""The model card: a README.md beside exported weights that says what they are and what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import to_jsonable_python

from puna.core import assets
from puna.core.errors import PunaError
from puna.core.files import read_json, write_text
from puna.core.rows import META
from puna.core.stage import get_stage
from puna.run.record import Run, StageRecord
from puna.run.report.gather import references
from puna.run.report.page import paper_link

_LONGEST_SETTING = 240
_USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

or `puna chat path/to/this/folder`."""


@dataclass(frozen=True)
class _Ancestry:
    """Where a model comes from: its stages in order, the outside models and the corpora they used."""

    stages: list[StageRecord]
    bases: list[str]
    corpora: list[tuple[str, dict[str, Any]]]


def write_card(run_folder: Path | str, model_folder: Path | str) -> Path:
    """Write the card of a model that a stage of the run left at ``model_folder``; returns its path.

    Raises :class:`PunaError` for a folder that is no output of the run.
    """
    run = Run.open(run_folder)
    stage, output = _made_by(run, Path(model_folder))
    ancestry = _ancestry(run, stage)
    parts = [
        _front_matter(run, ancestry),
        f"# {run.about['name']}: {stage.id}",
        _what(run, stage, ancestry),
        _USE,
        _done(run, ancestry),
        _data(ancestry),
        _results(run, stage, output),
        _claims(run),
        _limits(run, ancestry),
        f"## Recipe\n\nEverything spelt out, as it ran:\n\n```yaml\n{run.recipe_text.strip()}\n```",
        _versions(run, stage, output),
        _citation(run),
    ]
    path = Path(model_folder) / "README.md"
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def _made_by(run: Run, folder: Path) -> tuple[StageRecord, str]:
    for record in run.stages.values():
        for name in record.outputs:
            if record.output(name).resolve() == folder.resolve():
                return record, name
    raise PunaError(
        "no stage of the run left this model", where=folder, expected=f"an output in {run.folder}"
    )


def _ancestry(run: Run, stage: StageRecord) -> _Ancestry:
    """Every stage that the model's stage draws on, in the run's order, and what they took from outside."""
    wanted, waiting = {stage.id}, [stage]
    while waiting:
        for about in references(waiting.pop().inputs):
            name = about["reference"].partition(".")[0]
            if about["origin"] == "stage" and name in run.stages and name not in wanted:
                wanted.add(name)
                waiting.append(run.stages[name])
    stages = [record for name, record in run.stages.items() if name in wanted]
    bases: dict[str, None] = {}
    corpora: dict[str, dict[str, Any]] = {}
    for record in stages:
        for key, value in record.inputs.items():
            for about in references({key: value}):
                name = str(about["reference"])
                if about["origin"] != "stage" and key.startswith("model"):
                    # A path means nothing to a reader elsewhere; its last part may be the model's name.
                    bases[Path(name).name if about["origin"] == "path" else name] = None
                meta = _corpus(run, name) if about["origin"] == "stage" else None
                if meta is not None and key != "held_out":  # what is held out is looked at, not learnt from
                    corpora[name] = meta
    return _Ancestry(stages, list(bases), list(corpora.items()))


def _corpus(run: Run, reference: str) -> dict[str, Any] | None:
    stage, _, output = reference.partition(".")
    record = run.stages.get(stage)
    if record is None or record.outputs.get(output, {}).get("kind") != "corpus":
        return None
    file = record.output(output) / META
    found: dict[str, Any] | None = read_json(file) if file.is_file() else None
    return found


def _front_matter(run: Run, ancestry: _Ancestry) -> str:
    languages = sorted(
        {code for _, meta in ancestry.corpora for tag in meta["languages"] for code in tag.split(" → ")}
    )
    sources = sorted({str(entry["source"]) for _, meta in ancestry.corpora for entry in meta["provenance"]})
    said = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": _licence(ancestry.bases),
        "base_model": ancestry.bases,
        "language": languages,
        "datasets": sources,
        "tags": [part for part in ("puna", "llama", run.about["name"], run.about.get("system")) if part],
    }
    kept = {key: value for key, value in said.items() if value}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).strip()}\n---"


def _licence(bases: list[str]) -> str:
    """The base model's licence in the hub's spelling; "other" where it is not declared."""
    declared = {assets.describe(name).licence.lower() for name in bases if assets.is_asset(name)}
    return declared.pop() if len(declared) == 1 and all(map(assets.is_asset, bases)) else "other"


def _what(run: Run, stage: StageRecord, ancestry: _Ancestry) -> str:
    does = yaml.safe_load(run.recipe_text).get("does") or run.about["title"]
    base = " and ".join(f"`{name}`" for name in ancestry.bases) or "random weights"
    paper = run.about.get("paper")
    after = f" after [{run.about['title']}]({paper_link(paper)})" if paper else ""
    return (
        f"{does}\n\nThis is what stage `{stage.id}` of the recipe `{run.about['name']}` made from {base}"
        f"{after}, at {run.about['scale']} scale, with puna {run.about['versions']['puna']}."
    )


def _done(run: Run, ancestry: _Ancestry) -> str:
    lines = ["## What was done", ""]
    for number, record in enumerate(ancestry.stages, start=1):
        settings = ", ".join(_chosen(record)) or "defaults"
        lines.append(f"{number}. **{record.id}** (`{record.use}`, {record.seconds:.0f} s): {settings}")
    return "\n".join(lines)


def _chosen(record: StageRecord) -> Iterator[str]:
    """The settings of a stage that are not its defaults, in a few words each."""
    fields = get_stage(record.use).parameters.model_fields
    for key, value in record.parameters.items():
        default = fields[key].get_default(call_default_factory=True) if key in fields else None
        if value != to_jsonable_python(default, fallback=str):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{key} {text}" if len(text) <= _LONGEST_SETTING else f"{key} as in the recipe below"


def _data(ancestry: _Ancestry) -> str:
    if not ancestry.corpora:
        return ""
    rows = [
        [
            name,
            meta["kind"],
            f"{meta['counts']['rows']:,}",
            f"{meta['counts']['words']:,}",
            ", ".join(meta["languages"]),
            ", ".join(meta["licences"]),
        ]
        for name, meta in ancestry.corpora
    ]
    return "## Data\n\n" + _table(["corpus", "kind", "rows", "words", "languages", "licences"], rows)


def _results(run: Run, stage: StageRecord, output: str) -> str:
    """Figures of every evaluation in the run that measured this model, each with its interval."""
    found = []
    for record in run.stages.values():
        for item in record.report.get("intervals", []):
            names = _names_of(record, f"{stage.id}.{output}")
            rows = [_result(row, item) for row in item["rows"] if row["label"] in names]
            if rows:
                columns = ["corpus", item["unit"], f"of {item['baseline']}", "change", "95% interval"]
                found.append(_table(columns, rows))
    if not found:
        return "## Results\n\nThis model was not measured in its run."
    note = "Lower is better. Intervals: paired bootstrap over documents."
    return "\n\n".join(["## Results", *found, note])


def _names_of(record: StageRecord, reference: str) -> set[str]:
    """Under which names an evaluation measured a model."""
    models = record.inputs.get("models", {})
    return {
        name
        for name, about in models.items()
        if isinstance(about, Mapping) and about.get("reference") == reference
    }


def _result(row: Mapping[str, Any], item: Mapping[str, Any]) -> list[str]:
    base = next(
        other["value"]
        for other in item["rows"]
        if other["group"] == row["group"] and other["label"] == item["baseline"]
    )
    change = row.get("change", {"value": 0.0})
    ends = f"{100 * change['low']:+.1f}% to {100 * change['high']:+.1f}%" if "low" in change else ""
    return [row["group"], f"{row['value']:.3f}", f"{base:.3f}", f"{100 * change['value']:+.1f}%", ends]


def _claims(run: Run) -> str:
    if not run.claims or not run.claims["claims"]:
        return ""
    rows = []
    for claim in run.claims["claims"]:
        figure = "–" if claim["figure"] is None else f"{claim['figure']:.4g}"
        verdict = "fails" if not claim["passed"] else "reported" if claim["bar"] == "reported" else "holds"
        rows.append([claim["says"], figure, claim["bar"], verdict])
    return "## Claims of the recipe\n\n" + _table(["claim", "figure", "bar", "verdict"], rows)


def _limits(run: Run, ancestry: _Ancestry) -> str:
    words = sum(meta["counts"]["words"] for _, meta in ancestry.corpora)
    lines = [
        "The figures hold for the held-out text they were measured on; other text may behave otherwise.",
        "Nothing was measured about truth, harm or bias. What the base model gets wrong, this one may, too.",
    ]
    if run.about["scale"] == "demo":
        lines.insert(
            0, f"Demo scale: minutes on corpora of {words:,} words. It shows the method; it is not for use."
        )
    lines += yaml.safe_load(run.recipe_text).get("deviations") or []
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _versions(run: Run, stage: StageRecord, output: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.about["versions"].items())
    git = run.about.get("git")
    commit = f", commit {git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else ""
    where = f"seed {run.about['seed']}, {run.about['device']}, {run.about['dtype']}"
    return (
        f"## Versions\n\n{versions}{commit}; {where}. Fingerprint of the stage `{stage.fingerprint}`, "
        f"of these weights `{stage.outputs[output]['fingerprint']}`."
    )


def _citation(run: Run) -> str:
    paper = run.about.get("paper")
    if not paper:
        return ""
    kind, _, number = paper.partition(":")
    eprint = f"  eprint = {{{number}}},\n  archivePrefix = {{arXiv}},\n" if kind.lower() == "arxiv" else ""
    title = f"@misc{{{run.about['name']},\n  title = {{{run.about['title']}}},\n"
    entry = f"{title}{eprint}  url = {{{paper_link(paper)}}}\n}}"
    return f"## Citation\n\nThe method:\n\n```bibtex\n{entry}\n```"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(str(value).replace("|", "\\|").replace("\n", " ") for value in row) + " |"
        for row in lines
    )
