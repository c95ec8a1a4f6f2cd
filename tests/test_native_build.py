"""Mistakes that the build of the C++ kernels must not let pass, and the names that it shares with Python."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kl_gpu.backends import native
from kl_gpu.backends.interface import RowPair
from kl_gpu.kinds import KINDS

KERNELS = Path(__file__).parent.parent / "kernels"
COMPILER = shutil.which("g++") or shutil.which("c++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def compiled(source: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [COMPILER, "-std=c++20", *options, str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not native.available(), reason="installed without compiled kernels")
def test_a_formula_that_the_kernels_lack_is_an_error_that_names_those_they_have() -> None:
    names = sorted({kind.formula for kind in KINDS.values()})
    with pytest.raises(ValueError, match="formula forgotten: ") as raised:
        native.value(
            RowPair(torch.zeros(1, 4), torch.zeros(1, 4), None, "forgotten", 0.0, 1.0, 1.0, torch.float32)
        )
    assert sorted(str(raised.value).split("have ")[1].split(", ")) == names


@needs_compiler
def test_a_formula_without_a_struct_does_not_compile(tmp_path: Path) -> None:
    api = (KERNELS / "api.h").read_text()
    assert "    X(tv) " in api
    (tmp_path / "api.h").write_text(api.replace("    X(tv) ", "    X(forgotten) X(tv) "))
    options = "-DKL_ISA=v2", "-Wno-psabi", "-fsyntax-only", f"-I{KERNELS}"
    unit = KERNELS / "isa" / "formula_sums.cpp"
    assert compiled(unit, *options).returncode == 0
    forgotten = compiled(unit, f"-I{tmp_path}", *options)
    assert forgotten.returncode != 0
    assert "forgotten" in forgotten.stderr


@needs_compiler
@pytest.mark.skipif(platform.system() != "Linux", reason="reads ELF objects")
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("nm")), reason="needs cmake and nm")
def test_a_symbol_that_instruction_sets_would_share_fails_the_build(tmp_path: Path) -> None:
    def check(body: str) -> subprocess.CompletedProcess[str]:
        source, built = tmp_path / "unit.cpp", tmp_path / "unit.o"
        source.write_text(f"#include <vector>\nnamespace kl::v4 {{ {body} }}")
        assert compiled(source, "-O0", "-c", "-o", str(built)).returncode == 0
        script = str(KERNELS / "isa" / "check_symbols.cmake")
        command = ["cmake", "-DNM=nm", "-DISA=v4", "-P", script, "--", str(built)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert check("double twice(double x) { return 2 * x; }").returncode == 0
    shared = check("double sum() { std::vector<double> x(3); return x[0]; }")
    assert shared.returncode != 0
    assert "define symbols outside kl::v4" in shared.stderr
    assert "St6vector" in shared.stderr


# A compiler for which GNU C's attributes mean nothing, as Microsoft's.
WITHOUT_VECTORS = f"""#!/bin/sh
exec {COMPILER} '-D__attribute__(x)=' "$@"
"""


@needs_compiler
@pytest.mark.skipif(platform.system() != "Linux", reason="the compiler is a shell script")
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_where_no_kernel_can_be_built_nothing_is_and_the_message_says_why(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(WITHOUT_VECTORS)
    compiler.chmod(0o755)

    def configured(folder: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = ["cmake", "-S", str(KERNELS.parent), "-B", str(tmp_path / folder), *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    for folder, options, why in [
        (
            "plain",
            [f"-DCMAKE_CXX_COMPILER={compiler}"],
            f"{compiler} lacks C\\+\\+20 or the vectors of GNU C",
        ),
        ("msvc", ["-DMSVC=ON"], "Microsoft's compiler, and Clang in its place"),
        (
            "universal",
            ["-DAPPLE=ON", "-DCMAKE_OSX_ARCHITECTURES=x86_64;arm64"],
            "one build is for one architecture",
        ),
    ]:
        plain = configured(folder, *options)
        assert plain.returncode == 0, plain.stderr
        message = " ".join(plain.stderr.split())
        assert re.search(f"kl_gpu: no CPU kernels are built: {why}", message), message
        assert not list((tmp_path / folder).rglob("*kl_isa*"))
        # scikit-build-core makes the pure wheel, and names it so, of a build that failed.
        assert configured(f"{folder} wheel", *options, "-DSKBUILD=2").returncode != 0
