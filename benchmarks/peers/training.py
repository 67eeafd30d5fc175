"""The peer of the training benchmark in a process of its own: trl's or transformers' trainer on given rows.

    python -m benchmarks.peers.training JOB.json

The job names the model, the file of steps, the peer's settings and where the result goes. The trainer and
its collator are the library's; only the order of the rows is given, so that each step learns from what
puna's step learns from. Batches are kept and told as fingerprints afterwards, outside what is timed.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from benchmarks import training_rows as rows_of
from puna.core.files import fingerprint, write_json

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Clock(TrainerCallback):
    """Seconds of each optimiser step: forward, backward, clipping and update, without fetching rows."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """A step begins; its rows are there."""
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """The update is done."""
        self.seconds.append(time.perf_counter() - self._start)


def given_order(trainer: type[Any], groups: list[list[int]], batches: list[Any]) -> type[Any]:
    """The trainer with a loader that hands out these groups of rows and keeps the batches it made."""

    class Ordered(trainer):  # type: ignore[misc]
        """Rows in a given order."""

        precomputing = 0.0

        def get_train_dataloader(self) -> Any:
            """The library's collator over the given groups."""
            collate = self.data_collator

            def keep(rows: list[Any]) -> Any:
                batch = collate(rows)
                batches.append(dict(batch))
                return batch

            return self.accelerator.prepare(
                DataLoader(self.train_dataset, batch_sampler=groups, collate_fn=keep)  # type: ignore[arg-type]
            )

        def _precompute_ref_logps(self, *arguments: Any) -> Any:
            start = time.perf_counter()
            found = super()._precompute_ref_logps(*arguments)
            Ordered.precomputing += time.perf_counter() - start
            return found

    return Ordered


def packed_dataset(steps: list[rows_of.Step], unpacked: bool) -> tuple[Dataset, list[list[int]]]:
    """Rows as trl's preparation leaves them, and the indices of each step's rows."""
    rows: list[dict[str, Any]] = []
    groups: list[list[int]] = []
    for step in steps:
        pieces = [(document,) for row in step for document in row] if unpacked else list(step)
        groups.append(list(range(len(rows), len(rows) + len(pieces))))
        for row in pieces:
            ids = [token for document in row for token in document.ids]
            labels = [
                token if learnt and place else -100
                for document in row
                for place, (token, learnt) in enumerate(zip(document.ids, document.trained, strict=True))
            ]
            lengths = [len(document.ids) for document in row]
            rows.append({"input_ids": ids, "labels": labels, "seq_lengths": lengths})
    return Dataset.from_list(rows), groups


def split(groups: list[list[int]], at_once: int) -> tuple[list[list[int]], int]:
    """Each step's rows in forward passes of ``at_once`` rows, and how many of them a step has."""
    if not at_once:
        return groups, 1
    passes = [group[start : start + at_once] for group in groups for start in range(0, len(group), at_once)]
    count = math.ceil(len(groups[0]) / at_once)
    if len(passes) != count * len(groups):
        raise SystemExit("the steps differ in their number of forward passes")
    return passes, count


def common(job: dict[str, Any], accumulation: int, at_once: int) -> dict[str, Any]:
    """What must be the same on both sides; nothing else is set that the peer's settings do not name."""
    return {
        "output_dir": job["out"],
        "max_steps": job["count"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "per_device_train_batch_size": at_once or 8,
        "gradient_accumulation_steps": accumulation,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": rows_of.SEED,
        "use_cpu": True,
        "disable_tqdm": True,
        **job["arguments"],
    }


def adapter(job: dict[str, Any]) -> LoraConfig:
    """The same adapter as puna's."""
    return LoraConfig(
        r=job["lora"]["r"],
        lora_alpha=job["lora"]["alpha"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def opened(job: dict[str, Any]) -> Any:
    """The model in the dtype of the peer's settings."""
    return AutoModelForCausalLM.from_pretrained(job["model"], dtype=DTYPES[job["dtype"]])


def sft(job: dict[str, Any], steps: list[rows_of.Step], batches: list[Any]) -> Any:
    """trl's SFTTrainer."""
    data, groups = packed_dataset(steps, unpacked=not job["rows"])
    passes, accumulation = split(groups, job["rows"])
    arguments = SFTConfig(
        **common(job, accumulation, job["rows"]), dataset_kwargs={"skip_prepare_dataset": True}
    )
    return given_order(SFTTrainer, passes, batches)(
        model=opened(job),
        args=arguments,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=adapter(job),
    )


def plain(job: dict[str, Any], steps: list[rows_of.Step], batches: list[Any]) -> Any:
    """transformers' Trainer on packed rows of one document each."""
    data, groups = packed_dataset(steps, unpacked=False)
    passes, accumulation = split(groups, job["rows"])

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}

    return given_order(Trainer, passes, batches)(
        model=opened(job),
        args=TrainingArguments(**common(job, accumulation, job["rows"]), remove_unused_columns=False),
        train_dataset=data,
        data_collator=collate,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
    )


def pair(step_row: rows_of.Row) -> dict[str, list[int]]:
    """A preference pair as trl's preparation leaves it."""
    chosen, rejected = step_row
    start = chosen.trained.index(True)
    if chosen.ids[:start] != rejected.ids[:start] or rejected.trained.index(True) != start:
        raise SystemExit("the two sides of a pair have different prompts")
    return {
        "prompt_ids": list(chosen.ids[:start]),
        "chosen_ids": list(chosen.ids[start:]),
        "rejected_ids": list(rejected.ids[start:]),
    }


def dpo(job: dict[str, Any], steps: list[rows_of.Step], batches: list[Any]) -> Any:
    """trl's DPOTrainer on pairs of given ids."""
    ends = [sum(len(step) for step in steps[: number + 1]) for number in range(len(steps))]
    groups = [list(range(end - len(step), end)) for end, step in zip(ends, steps, strict=True)]
    passes, accumulation = split(groups, job["rows"])

    class Given(given_order(DPOTrainer, passes, batches)):  # type: ignore[misc]
        """Rows that are tokenised already."""

        def _prepare_dataset(self, dataset: Any, *others: Any) -> Any:
            return dataset

    return Given(
        model=opened(job),
        args=DPOConfig(**common(job, accumulation, job["rows"]), beta=job["beta"]),
        train_dataset=Dataset.from_list([pair(row) for step in steps for row in step]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=adapter(job),
    )


TRAINERS = {"sft": sft, "plain": plain, "dpo": dpo}


def documents_of(batch: dict[str, Any]) -> list[str]:
    """Fingerprints of the documents in a batch, with what is learnt of each."""
    found: list[str] = []
    for number, ids in enumerate(batch["input_ids"]):
        if "completion_mask" in batch:
            learnt = batch["completion_mask"][number].bool()
        else:
            learnt = batch["labels"][number] != -100
        kept = (
            batch["attention_mask"][number].bool() if "attention_mask" in batch else torch.ones_like(learnt)
        )
        ids, learnt = ids[kept], learnt[kept]
        starts = [0]
        if "position_ids" in batch:
            starts = (batch["position_ids"][number] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            found.append(rows_of.digest(ids[start:end].tolist(), learnt[start:end].tolist()))
    return found


def fed(batches: list[dict[str, Any]], accumulation: int) -> list[str]:
    """A fingerprint of the documents of each step."""
    passes = [documents_of(batch) for batch in batches]
    return [
        fingerprint(sorted(one for many in passes[start : start + accumulation] for one in many))
        for start in range(0, len(passes), accumulation)
    ]


def main() -> None:
    """Train, save as puna does, and write what happened."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    steps = rows_of.read_steps(Path(job["steps"]))[: job["count"]]
    batches: list[Any] = []
    trainer = TRAINERS[job["trainer"]](job, steps, batches)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    trainer.save_model(str(Path(job["out"]) / "model"))
    accumulation = trainer.args.gradient_accumulation_steps
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    write_json(
        Path(job["result"]),
        {
            "seconds": clock.seconds,
            "losses": losses,
            "precomputing": type(trainer).precomputing,
            "fed": fed(batches[: accumulation * job["count"]], accumulation),
            "settings": {
                "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
                "gradient_accumulation_steps": accumulation,
                "gradient_checkpointing": trainer.args.gradient_checkpointing,
                "bf16": trainer.args.bf16,
                "optim": str(trainer.args.optim),
                "attention": trainer.model.config._attn_implementation,
                "weights": sorted({str(p.dtype) for p in trainer.model.parameters() if not p.requires_grad}),
                "trained": sorted({str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}),
            },
        },
    )


if __name__ == "__main__":
    main()
