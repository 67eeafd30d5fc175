"""The fault drill: a real training is killed, starved, damaged and misled, and must lose nothing.

    python -m benchmarks.faults             # 20 kills and every other fault, on a tiny Llama made on the spot
    python -m benchmarks.faults --quick     # 4 kills
    python -m benchmarks.faults --model smollm2-135m-instruct --only kills

Each run is ``puna stage train`` in a process of its own: LoRA with dropout, evaluation in between,
checkpoints every few steps. What it ends in is compared with an uninterrupted run byte by byte: model,
adapter, AdamW's moments, generators, and all of its metrics that no clock gave. Prints a table; the exit
code is 1 if a fault was not met.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults_setting import little_disk, tiny_model, write_documents

ROOT = Path(__file__).resolve().parents[1]
STEPS, SAVE_STEPS = 48, 3
SHARD = "shard-00001-model-00001-of-00001.safetensors"  # a process alone writes one
CLOCK = ("seconds", "tokens_per_second", "targets_per_second", "peak_memory")
SETTINGS = {
    "max_steps": STEPS,
    "batch_tokens": 256,
    "micro_batch_tokens": 128,
    "max_length": 64,
    "learning_rate": 0.01,
    "warmup_steps": 4,
    "eval_steps": 5,
    "eval_tokens": 300,
    "save_steps": SAVE_STEPS,
    "state_after": "end",
    "dtype": "float32",
    "save_dtype": "float32",
    "lora": "{r: 4, alpha: 8, dropout: 0.1}",
}


@dataclass(frozen=True)
class Verdict:
    """What was done to a run, what puna said, and what of the demands was not met (nothing, if all was)."""

    fault: str
    done: str
    said: str
    failures: tuple[str, ...] = ()


@dataclass
class Drill:
    """One drill in ``folder``: the inputs, the uninterrupted run to compare with, and what was found."""

    folder: Path
    model: str
    kills: int
    generator: random.Random
    verdicts: list[Verdict] = field(default_factory=list)

    # ---- running ----------------------------------------------------------------------------------

    @property
    def corpus(self) -> Path:
        return self.folder / "documents"

    def command(self, out: str, inputs: dict[str, Any], settings: dict[str, Any]) -> list[str]:
        """The command line of a training into ``out``."""
        given = {"model": self.model, "corpus": self.corpus, "held_out": self.folder / "held_out", **inputs}
        words = [sys.executable, "-m", "puna.cli", "stage", "train", "--device", "cpu", "--seed", "7"]
        for name, value in given.items():
            words += ["--in", f"{name}={value}"]
        chosen = {**SETTINGS, **settings}
        words += [f"{key}={value}" for key, value in chosen.items() if value is not None]
        return [*words, "--out", str(self.folder / out)]

    def run(
        self,
        out: str,
        inputs: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        *,
        file_limit: int | None = None,
    ) -> tuple[int, str]:
        """Train into ``out`` to the end; exit code and what it said on its error output."""

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))  # type: ignore[arg-type]

        done = subprocess.run(
            self.command(out, inputs or {}, settings or {}),
            cwd=ROOT,
            env=_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limit if file_limit else None,
            check=False,
        )
        return done.returncode, done.stderr

    def killed(self, out: str, moment: Moment) -> bool:
        """Train into ``out`` and kill the process at that moment; False if it ended before."""
        with (self.folder / "killed.log").open("a") as log:
            since = time.time()
            process = subprocess.Popen(
                self.command(out, {}, {}), cwd=ROOT, env=_environment(), stdout=log, stderr=log
            )
            while process.poll() is None and not moment.has_come(self.work(out), since):
                time.sleep(0.0005)
            time.sleep(moment.delay)
            process.send_signal(signal.SIGKILL)
            return process.wait() == -signal.SIGKILL

    def work(self, out: str) -> Path:
        """Where an unfinished run into ``out`` stands."""
        return self.folder / f"{out}.work"

    # ---- comparing --------------------------------------------------------------------------------

    def differences(self, out: str) -> list[str]:
        """In what the finished run ``out`` differs from the uninterrupted one: nothing, it should be."""
        found, expected = _result(self.folder / out), _result(self.folder / "whole")
        return [f"{name} differs" for name in expected if found.get(name) != expected[name]]

    def finishes(self, out: str, inputs: dict[str, Any] | None = None) -> tuple[list[str], str]:
        """Run ``out`` to its end as if nothing had been; what is wrong with that, and what was said."""
        code, said = self.run(out, inputs)
        return ([f"exit code {code}"] if code else self.differences(out)), said

    def unfinished(self, out: str) -> Path:
        """A run that was killed at about two thirds, as a copy of its own; returns its checkpoints."""
        template = self.work("template")
        if not template.exists() and not self.killed("template", Moment(2 * STEPS // 3, "step")):
            raise RuntimeError("the run ended before it could be killed")
        shutil.copytree(template, self.work(out))
        return self.work(out) / "checkpoints"

    def judge(self, fault: str, done: str, said: str, failures: Sequence[str]) -> None:
        """Note what became of a fault."""
        self.verdicts.append(Verdict(fault, done, _told(said), tuple(failures)))


@dataclass(frozen=True)
class Moment:
    """When to kill: once ``step`` is logged, and then while a checkpoint is written, or ``delay`` seconds on.

    ``files`` is how many files stand in the half-written checkpoint at that moment.
    """

    step: int
    kind: str
    delay: float = 0.0
    files: int = 0

    def has_come(self, work: Path, since: float) -> bool:
        """Whether it is that moment, by the files of the run; a process started ``since`` must train."""
        with suppress(OSError, ValueError, IndexError):
            log = work / "metrics.jsonl"
            if log.stat().st_mtime < since:
                return False
            last = log.read_bytes().rstrip(b"\n").rsplit(b"\n", 1)[-1]
            if self.step and json.loads(last)["step"] < self.step:
                return False
            if self.kind != "checkpoint":
                return True
            for part in (work / "checkpoints").glob(".checkpoint-*.part"):
                return len(list(part.iterdir())) >= self.files
        return False


def moments(count: int, generator: random.Random) -> list[Moment]:
    """Moments of one run in their order: two fifths while a checkpoint is written, one or two at the end."""
    ends = max(1, count // 10)
    writing = 2 * count // 5
    found = []
    for number in range(count - ends):
        step = generator.randint(1, STEPS - SAVE_STEPS - 1)
        if number < writing:
            found.append(Moment(step, "checkpoint", 0.0, generator.randint(0, 3)))
        else:
            found.append(Moment(step, "step", generator.uniform(0.0, 0.05)))
    found.sort(key=lambda moment: moment.step)
    return [*found, *(Moment(STEPS, "end", generator.uniform(0.0, 0.1)) for _ in range(ends))]


# ---- the faults -----------------------------------------------------------------------------------------


def kills(drill: Drill) -> None:
    """SIGKILL at random moments of one run, resumed each time."""
    from puna.core.progress import Track

    planned = moments(drill.kills, drill.generator)
    writing = sum(moment.kind == "checkpoint" for moment in planned)
    hit = torn = 0
    with Track("kills", len(planned), "kills") as track:
        for moment in planned:
            hit += drill.killed("killed", moment)
            torn += any((drill.work("killed") / "checkpoints").glob(".checkpoint-*.part"))
            track.advance()
    failures, said = drill.finishes("killed")
    if hit < len(planned):
        failures.append(f"the run ended before {len(planned) - hit} of the kills")
    left = [path.name for path in (drill.folder / "killed").rglob(".*.part")]
    failures += [f"{name} was left lying" for name in left]
    sessions = json.loads((drill.folder / "killed" / "stage.json").read_text())["sessions"]
    done = (
        f"SIGKILL at {hit} moments of one run, {writing} of them aimed at the writing of a checkpoint "
        f"({torn} left one half written); {sessions} sessions"
    )
    drill.judge("killed", done, said or "(went on by itself)", failures)


def same_seed(drill: Drill) -> None:
    """The same command in another folder."""
    failures, _ = drill.finishes("again")
    drill.judge("same seed", "the same command in another folder", "(nothing to say)", failures)


def evaluation(drill: Drill) -> None:
    """No evaluation in between."""
    code, said = drill.run("unseen", settings={"eval_steps": None})
    failures = [f"exit code {code}"] if code else drill.differences("unseen")
    failures = [failure for failure in failures if not failure.startswith("metrics")]
    drill.judge("evaluation", "left out in between: weights and moments are compared", said, failures)


def accumulation(drill: Drill) -> None:
    """One pass of k*b against k passes of b, without dropout, whose draws differ."""
    from safetensors.torch import load_file

    plain = {"lora": "{r: 4, alpha: 8}", "max_steps": 8}
    found = []
    for name, size in (("one", 256), ("four", 64)):
        code, said = drill.run(name, settings={**plain, "micro_batch_tokens": size})
        if code:
            drill.judge("accumulation", f"micro_batch_tokens={size}", said, [f"exit code {code}"])
            return
        stored = load_file(drill.folder / name / "state" / SHARD)
        found.append({key: tensor for key, tensor in stored.items() if not key.startswith("weights/")})
    largest = max(float((tensor - found[1][name]).abs().max()) for name, tensor in found[0].items())
    failures = [] if largest < 1e-6 else ["the averages of the gradients differ by more than 1e-6"]
    said = f"(averages of gradients after 8 steps differ by at most {largest:.1e})"
    drill.judge("accumulation", "4 passes of 64 tokens instead of one of 256", said, failures)


def damaged(drill: Drill) -> None:
    """A torn file, and a flipped byte in each file of the newest checkpoint."""
    names = [SHARD, "generators.safetensors", "state.json"]
    for name, torn in [(SHARD, True), *((name, False) for name in names)]:
        out = f"damaged-{name.partition('.')[0]}-{'torn' if torn else 'flipped'}"
        newest = sorted(drill.unfinished(out).glob("checkpoint-*"))[-1]
        content = bytearray((newest / name).read_bytes())
        place = drill.generator.randrange(len(content))
        if torn:
            content = content[:place]
        else:
            content[place] ^= 1 << drill.generator.randrange(8)
        (newest / name).write_bytes(content)
        failures, said = drill.finishes(out)
        flat = "".join(said.split())
        failures += [f"{word} is not named" for word in (newest.name, name) if word not in flat]
        failures += [] if "Goingonfrom" in flat else ["the checkpoint before it is not named"]
        what = f"cut off at byte {place:,}" if torn else f"one bit of byte {place:,} flipped"
        drill.judge("damaged checkpoint", f"{newest.name}/{name} {what}", said, failures)


def full_disk(drill: Drill) -> None:
    """A file system with room for two checkpoints and a half; then a limit below the final model."""
    state = sum(file.stat().st_size for file in (drill.folder / "whole" / "state").iterdir())
    place = drill.folder / "little"
    with little_disk(place, int(2.5 * state)) as grow:
        if grow is not None:
            code, said = drill.run("little/run")
            failures = _refused(
                code, said, ("no room to write this", "bytes are free", "last good checkpoint")
            )
            if not failures:
                failures += [f"{part} was left" for part in drill.work("little/run").rglob(".*.part")]
                grow(64 * state)
                failures += drill.finishes("little/run")[0]
            done = f"a file system of {2.5 * state / 1e6:.1f} MB (tmpfs); then with room again"
            drill.judge("full disk", done, said, failures)
    model = max(file.stat().st_size for file in (drill.folder / "whole" / "model").glob("*.safetensors"))
    limit = model - 1000
    code, said = drill.run("limited", file_limit=limit)
    failures = _refused(code, said, ("no room to write this", "model", f"checkpoint-{STEPS:08d}"))
    failures += failures or drill.finishes("limited")[0]
    tried = "" if os.geteuid() == 0 else " (not root: no small file system to fill)"
    drill.judge("full disk", f"files of at most {limit:,} bytes (RLIMIT_FSIZE){tried}", said, failures)


def vanished(drill: Drill) -> None:
    """A shard of the corpus is gone on resume; it comes back."""
    corpus = drill.folder / "elsewhere" / "documents"
    shutil.copytree(drill.corpus, corpus)
    checkpoints = drill.unfinished("vanished")
    shard = next(corpus.glob("*.parquet"))
    shard.rename(drill.folder / "shard")
    code, said = drill.run("vanished", {"corpus": corpus})
    failures = _refused(code, said, (shard.name, "no longer there", _newest(checkpoints)))
    (drill.folder / "shard").rename(shard)
    failures += failures or drill.finishes("vanished", {"corpus": corpus})[0]
    drill.judge("vanished data", f"{shard.name} removed, later put back", said, failures)


def changed(drill: Drill) -> None:
    """Another learning rate, corpus, tokenizer or base on resume: refused, and nothing is touched."""
    model = drill.folder / "changed" / "model"
    if Path(drill.model).is_dir():
        shutil.copytree(drill.model, model)
        file = model / "tokenizer.json"
        said = json.loads(file.read_text())
        said["added_tokens"][-1]["special"] = not said["added_tokens"][-1]["special"]
        file.write_text(json.dumps(said))
        weights = drill.folder / "changed" / "weights"
        shutil.copytree(drill.model, weights / "model")
        content = bytearray((weights / "model" / "model.safetensors").read_bytes())
        content[-3] ^= 1
        (weights / "model" / "model.safetensors").write_bytes(content)
        others: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
            ("tokenizer", {"model": model}, {}, "tokenizer.json"),
            ("base weights", {"model": weights / "model"}, {}, "model.safetensors"),
        ]
    else:
        others = []
    other = drill.folder / "changed" / "documents"
    write_documents(other, 1, 300)
    others += [
        ("recipe", {}, {"learning_rate": 0.02}, "learning_rate"),
        ("corpus", {"corpus": other}, {}, "corpus"),
    ]
    for what, inputs, settings, word in others:
        out = f"changed-{what.replace(' ', '-')}"
        checkpoints = drill.unfinished(out)
        before = sorted(path.name for path in checkpoints.iterdir())
        code, said = drill.run(out, inputs, settings)
        failures = _refused(code, said, (word, _newest(checkpoints)))
        after = sorted(path.name for path in checkpoints.iterdir())
        failures += [] if after == before else ["checkpoints were touched"]
        failures += failures or drill.finishes(out)[0]
        drill.judge(f"changed {what}", "another one on resume; later the first again", said, failures)


def not_finite(drill: Drill) -> None:
    """A learning rate at which the second step has no finite loss."""
    from puna.train import offending

    code, said = drill.run("burst", settings={"learning_rate": 1e30, "warmup_steps": 0, "save_steps": 1})
    failures = _refused(code, said, ("is not finite", "offending", "last good checkpoint"))
    saved = sorted((drill.work("burst") / "offending").glob("*.safetensors"))
    if not saved or not len(offending.load(saved[0]).rows):
        failures.append("the batch was not saved")
    drill.judge("not finite", "learning_rate=1e30", said, failures)


FAULTS: dict[str, Callable[[Drill], None]] = {
    "kills": kills,
    "seed": same_seed,
    "evaluation": evaluation,
    "accumulation": accumulation,
    "damage": damaged,
    "disk": full_disk,
    "vanished": vanished,
    "changed": changed,
    "finite": not_finite,
}


# ---- helpers --------------------------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "COLUMNS": "400"}


def _result(folder: Path) -> dict[str, Any]:
    """All that a finished run left and no clock gave: SHA-256 of weights, counts, lines of metrics."""
    found: dict[str, Any] = {
        file.relative_to(folder).as_posix(): _content(file) for file in folder.rglob("*.safetensors")
    }
    state = json.loads((folder / "state" / "state.json").read_text())["state"]
    found["state"] = {key: value for key, value in state.items() if key != "seconds"}
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    found["metrics"] = [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]
    return found


def _content(file: Path) -> str:
    """A SHA-256 of a file's tensors by name: their order in it says nothing."""
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(file, framework="numpy") as tensors:
        for name in sorted(tensors.keys()):
            array = tensors.get_tensor(name)
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def _refused(code: int, said: str, words: Sequence[str]) -> list[str]:
    """What is wrong with a refusal: an exit code of 2, no traceback, and these words are demanded."""
    failures = [] if code == 2 else [f"exit code {code}, not 2"]
    failures += ["a traceback"] if "Traceback" in said else []
    flat = "".join(said.split())
    return failures + [f"does not say {word!r}" for word in words if "".join(word.split()) not in flat]


def _newest(checkpoints: Path) -> str:
    return sorted(path.name for path in checkpoints.glob("checkpoint-*"))[-1]


def _told(said: str) -> str:
    """The first line that names a fault, without what stands before it on every run."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    marks = ("is broken", "no room", "would be lost", "not finite", "not the file", "(")
    rows = "│┌├└┏┡"  # of the table at the start
    telling = (line for line in lines if line[0] not in rows and any(mark in line for mark in marks))
    return next(telling, "(nothing to say)")


def drill(folder: Path, *, model: str | None, count: int, seed: int, only: Sequence[str]) -> list[Verdict]:
    """Run the drill in an empty folder and return what became of each fault."""
    if model is None:
        tiny_model(folder / "model")
        model = str(folder / "model")
    write_documents(folder / "documents", 0, 300)
    write_documents(folder / "held_out", 2, 12)
    found = Drill(folder, model, count, random.Random(seed))
    code, said = found.run("whole")
    if code:
        raise SystemExit(f"the uninterrupted run failed:\n{said}")
    for name in only or FAULTS:
        FAULTS[name](found)
    return found.verdicts


def main() -> int:
    """Print the table; 1 if a fault was not met."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--quick", action="store_true", help="4 kills instead of 20")
    arguments.add_argument("--kills", type=int, help="how many kills")
    arguments.add_argument("--seed", type=int, default=0, help="of the moments and places, drawn at random")
    arguments.add_argument("--model", help="an asset or folder; a tiny Llama is made otherwise")
    arguments.add_argument("--only", action="append", choices=FAULTS, default=[], help="repeatable")
    given = arguments.parse_args()
    count = given.kills if given.kills is not None else 4 if given.quick else 20
    with tempfile.TemporaryDirectory(prefix="puna-faults-") as folder:
        verdicts = drill(Path(folder), model=given.model, count=count, seed=given.seed, only=given.only)
        table = Table("fault", "what was done", "what puna said", "verdict", title="faults", show_lines=True)
        for verdict in verdicts:
            said = verdict.said.replace(folder, "")
            met = Text("; ".join(verdict.failures), style="red") if verdict.failures else Text("met")
            table.add_row(verdict.fault, Text(verdict.done), Text(said), met)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    failed = sum(bool(verdict.failures) for verdict in verdicts)
    console.print(f"{len(verdicts) - failed} of {len(verdicts)} met")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
