"""The kernels as programs without Python: for AArch64 in qemu, and for this processor.

For AArch64 they need g++-aarch64-linux-gnu and qemu-user, packages of Debian and Ubuntu.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import reference_vectors

ROOT = Path(__file__).parent.parent
NEEDED = ("cmake", "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump", "qemu-aarch64")
MISSING = [tool for tool in NEEDED if shutil.which(tool) is None]
needs_aarch64 = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
QEMU = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
CASES = 904

pytestmark = pytest.mark.xdist_group("aarch64")  # one build of each, and one file of cases


def run(*command: str | Path) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1200, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def built(folder: Path, *options: str) -> Path:
    """The build folder of kernels/testing's programs, every warning an error."""
    options = ("-DKL_GPU_PROGRAMS=ON", "-DKL_GPU_WERROR=ON", *options)
    run("cmake", "-S", ROOT, "-B", folder, *options)
    run("cmake", "--build", folder)
    return folder


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cases") / "cases.bin"
    assert reference_vectors.write(path) == CASES
    return path


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'cmake' / 'aarch64.cmake'}"
    return built(tmp_path_factory.mktemp("aarch64"), toolchain)


@needs_aarch64
def test_every_promise_on_neon(aarch64: Path, cases: Path) -> None:
    found = run(*QEMU, aarch64 / "kl_judge", cases)
    assert re.match(rf"neon: {CASES} cases, \d{{7}} numbers, 0 wrong", found), found


@needs_aarch64
def test_the_loops_are_of_neon_instructions(aarch64: Path) -> None:
    """Multiply-adds and conversions of four columns at a time, none of one, and no call of libm in fp32."""
    folder = aarch64 / "CMakeFiles" / "kl_isa_neon.dir" / "kernels" / "isa"
    code = {
        unit.name.removesuffix(".cpp.o"): run("aarch64-linux-gnu-objdump", "-dr", "--no-show-raw-insn", unit)
        for unit in folder.glob("*.o")
    }
    assert len(code) == 8
    for unit, text in code.items():
        assert not re.search(r"\bfn?m(add|sub)\ts\d", text), f"{unit}: a fused multiply-add of one number"
        assert not re.search(
            r"CALL26\t(fma|exp|exp2|expm1|log|log2|log1p|fmax|fmin|rint|scalbn|ldexp)f\b", text
        )
        assert unit == "pair_gradient" or re.search(r"\bfmla\tv\d+\.4s", text), unit  # that one only chooses
    for instruction in (
        r"fcvtl\tv\d+\.4s, v\d+\.4h",
        r"fcvtn2\tv\d+\.8h, v\d+\.4s",
        r"sri\tv\d+\.4s",
        r"stnp\tq\d",
    ):
        assert re.search(rf"\b{instruction}", code["kl_gradient"]), instruction


@needs_aarch64
@pytest.mark.exhaustive
def test_no_bit_depends_on_the_threads_on_neon(aarch64: Path) -> None:
    assert run(*QEMU, aarch64 / "kl_sanitize") == "neon: clean\n"


@pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a C++ compiler"
)
def test_every_promise_here(tmp_path: Path, cases: Path) -> None:
    """So that the program and its file stay right where nobody has the other compiler."""
    best = "v3" if "avx2" in Path("/proc/cpuinfo").read_text() else "v2"
    folder = built(tmp_path, f"-DKL_GPU_ISAS={best}", "-DKL_GPU_OPTIMIZE=-O1")
    found = run(folder / "kl_judge", cases)
    assert re.match(rf"\w+: {CASES} cases, \d{{7}} numbers, 0 wrong", found), found
