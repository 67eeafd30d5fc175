"""Compiling the native kernels: on lesser processors, without a compiler, side by side."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.core.errors import PunaError
from puna.model.native import build
from puna.model.native.stepper import NativeStepper
from tests.model.native_models import SPECS, cut, hidden_of, ids_of, little, logits_of

# As if the processor had not learnt these instructions; -O1 compiles in half the time.
LESSER = {"AVX2": ("-O1", "-mno-avx512f"), "SSE": ("-O1", "-mno-avx")}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of another processor")
@pytest.mark.parametrize("name", LESSER)
def test_processors_without_wide_instructions_compute_the_same_numbers(name: str) -> None:
    library = build.load(LESSER[name])
    for spec in (SPECS["every layer different"], SPECS["odd sizes, all biases"]):
        for dtype, quantize in ((torch.float32, None), (torch.bfloat16, None), (torch.float32, "int8"), (torch.float32, "int4")):
            model = little(spec, dtype)
            ids = ids_of(spec, 300)
            best = NativeStepper(model, cache_tokens=600, quantize=quantize)  # type: ignore[arg-type]
            lesser = NativeStepper(model, cache_tokens=600, quantize=quantize, library=library)  # type: ignore[arg-type]
            expected = best.logits(hidden_of(best, ids, [300]))
            whole = hidden_of(lesser, ids, [300])
            found = lesser.logits(whole)
            scale = expected.abs().max()
            assert (found - expected).abs().max() < (1e-5 if dtype == torch.float32 and quantize is None else 0.02) * scale
            assert torch.equal(hidden_of(lesser, ids, cut(300, 9)), whole)
            if quantize is None and dtype == torch.float32:
                assert (found - logits_of(model, ids)).abs().max() < 1e-4


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(PunaError, match=r"need a C\+\+ compiler(.|\n)*no-such-compiler(.|\n)*kernels='plain'"):
        build.load(("-DONE",))


def test_a_failing_compiler_is_told_with_what_it_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path))
    with pytest.raises(PunaError, match=r"do not compile here(.|\n)*no-such-flag(.|\n)*kernels='plain'"):
        build.load(("-fno-such-flag-at-all",))
    assert not list(tmp_path.rglob("*.so"))


def test_a_library_is_kept_and_named_by_what_it_depends_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path))
    compiled: list[Any] = []

    def compile_nothing(compiler: str, flags: Any, target: Path) -> None:
        compiled.append(flags)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"")

    monkeypatch.setattr(build, "_compile", compile_nothing)
    for flags in (("-DTWO",), ("-DTHREE",), ("-DTWO",)):
        build.load.cache_clear()
        with pytest.raises(PunaError, match="cannot be opened"):
            build.load(flags)
    build.load.cache_clear()
    assert [flags[-1] for flags in compiled] == ["-DTWO", "-DTHREE"]
    assert len(list(tmp_path.rglob("*.so"))) == 2
