"""What a device can do: published figures for well-known ones, measured ones for this machine."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from puna.core import assets
from puna.core.errors import PunaError, nearest
from puna.core.files import read_json, write_json
from puna.core.hardware import total_memory
from puna.run import machine, source

_TABLE = Path(__file__).parent / "devices.yaml"
_DTYPES = ("float32", "bfloat16")
_CACHE = "device.json"
_FORMAT = 2  # of the cached measurement


@dataclass(frozen=True)
class DeviceProfile:
    """A device for plans.

    ``flops`` is its peak rate of matrix products by dtype (operations per second), ``share`` the part
    of it that training achieves, ``memory`` and ``process`` (what a process takes besides tensors)
    are bytes, ``bandwidth`` is bytes per second.
    """

    name: str
    says: str
    flops: Mapping[str, float]
    share: Mapping[str, float]
    memory: float
    bandwidth: float
    process: float
    measured: bool = False

    @property
    def quicker_dtype(self) -> str:
        """What "auto" means there: bfloat16 unless its products run no faster than those of float32."""
        return "bfloat16" if self.flops["bfloat16"] > self.flops["float32"] else "float32"

    def rate(self, dtype: str) -> float:
        """Operations per second that training achieves in ``dtype``."""
        known = dtype if dtype in self.flops else "float32"
        return self.flops[known] * self.share[known]

    def seconds(self, flops: float, dtype: str) -> float:
        """Time for ``flops`` operations of training or of a forward pass over many tokens."""
        return flops / self.rate(dtype)

    def read_seconds(self, size: float) -> float:
        """Time to read ``size`` bytes from memory, which bounds decoding one token at a time."""
        return size / self.bandwidth

    def assumptions(self, dtype: str) -> str:
        """What a plan takes for granted about this device, in one sentence."""
        known = dtype if dtype in self.flops else "float32"
        how = "measured here" if self.measured else "published peak, assumed share"
        return (
            f"{self.name}: {self.says}; {known} {self.flops[known] / 1e12:.3g} TFLOP/s of which "
            f"{self.share[known]:.0%} achieved ({how}), memory {self.memory / 1e9:.0f} GB at "
            f"{self.bandwidth / 1e9:.0f} GB/s, {self.process / 1e9:.1f} GB for the process"
        )


@functools.cache
def published() -> dict[str, DeviceProfile]:
    """The devices of devices.yaml by name."""
    found = {}
    for name, fields in source.read(_TABLE).value.items():
        share = dict.fromkeys(fields["flops"], fields["share"])
        found[name] = DeviceProfile(name=name, **{**fields, "share": share})
    return found


def profile(name: str, *, measure_again: bool = False) -> DeviceProfile:
    """A device by name: "cpu", "cuda" or "this" for what is here (measured), else one of devices.yaml."""
    if name in ("this", "cpu", "cuda"):
        return this_machine(machine.choose_device("auto" if name == "this" else name), again=measure_again)
    table = published()
    for known in (name, f"cuda:{name}", f"cpu:{name}"):
        if known in table:
            return table[known]
    close = nearest(name, table)
    raise PunaError(
        f"unknown device {name!r}",
        expected=f"this, cpu, cuda, or one of {', '.join(table)}",
        fix=f"did you mean {close!r}?" if close else None,
    )


def this_machine(device: str = "cpu", *, again: bool = False) -> DeviceProfile:
    """Profile of ``device`` on this machine; measured in about two seconds, then kept in the user's cache."""
    import torch

    key = {
        "format": _FORMAT,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else machine.cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    file = assets.cache_folder() / _CACHE
    kept: dict[str, Any] = read_json(file) if file.is_file() else {}
    if not again and kept.get("key") == key:
        return DeviceProfile(**kept["profile"])
    measured = _measure(device, str(key["device"]))
    write_json(file, {"key": key, "profile": asdict(measured)})
    return measured


def _measure(device: str, name: str) -> DeviceProfile:
    import torch

    flops, share = {}, {}
    for dtype in _DTYPES:
        kind = getattr(torch, dtype)
        flops[dtype] = _matmul_rate(device, kind)
        share[dtype] = min(1.0, _training_rate(device, kind) / flops[dtype])
    flops["float16"], share["float16"] = flops["bfloat16"], share["bfloat16"]
    if device.startswith("cuda"):
        memory, process = float(torch.cuda.get_device_properties(device).total_memory), 1e9
    else:
        memory, process = float(total_memory()), float(machine.resident_memory())
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    return DeviceProfile(
        name="this",
        says=f"{name}{threads}",
        flops=flops,
        share=share,
        memory=memory,
        bandwidth=_bandwidth(device),
        process=process,
        measured=True,
    )


def _best(action: Callable[[], Any], device: str, repetitions: int) -> float:
    """Seconds of the quickest of several repetitions; neighbours on the machine only ever slow it down."""
    import torch

    action()
    quickest = float("inf")
    for _ in range(repetitions):
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        quickest = min(quickest, time.perf_counter() - start)
    return quickest


def _matmul_rate(device: str, dtype: Any) -> float:
    """Operations per second of a matrix product large enough to hide everything else."""
    import torch

    size = 8192 if device.startswith("cuda") else 1024
    left, right = torch.ones(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / _best(lambda: left @ right, device, 5)


def _bandwidth(device: str) -> float:
    """Bytes per second of a copy: what is read and what is written."""
    import torch

    block = torch.zeros(2**26, device=device, dtype=torch.float32)
    target = torch.empty_like(block)
    return 2 * block.nbytes / _best(lambda: target.copy_(block), device, 3)


def _training_rate(device: str, dtype: Any) -> float:
    """Operations per second of a training step of two layers of our decoder, forward and backward.

    Layers of SmolLM2-135M on a CPU, of a 7B Llama on a GPU, with a small vocabulary.
    """
    import torch

    from puna.core.seeds import torch_generator
    from puna.model.llama import Llama
    from puna.model.spec import BlockSpec, LlamaSpec

    if device.startswith("cuda"):
        hidden, block, rows, time_ = 4096, BlockSpec(heads=32, kv_heads=8, head_dim=128, width=14336), 4, 2048
    else:
        hidden, block, rows, time_ = 576, BlockSpec(heads=9, kv_heads=3, head_dim=64, width=1536), 1, 512
    spec = LlamaSpec(vocab_size=1024, hidden_size=hidden, blocks=(block, block), tied=True)
    model = Llama(
        spec, dtype=dtype, device=device, generator=torch_generator(0, "device profile", device=device)
    )
    ids = torch.zeros(rows, time_, dtype=torch.int64, device=device)

    def step() -> None:
        torch.autograd.backward(model.hidden(ids).float().square().mean())

    weights = 2 * block.parameter_count(hidden, "none", False)
    attention = 2 * 6 * block.heads * block.head_dim * time_
    operations = rows * time_ * (6 * weights + attention)
    return operations / _best(step, device, 3)
