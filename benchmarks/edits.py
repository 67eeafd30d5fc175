"""Merging against mergekit: the same files of the same form, fresh processes in turn, medians and ratios.

    python -m benchmarks.edits [--mergekit PYTHON] [--sizes 135m 1b] [--methods linear ties dare_ties slerp]

``--mergekit`` is the Python of an environment in which mergekit is installed; without it puna is told alone.
135m are SmolLM2-135M-Instruct and two siblings, 1b three models of TinyLlama's shape with random weights; all
in bfloat16, and so is what is written. Siblings differ from the base by noise of a hundredth of its weights:
the time of a merge does not depend on what the weights say, but for how many are equal. mergekit computes in
the type it reads, puna in float32. Memory is the peak of the whole process, libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

METHODS = ("linear", "ties", "dare_ties", "slerp")
TINYLLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WORKER = Path(__file__).parent / "peers" / "merging.py"


def make_models(size: str, folder: Path) -> list[Path]:
    """A base and two siblings as checkpoint folders in bfloat16; what is there is taken."""
    import torch

    from puna.core import assets
    from puna.core.seeds import torch_generator
    from puna.model.hf import write_configs
    from puna.model.spec import LlamaSpec
    from puna.model.tensor_writer import TensorWriter
    from puna.model.weights import expected_shapes
    from puna.text.stored_weights import Weights, parts_of

    base = Weights.open(assets.fetch("smollm2-135m-instruct")) if size == "135m" else None
    spec = LlamaSpec.from_config(TINYLLAMA) if base is None else base.spec
    shapes = expected_shapes(spec, size)
    paths = [folder / f"{size}-{name}" for name in ("base", "one", "two")]
    for number, path in enumerate(paths):
        if (path / "done").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        write_configs(spec, torch.bfloat16, path)
        with TensorWriter(path, shapes, torch.bfloat16) as writer:
            for name, shape in shapes.items():
                generators = [torch_generator(0, size, name), torch_generator(number, size, name, "sibling")]
                for start, stop in parts_of(shape):
                    drawn = torch.randn(stop - start, generator=generators[0]) * 0.02
                    weights = drawn if base is None else base.part(name, start, stop)
                    if number:
                        weights += torch.randn(stop - start, generator=generators[1]) * 0.01 * weights.std()
                    writer.add(name, weights)
        (path / "done").touch()
    return paths


def config_of(method: str, paths: list[Path]) -> dict[str, Any]:
    """A file of mergekit's form, the same for both sides."""
    base, one, two = map(str, paths)
    data: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    if method == "slerp":
        return {**data, "base_model": one, "models": [{"model": two}], "parameters": {"t": 0.4}}
    shared = {} if method == "linear" else {"density": 0.3}
    models = [
        {"model": path, "parameters": {"weight": weight, **shared}}
        for path, weight in ((one, 0.6), (two, 0.4))
    ]
    return {**data, **({} if method == "linear" else {"base_model": base}), "models": models}


def run(python: str, side: str, config: Path, out: Path) -> dict[str, float]:
    """The figures of one fresh process."""
    shutil.rmtree(out, ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() or 1), "HF_HUB_OFFLINE": "1"}
    command = [python, str(WORKER), side, str(config), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr.strip().splitlines()[-1:]}")
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def main() -> None:
    """Print the table as it grows, and the ratios."""
    from rich.console import Console

    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--mergekit", metavar="PYTHON")
    arguments.add_argument("--sizes", nargs="+", default=["135m", "1b"], choices=["135m", "1b"])
    arguments.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    arguments.add_argument("--runs", type=int, default=3)
    arguments.add_argument("--folder", type=Path, help="keep the models there; else they are made each time")
    asked = arguments.parse_args()
    console = Console(width=130)
    sides = {"puna": sys.executable, **({"mergekit": asked.mergekit} if asked.mergekit else {})}
    if not asked.mergekit:
        console.print("mergekit: not measured; give its environment's Python with --mergekit")
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.folder or Path(scratch)
        for size in asked.sizes:
            paths = make_models(size, folder)
            for method in asked.methods:
                config = folder / f"{size}-{method}.yml"
                config.write_text(yaml.safe_dump(config_of(method, paths)), encoding="utf-8")
                found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
                for _ in range(asked.runs):
                    for side, python in sides.items():
                        found[side].append(run(python, side, config, folder / f"{size}-{side}-out"))
                tell(console, f"{size} {method}", found)


def tell(console: Any, title: str, found: dict[str, list[dict[str, float]]]) -> None:
    """One line a side: medians, and mergekit's over puna's."""
    median = {
        side: {key: statistics.median(one[key] for one in figures) for key in figures[0]}
        for side, figures in found.items()
    }
    for side, figures in median.items():
        console.print(
            f"{title:16} {side:9} merge {figures['seconds']:7.2f} s, with imports {figures['whole']:7.2f} s; "
            f"peak {figures['peak'] / 1e9:5.2f} GB, of it imports {figures['imports'] / 1e9:.2f}"
        )
    if "mergekit" in median:
        ratios = [
            theirs["seconds"] / ours["seconds"]
            for ours, theirs in zip(found["puna"], found["mergekit"], strict=True)
        ]
        memory = median["puna"]["peak"] / median["mergekit"]["peak"]
        console.print(
            f"{'':16} mergekit / puna: {statistics.median(ratios):.1f}x the time "
            f"({min(ratios):.1f} to {max(ratios):.1f}); puna / mergekit: {memory:.2f} of the memory"
        )


if __name__ == "__main__":
    main()
