"""What a bug report needs: versions, what runs where and why, and whether the answers are right here."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import numpy as np
import torch

from . import reference
from .backends import registry
from .functional import divergence
from .kinds import KINDS

_VARIABLES = (
    "KL_GPU_ISA", "KL_GPU_CACHE_MB", "KL_GPU_DISTRIBUTED_CHECK", "KL_GPU_LOG", "TRITON_INTERPRET",
    "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"no {package}"


def _on_the_cpu() -> str:
    chosen = registry.resolve(None, torch.device("cpu"))
    if chosen != "native":
        return f"{chosen}, since this installation has no compiled kernels"
    from .backends import native

    sets, threads = ", ".join(native.supported_isas()), torch.get_num_threads()
    return f"native (C++), instruction set {native.isa()} of {sets}; PyTorch's {threads} threads"


def _on_gpus() -> list[str]:
    lines = []
    for kind in ("cuda", "xpu"):
        of = getattr(torch, kind)
        for index in range(of.device_count() if of.is_available() else 0):
            device = torch.device(kind, index)
            chosen = registry.resolve(None, device)
            why = "" if chosen == "triton" else ", since Triton 3.4 or later or fp64 is missing"
            lines.append(f"{device} ({of.get_device_name(index)}): {chosen}{why}")
    return lines or ["GPUs: none that PyTorch sees"]


def _check(device: torch.device) -> tuple[float, str]:
    """The worst error over all kinds on a few rows of 32 000 logits, as a share of the promised bound, and
    the kind it was of."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(4, 32_000, generator=generator, device="cpu") * 2
    teacher[:, :3] += 12
    student = teacher + 0.1 * torch.randn(4, 32_000, generator=generator, device="cpu")
    sides = student.to(device), teacher.to(device)
    gap = (student.logsumexp(-1) - teacher.logsumexp(-1)).abs().numpy()
    worst, of = 0.0, ""
    for kind in KINDS:
        got = divergence(*sides, kind, reduction="none").cpu().double().numpy()
        want = reference.divergence(student.numpy(), teacher.numpy(), kind)
        bound = 5e-6 * want + (2e-7 * (1 + gap) if kind in ("tv", "nla", "lk") else 0)
        share = float(np.max(np.abs(got - want) / bound))
        if not share <= worst:  # NaN is the worst
            worst, of = share, kind
    return worst, of


def _devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    found += [torch.device(kind) for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()]
    return found


def _checked(device: torch.device) -> tuple[str, bool]:
    """A line on the self-check, and whether it passed."""
    try:
        worst, of = _check(device)
    except Exception as error:  # a report that stops at what is broken does not report it
        return f"Self-check on {device.type}: {type(error).__name__}: {error}", False
    good = worst <= 1
    verdict = "good" if good else "BROKEN, please report it"
    return f"Self-check on {device.type}: worst error {worst:.0%} of what is promised ({of}): {verdict}", good


def report() -> tuple[str, bool]:
    """What :func:`show_config` prints, and whether the self-check passed on every kind of device."""
    versions = ", ".join(_version(x) for x in ("kl_gpu", "torch", "triton", "numpy"))
    lines = [
        f"{versions}, Python {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"CPU: {_on_the_cpu()}",
        *_on_gpus(),
    ]
    set_here = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    lines.append(f"Environment: {' '.join(set_here) or 'nothing set that kl_gpu reads'}")
    checks = [_checked(device) for device in _devices()]
    return "\n".join([*lines, *(line for line, _ in checks)]), all(good for _, good in checks)


def show_config() -> None:
    """Print what a bug report needs; takes a few seconds, most of them for the self-check.

    Versions, the backend chosen for each device and why another one was not, the CPU's instruction set, the
    environment variables that kl_gpu reads, and on each kind of device the worst error
    of every kind on a few rows against the NumPy reference. `python -m kl_gpu` prints the same.

    Example:
        >>> kl_gpu.show_config()  # doctest: +SKIP
    """
    print(report()[0])
