"""What the fault drill runs on: a small model, small corpora, and a disk that fills up."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def little_disk(place: Path, size: int) -> Iterator[Callable[[int], None] | None]:
    """A small file system at ``place``, and a function that makes it larger; None where we may not mount."""
    place.mkdir()
    mounted = False
    if os.geteuid() == 0 and shutil.which("mount"):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
        mounted = not subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode

    def grow(larger: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={larger}", str(place)], check=True)

    try:
        yield grow if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def write_documents(folder: Path, seed: int, count: int) -> None:
    """A corpus of short documents of drawn words."""
    from puna.data.corpus import write_corpus

    draws = random.Random(seed)
    words = "the cat and other sat on that mat in then it went red moon".split()  # noqa: SIM905 - to be read
    rows = (
        {
            "id": f"{folder.name}{number}",
            "text": " ".join(draws.choices(words, k=draws.randint(4, 40))),
            "source": "drill",
            "language": "en",
        }
        for number in range(count)
    )
    about = {"provenance": [{"source": "drill", "licence": "CC0"}], "ledger": {}}
    write_corpus(folder, "documents", rows, **about)


def tiny_model(folder: Path, *, positions: int = 128) -> None:
    """A Llama of 0.2M parameters with a byte-level tokenizer, drawn at random."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    import puna
    from puna.core.seeds import torch_generator
    from puna.model.llama import Llama
    from puna.model.spec import BlockSpec, LlamaSpec
    from puna.text.tokenizer import Tokenizer

    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>", "<spare>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the cat and the other cat sat on that mat in the end"] * 9, trainer)
    tokenizer = Tokenizer(core, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    block = BlockSpec(heads=4, kv_heads=2, head_dim=16, width=192)
    spec = LlamaSpec(tokenizer.vocab_size, 64, (block,) * 4, tied=True, max_positions=positions)
    model: Any = Llama(spec, generator=torch_generator(0, "drill"))
    model.tokenizer = tokenizer
    puna.save(model, folder)
