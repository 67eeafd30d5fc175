"""What the training benchmark runs: works, peers with their candidate settings, bars, operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import training_rows as rows_of

if TYPE_CHECKING:
    from puna.model.spec import LlamaSpec

LORA: dict[str, Any] = {"r": 16, "alpha": 32}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Peer:
    """One way to run the peer.

    ``rows`` are the packed rows of a forward pass (0: all documents of a step, unpacked and padded);
    ``arguments`` go to its configuration, ``dtype`` is what its weights are opened in.
    """

    name: str
    trainer: str  # sft, dpo or plain
    rows: int
    arguments: dict[str, Any]
    dtype: str = "bfloat16"
    comparable: bool = True  # whether its precision is puna's; others are shown as information


@dataclass(frozen=True)
class Work:
    """One line of the requirement: what is trained, against whom, and the bars."""

    name: str
    says: str
    kind: str
    settings: dict[str, Any]
    peers: tuple[Peer, ...]
    speed: float  # supervised tokens per second, at least so many times the peer's
    memory: float  # peak memory, at most so much of the peer's
    folder_of_model: str = ""  # another model than SmolLM2-135M
    dtype: str = "bfloat16"  # what both sides compute in

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step."""
        return int(self.settings["batch_tokens"])

    @property
    def packed(self) -> bool:
        """Whether every step must hold the same number of packed rows, for the peer to accumulate."""
        return any(peer.rows for peer in self.peers)


COMMON: dict[str, Any] = {"schedule": "constant", "seed": rows_of.SEED}
NO_CHECKPOINTS = {"gradient_checkpointing": False}
PACKED = {"packing": True, "packing_strategy": "bfd", "max_length": 1024}
WRAPPED = {**PACKED, "packing_strategy": "wrapped", **NO_CHECKPOINTS}

SFT = Work(
    name="lora-sft",
    says="LoRA r=16 on all linear layers, chat rows of mixed length; trl SFTTrainer + peft, packed",
    kind="messages",
    settings={
        **COMMON,
        "objective": "sft",
        "lora": LORA,
        "learning_rate": 1e-3,
        "batch_tokens": 2048,
        "micro_batch_tokens": 1024,
        "max_length": 1024,
    },
    peers=(
        Peer("bfd, 1 row at once", "sft", 1, {**PACKED, **NO_CHECKPOINTS}),
        Peer("bfd, 2 rows at once", "sft", 2, {**PACKED, **NO_CHECKPOINTS}),
        Peer("wrapped, 2 rows at once", "sft", 2, WRAPPED),
    ),
    speed=2.0,
    memory=0.6,
)
DEFAULTS = dataclasses.replace(
    SFT,
    name="lora-sft-defaults",
    says="the same, steps of 2048 tokens (8 conversations or so); trl SFTTrainer as SFTConfig() has it",
    settings={**SFT.settings, "batch_tokens": 2048},
    peers=(Peer("defaults, all rows of a step padded", "sft", 0, {}),),
    speed=3.0,
    memory=0.5,
)
FULL = Work(
    name="full-cpt",
    says="all weights, 2 packed rows of 1024 a step; transformers Trainer, float32 masters on both sides",
    kind="documents",
    settings={
        **COMMON,
        "objective": "clm",
        "learning_rate": 1e-4,
        "batch_tokens": 2048,
        "micro_batch_tokens": 1024,
        "max_length": 1024,
    },
    peers=(
        Peer("2 rows at once, float32 weights", "plain", 2, {"bf16": True}, dtype="float32"),
        Peer("1 row at once, float32 weights", "plain", 1, {"bf16": True}, dtype="float32"),
        Peer("bfloat16 weights, no masters", "plain", 2, {"bf16": False}, comparable=False),
    ),
    speed=1.7,
    memory=0.6,
)
DPO = Work(
    name="dpo",
    says="DPO with LoRA r=16, beta 0.1; trl DPOTrainer + peft",
    kind="preferences",
    settings={
        **COMMON,
        "objective": "dpo",
        "beta": 0.1,
        "lora": LORA,
        "learning_rate": 1e-4,
        "batch_tokens": 2048,
        "micro_batch_tokens": 1024,
        "max_length": 1024,
    },
    peers=(
        Peer("4 pairs at once", "dpo", 4, NO_CHECKPOINTS),
        Peer("2 pairs at once", "dpo", 2, NO_CHECKPOINTS),
        Peer("2 pairs, reference ahead", "dpo", 2, {**NO_CHECKPOINTS, "precompute_ref_log_probs": True}),
    ),
    speed=2.0,
    memory=0.5,
)


def computed_in(dtype: str, work: Work) -> Work:
    """The same work with both sides computing in ``dtype``.

    Where the processor has no unit for bfloat16, products in it are ten times slower than in float32
    for either side: the peer's own default of bfloat16 is then turned off too.
    """
    if dtype == "bfloat16":
        return work
    peers = tuple(
        dataclasses.replace(peer, dtype=dtype, arguments={**peer.arguments, "bf16": False})
        for peer in work.peers
        if peer.comparable
    )
    return dataclasses.replace(work, peers=peers, dtype=dtype)


WORKS = {work.name: work for work in (SFT, DEFAULTS, FULL, DPO)}
PAIRS_PER_STEP = 4


def of_length(length: int) -> Work:
    """LoRA on one row of ``length`` tokens per step, for the table of growth."""
    sizes = {"batch_tokens": length, "micro_batch_tokens": length, "max_length": length}
    packed = {**PACKED, "max_length": length}
    return dataclasses.replace(
        SFT,
        name=f"length-{length}",
        says=f"LoRA r=16, one document of {length} tokens per step",
        kind="documents",
        settings={**SFT.settings, "objective": "clm", **sizes},
        peers=(Peer("bfd, 1 row at once", "sft", 1, {**packed, **NO_CHECKPOINTS}),),
    )


def shape(hidden: int, width: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """Changes of SmolLM2-135M's config.json; heads keep their 64 numbers."""
    return {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
    }


SIZES: dict[str, dict[str, Any]] = {
    "40M": shape(384, 1024, 12, 6, 2),
    "135M": {},
    "362M": shape(960, 2560, 32, 15, 5),
    "1.1B": shape(2048, 5632, 22, 32, 4),
}
"""Shapes for the table of growth with size, all with SmolLM2's vocabulary: 362M is SmolLM2-360M's shape, 1.1B
TinyLlama's."""


def of_size(name: str) -> Work:
    """LoRA on one row of 1024 tokens per step, on a model of another size."""
    work = of_length(1024)
    return dataclasses.replace(
        work,
        name=f"size-{name}",
        says=f"LoRA r=16 on a model of {name} weights, one document of 1024 tokens per step",
        folder_of_model=name if SIZES[name] else "",
    )


def method_of(work: Work) -> Any:
    """What the work trains, for puna's count of operations."""
    from puna.train.plan import Method

    return Method(LORA["r"], 0.0, LINEAR, ()) if "lora" in work.settings else Method()


def operations(spec: LlamaSpec, work: Work, steps: Sequence[rows_of.Step]) -> float:
    """Floating-point operations that some steps need, whoever does them.

    Each document attends to itself only, and the head is needed where a token is learnt. DPO needs
    a forward pass of the reference too.
    """
    from puna.train.plan import forward_operations, training_operations

    method = method_of(work)
    trained = method.trains_head(spec)
    head = (6 if trained else 4) * spec.vocab_size * spec.hidden_size
    total = 0.0
    for document in (document for step in steps for row in step for document in row):
        length, idle = len(document.ids), len(document.ids) - document.targets
        total += length * training_operations(spec, method, length) - idle * head
        if work.kind == "preferences":
            forward = 2 * spec.vocab_size * spec.hidden_size
            total += length * forward_operations(spec, length) - idle * forward
    return total


@dataclass(frozen=True)
class Prepared:
    """A work with everything on disk: the model, the corpus, the steps of puna's feed."""

    work: Work
    folder: Path
    model: Path
    corpus: Path
    steps_file: Path
    steps: list[rows_of.Step]
    notes: list[str] = field(default_factory=list)


def prepare(work: Work, folder: Path, count: int) -> Prepared:
    """Write the corpus for ``count`` steps of a work, and the steps for the peer."""
    model = rows_of.model_folder(folder)
    if work.folder_of_model:
        model = rows_of.drawn_model(folder, work.folder_of_model, SIZES[work.folder_of_model])
    if work.kind == "preferences":
        return _prepare_pairs(work, folder, model, count)
    rows = list(rows_of.ROWS[work.kind](folder, model, (count + 1) * work.batch_tokens))
    packed = rows_of.packed_rows(model, work.kind, rows, work.settings)
    most = work.batch_tokens // int(work.settings["max_length"])
    if work.packed:  # rows so full that a step never has one more
        rows = rows_of.without_short_rows(packed, rows, work.batch_tokens / (most + 1))
        packed = rows_of.packed_rows(model, work.kind, rows, work.settings)
    steps = rows_of.planned_steps(packed, work.settings)[:count]
    if len(steps) < count:
        raise SystemExit(f"{work.name}: the rows make {len(steps)} steps, not {count}")
    if work.packed and any(len(step) != most for step in steps):
        raise SystemExit(f"{work.name}: not every step has {most} rows")
    return _written(work, folder, model, rows, steps)


def _prepare_pairs(work: Work, folder: Path, model: Path, count: int) -> Prepared:
    """Preference pairs; a step of the peer has a fixed number of them, a step of puna a number of tokens.

    Both run through all of them once.
    """
    wanted = count * PAIRS_PER_STEP
    drawn = list(rows_of.preference_rows(folder, model, 6 * wanted * rows_of.MEAN_TOKENS))
    pieces = rows_of.encoded(model, work.kind, drawn)
    documents = [rows_of.completion(one.ids, one.trained) for one in pieces]
    longest = int(work.settings["max_length"])
    both = zip(drawn, documents[::2], documents[1::2], strict=True)
    fitting = [(row, (one, two)) for row, one, two in both if len(one.ids) + len(two.ids) <= longest]
    if len(fitting) < wanted:
        raise SystemExit(f"{work.name}: {len(fitting)} pairs fit, not {wanted}")
    rows, pairs = [row for row, _ in fitting[:wanted]], [pair for _, pair in fitting[:wanted]]
    steps: list[rows_of.Step] = [
        tuple(pairs[start : start + PAIRS_PER_STEP]) for start in range(0, len(pairs), PAIRS_PER_STEP)
    ]
    return _written(work, folder, model, rows, steps)


def _written(
    work: Work, folder: Path, model: Path, rows: list[dict[str, Any]], steps: list[rows_of.Step]
) -> Prepared:
    corpus = rows_of.write_rows(folder, f"corpus-{work.name}", work.kind, rows)
    steps_file = folder / f"steps-{work.name}.json"
    rows_of.write_steps(steps_file, steps)
    return Prepared(work, folder, model, corpus, steps_file, steps, _notes(work, steps))


def _notes(work: Work, steps: Sequence[rows_of.Step]) -> list[str]:
    counts = rows_of.counted(steps)
    lengths = [len(document.ids) for step in steps for row in step for document in row]
    return [
        f"{work.says}",
        f"documents: {rows_of.distribution(lengths)}",
        f"{len(steps)} steps, {counts['tokens'] / len(steps):.0f} tokens each, "
        f"{counts['targets'] / counts['tokens']:.0%} of them learnt",
    ]
