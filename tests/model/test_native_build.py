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
from puna.model.steppers import make_stepper
from tests.model.native_models import SPECS, cut, hidden_of, ids_of, little

# As if the processor had not learnt these instructions; -O1 compiles in half the time.
LESSER = {"AVX2": ("-O1", "-mno-avx512f"), "SSE": ("-O1", "-mno-avx")}
FORMATS: tuple[tuple[torch.dtype, Any, float], ...] = (  # and how far the results may lie apart
    (torch.float32, None, 1e-5),
    (torch.bfloat16, None, 0.02),
    (torch.float32, "int8", 0.02),
    (torch.float32, "int4", 0.02),
)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of another processor")
@pytest.mark.parametrize("name", LESSER)
def test_processors_without_wide_instructions_compute_the_same_numbers(name: str) -> None:
    library = build.load(LESSER[name])
    for spec in (SPECS["every layer different"], SPECS["odd sizes, all biases"]):
        for dtype, quantize, apart in FORMATS:
            model = little(spec, dtype)
            ids = ids_of(spec, 300)
            best = NativeStepper(model, cache_tokens=600, quantize=quantize)
            lesser = NativeStepper(model, cache_tokens=600, quantize=quantize, library=library)
            expected = best.logits(hidden_of(best, ids, [300]))
            whole = hidden_of(lesser, ids, [300])
            assert (lesser.logits(whole) - expected).abs().max() < apart * expected.abs().max()
            assert torch.equal(hidden_of(lesser, ids, cut(300, 9)), whole)


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        PunaError, match=r"need a C\+\+ compiler(.|\n)*no-such-compiler(.|\n)*kernels='plain'"
    ):
        build.load(("-DONE",))


def test_without_a_compiler_the_plain_stepper_decodes_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = little(SPECS["grouped, tied"])
    build.load.cache_clear()
    try:
        assert make_stepper(model, cache_tokens=16).name == "plain"
        assert "no-such-compiler" in capsys.readouterr().err
        assert make_stepper(model, cache_tokens=16, quantize="int4").name == "plain"
        with pytest.raises(PunaError, match="no-such-compiler"):
            make_stepper(model, cache_tokens=16, kernels="native")
    finally:
        build.load.cache_clear()


def test_kernels_are_native_where_they_can_be() -> None:
    model = little(SPECS["grouped, tied"])
    native = make_stepper(model, cache_tokens=16)
    assert native.name == "native"
    assert make_stepper(model, cache_tokens=16, quantize="int8").weight_bytes < 0.3 * native.weight_bytes
    assert make_stepper(model, cache_tokens=16, kernels="plain").name == "plain"
    assert make_stepper(model.half(), cache_tokens=16).name == "plain"
    assert make_stepper(model, cache_tokens=16, kernels="plain", quantize="int4").name == "plain"


def test_a_failing_compiler_is_told_with_what_it_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
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
