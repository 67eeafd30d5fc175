"""What works on this machine: Python, torch, memory, disk, packages by extra, assets in the cache."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Literal

from puna import __version__
from puna.core import assets
from puna.core.hardware import total_memory
from puna.run import machine

State = Literal["works", "missing", "note"]
_NEEDED_MEMORY = 4e9
_NEEDED_DISK = 5e9


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: what was looked at, its state, what was found."""

    what: str
    state: State
    found: str


def examine(*, hub: bool = False) -> list[Finding]:
    """Look at everything; the hub is asked for only with ``hub``, since that needs the network."""
    findings = [
        Finding("puna", "works", __version__),
        Finding("python", "works", f"{platform.python_version()} on {platform.platform()}"),
        Finding("processor", "works", f"{machine.cpu_name()}, {machine.usable_cores()} cores"),
        _memory(),
        *_torch(),
        *_packages(),
        _disk(),
        *_assets(),
    ]
    return [*findings, _hub()] if hub else findings


def _memory() -> Finding:
    total = total_memory()
    enough = total >= _NEEDED_MEMORY
    advice = "" if enough else f"; the demo wants {_NEEDED_MEMORY / 1e9:.0f} GB"
    return Finding("memory", "works" if enough else "note", f"{total / 1e9:.1f} GB{advice}")


def _torch() -> list[Finding]:
    import torch

    findings = [Finding("torch", "works", f"{torch.__version__}, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        findings.append(Finding("gpu", "works", ", ".join(names)))
    else:
        findings.append(Finding("gpu", "note", "none that torch sees; everything runs on the processor"))
    capability = torch.backends.cpu.get_cpu_capability()
    unit = machine.bfloat16_unit()
    speed = f"in hardware ({unit})" if unit else "without a unit of its own: dtype auto is float32"
    findings.append(Finding("bfloat16", "works" if unit else "note", f"{speed}; torch uses {capability}"))
    return findings


def _packages() -> list[Finding]:
    """The packages that puna's own metadata asks for, needed ones and those of each extra."""
    findings: list[Finding] = []
    try:
        requirements = importlib.metadata.requires("puna") or []
    except importlib.metadata.PackageNotFoundError:
        return [
            Finding("packages", "note", "puna is not installed as a package; its requirements are unknown")
        ]
    for requirement in requirements:
        name = re.split(r"[\s<>=!~;\[(]", requirement, maxsplit=1)[0]
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if name == "puna" or (extra and extra.group(1) == "test"):
            continue
        label = f"extra {extra.group(1)}: {name}" if extra else name
        try:
            findings.append(Finding(label, "works", importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            how = f"pip install 'puna[{extra.group(1)}]'" if extra else "pip install puna"
            findings.append(Finding(label, "note" if extra else "missing", how))
    return findings


def _disk() -> Finding:
    folder = assets.cache_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    state: State = "works" if free >= _NEEDED_DISK else "note"
    return Finding("cache", state, f"{folder}, {free / 1e9:.0f} GB free")


def _assets() -> list[Finding]:
    there = [name for name in assets.names() if assets.local(assets.describe(name)) is not None]
    absent = [name for name in assets.names() if name not in there]
    findings = [Finding("assets here", "works", ", ".join(there) or "none")]
    if absent:
        findings.append(
            Finding("assets not fetched", "note", f"{', '.join(absent)} (puna assets fetch NAME)")
        )
    return findings


def _hub() -> Finding:
    from huggingface_hub.constants import ENDPOINT

    try:
        with urllib.request.urlopen(ENDPOINT, timeout=5) as answer:
            return Finding("hub", "works", f"{ENDPOINT} answers ({answer.status})")
    except (urllib.error.URLError, OSError) as error:
        return Finding(
            "hub", "note", f"{ENDPOINT} does not answer: {error}; assets and folders work without it"
        )
