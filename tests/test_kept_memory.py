"""Memory of large gradients that the CPU keeps for the next ones: in one hand only, bounded, and like any."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kl_gpu
from kl_gpu.backends import native
from kl_gpu.ops.memory import gradient_buffer

pytestmark = pytest.mark.skipif(not native.available(), reason="needs the compiled kernels")

MIB = 1 << 20
V = 1 << 16  # 16 rows of float32 are 4 MiB


def use() -> tuple[int, int, int]:
    """Bytes that tensors have, bytes that lie idle, and in how many blocks."""
    return native.extension._native.kept_use()


@pytest.fixture(autouse=True)
def nothing_idle() -> Iterator[None]:
    kl_gpu.empty_cache()
    yield
    kl_gpu.empty_cache()


def logits(rows: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Student and teacher, a step of training apart."""
    generator = torch.Generator().manual_seed(seed)
    teacher = 3 * torch.randn(rows, V, generator=generator)
    student = teacher + 0.5 * torch.randn(rows, V, generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def gradient(student: Tensor, loss: Tensor) -> Tensor:
    return torch.autograd.grad(loss, student)[0]


def python(code: str) -> str:
    """What a process of its own prints, whose page faults are its own."""
    begin = """
        import os, resource, sys, torch, kl_gpu
        from kl_gpu import _native
        from kl_gpu.ops.memory import gradient_buffer

        torch.set_num_threads(1)
        MIB, V = 1 << 20, 1 << 16
    """
    whole = "".join(map(textwrap.dedent, (begin, code)))
    done = subprocess.run(
        [sys.executable, "-c", whole], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


STEPS = """
    def step(entry, student, teacher, ids):
        student.grad = None
        if entry == "kl_div":
            loss = kl_gpu.kl_div(student, teacher)
        elif entry == "per token":
            loss = kl_gpu.js_div(student, teacher, reduction="none").sum()
        elif entry == "token_logprobs":
            loss = kl_gpu.token_logprobs(student, ids[:, 0]).sum()
        else:
            logprobs = torch.full(ids.shape, -3.0)
            loss = kl_gpu.topk_div(student, logprobs, ids)
        loss.backward()

    for entry in ("kl_div", "per token", "token_logprobs", "topk_div"):
        for dtype in (torch.float32, torch.bfloat16):
            teacher = 3 * torch.randn(80, V).to(dtype)
            student = (teacher + 0.5 * torch.randn_like(teacher)).requires_grad_()
            ids = torch.arange(80 * 8).view(80, 8)
            for i in range(6):
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                step(entry, student, teacher, ids)
                if i >= 3:
                    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_steps_fault_no_pages_in() -> None:
    faults = list(map(int, python(STEPS).split()))
    assert len(faults) == 4 * 2 * 3
    assert max(faults) < 200, faults


def test_a_gradient_that_is_held_is_never_written_again() -> None:
    sizes = [16, 20, 16, 20]

    def at(seed: int, backend: str | None = None) -> Tensor:
        student, teacher = logits(sizes[seed], seed)
        return gradient(student, kl_gpu.kl_div(student, teacher, backend=backend))

    held = [at(0), at(1)[1:], at(2).view(-1)[V:], at(3)[::2]]  # of three only views
    copies = [x.clone() for x in held]
    for seed in (0, 1, 2):  # others come and go
        torch.testing.assert_close(at(seed), at(seed, "eager"), rtol=1e-4, atol=1e-9)
    for x, copy in zip(held, copies, strict=True):
        assert torch.equal(x, copy)
        assert x.abs().max() > 1e-6
    spans = sorted((x.data_ptr(), x.data_ptr() + x.untyped_storage().nbytes() // 2) for x in held)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_what_a_step_leaves_serves_the_next() -> None:
    student, teacher = logits(16, seed=0)
    for _ in range(3):
        found = gradient(student, kl_gpu.kl_div(student, teacher))
        assert use() == (4 * MIB, 0, 0)
        row = found[3]
        del found
        assert use()[0] == 4 * MIB, "a view holds it"
        del row
        assert use() == (0, 4 * MIB, 1)


@pytest.mark.parametrize("entry", ["kl_div", "per token", "token_logprobs"])
def test_what_the_memory_held_before_shows_nowhere(entry: str) -> None:
    teacher = 3 * torch.randn(3, 8, V)
    student = (teacher + 0.5 * torch.randn(3, 8, V)).requires_grad_()
    mask = torch.arange(24).view(3, 8) % 3 != 0

    def loss() -> Tensor:
        window = {"mask": mask, "shift": True, "vocab_size": V - 100}
        if entry == "token_logprobs":
            return kl_gpu.token_logprobs(student, torch.ones_like(mask, dtype=torch.int64), **window).sum()
        per_token = {"reduction": "none"} if entry == "per token" else {}
        return kl_gpu.divergence(student, teacher, **window, **per_token).sum()

    def at(number: float) -> Tensor:
        gradient_buffer(student.detach()).fill_(number)
        found = gradient(student, loss())
        assert use()[1] == 0, "it took the block that was filled"
        return found

    found = at(float("nan"))
    assert torch.equal(found, at(7.0))
    assert not found[..., V - 100 :].any()
    assert not found[:, -1].any()
    assert not found[:, :-1][~mask[:, 1:]].any()
    assert (found[:, :-1, : V - 100][mask[:, 1:]].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("of", ["numpy", "storage", "saved"])
def test_whatever_holds_the_memory_keeps_it(of: str) -> None:
    found = gradient_buffer(torch.empty(16, V)).fill_(2.5)
    held: object
    if of == "numpy":
        held = found.numpy()
    elif of == "storage":
        held = found.untyped_storage()
    else:
        held = found.clone().requires_grad_() * found
    del found
    assert use()[:2] == (4 * MIB, 0)
    assert gradient_buffer(torch.empty(16, V)).zero_().sum() == 0
    if isinstance(held, Tensor):
        assert gradient(held, held.sum()).sum() == held.numel()
    elif of == "numpy":
        assert (held == 2.5).all()  # type: ignore[attr-defined]


def test_idle_memory_is_not_added_to_a_larger_gradient() -> None:
    def come_and_go(rows: int) -> int:
        buffer = gradient_buffer(torch.empty(1, V).expand(rows, V))
        taken, idle, _ = use()
        del buffer
        return taken + idle

    most = 0
    for rows in (16, 32, 48, 64, 20, 128, 256, 100, 17, 255):
        most = max(most, rows)
        # As much as the largest would have taken, and what its size was rounded up by.
        assert come_and_go(rows) <= 1.125 * most * V * 4 + 2 * MIB
        assert use()[2] <= 2
    # One that is much smaller does not hold the memory of a large one.
    kl_gpu.empty_cache()
    come_and_go(256)
    small = gradient_buffer(torch.empty(16, V))
    assert use()[0] <= 2 * small.nbytes


def test_sizes_that_change_by_little_share_a_block() -> None:
    first = gradient_buffer(torch.empty(128, V))
    address = first.data_ptr()
    del first
    for rows in (127, 100, 90, 65, 128):
        buffer = gradient_buffer(torch.empty(1, V).expand(rows, V))
        assert buffer.data_ptr() == address
        assert buffer.untyped_storage().nbytes() == rows * V * 4  # what a pickle writes
        del buffer


def test_threads() -> None:
    problems = [logits(16 + 2 * i, seed=i) for i in range(4)]
    want = [gradient(s, kl_gpu.kl_div(s, t)) for s, t in problems]

    def work(i: int) -> bool:
        student, teacher = problems[i]
        held: list[Tensor] = []
        for _ in range(12):
            held = [*held[-1:], gradient(student, kl_gpu.kl_div(student, teacher))]
        return all(torch.equal(x, want[i]) for x in held)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    want.clear()
    assert use()[0] == 0
    assert use()[2] <= 2


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


on_linux = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="asks Linux for resident memory")


@on_linux
def test_nothing_leaks() -> None:
    rows = torch.randint(16, 49, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    like = torch.empty(1, V)
    held: list[Tensor] = []
    start = most = resident()
    for i, n in enumerate(rows):
        buffer = gradient_buffer(like.expand(n, V))
        buffer.view(-1)[::1024] = i  # every page
        held = [*held[-1:], buffer]
        del buffer
        most = max(most, resident())
    # Three live ones of at most 12 MiB for a moment, and what their sizes were rounded up by.
    assert most - start <= 3 * 14 * MIB
    assert use()[2] <= 2


FORK = """
    teacher = 3 * torch.randn(16, V)
    student = (teacher + 0.5 * torch.randn(16, V)).requires_grad_()

    def step():
        return torch.autograd.grad(kl_gpu.kl_div(student, teacher), student)[0]

    want, held = step().clone(), step()
    del step
    kept = held.data_ptr()
    idle = gradient_buffer(held)
    del idle
    assert _native.kept_use() == (4 * MIB, 4 * MIB, 1)

    def again():
        return torch.autograd.grad(kl_gpu.kl_div(student, teacher), student)[0]

    pid = os.fork()
    if pid == 0:
        import signal

        signal.alarm(60)
        empty = _native.kept_use() == (4 * MIB, 0, 0)
        right = torch.equal(again(), want) and again().data_ptr() != kept
        held.zero_()  # the parent's is another
        del held
        os._exit(0 if empty and right and _native.kept_use()[0] == 0 else 1)
    assert os.waitpid(pid, 0)[1] == 0, "the child hung or differed"
    assert torch.equal(held, want)
    assert _native.kept_use() == (4 * MIB, 4 * MIB, 1)
    assert torch.equal(again(), want)
    print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_begins_with_nothing_idle() -> None:
    assert python(FORK).split() == ["done"]


@on_linux
def test_empty_cache_gives_memory_back() -> None:
    buffer = gradient_buffer(torch.empty(1, V).expand(256, V)).fill_(1.0)
    del buffer
    before = resident()
    kl_gpu.empty_cache()
    assert before - resident() >= 60 * MIB
    assert use() == (0, 0, 0)


@pytest.fixture
def bound_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets KL_GPU_CACHE_MB as if it had been there from the start."""

    def set_to(text: str) -> None:
        monkeypatch.setenv("KL_GPU_CACHE_MB", text)
        monkeypatch.setattr(native.memory, "_limit", None)

    yield set_to
    monkeypatch.undo()
    native.memory._limit = None
    native.memory.limit_mib()


@pytest.mark.parametrize(
    ("limit", "want"), [("16", [16, 16, 2]), ("15", [16, 12, 1]), ("3", [16, 0, 0]), ("0", [0, 0, 0])]
)
def test_the_environment_bounds_what_lies_idle(bound_of, limit: str, want: list[int]) -> None:
    bound_of(limit)
    small, large = (gradient_buffer(torch.empty(16 * n, V)) for n in (1, 3))
    taken = use()[0]
    del small, large
    assert [taken // MIB, use()[1] // MIB, use()[2]] == want


@pytest.mark.parametrize("text", ["", "-1", "1.5", "4GB", "²", "9" * 40])
def test_a_bound_that_is_no_number_is_refused(bound_of, text: str) -> None:
    bound_of(text)
    student, teacher = logits(16, seed=0)
    with pytest.raises(ValueError, match=r"KL_GPU_CACHE_MB must be a whole number of MiB.*got"):
        kl_gpu.kl_div(student, teacher)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_it_is_as_empty_like_has_it(dtype: torch.dtype) -> None:
    whole = torch.empty(32, 4, V, dtype=dtype)
    views = [whole, whole.transpose(0, 1), whole[:, :, : V - 8], whole[:, :1].expand(32, 4, V), whole[:, 1:]]
    for like in (*views, torch.nn.Parameter(whole[0].repeat(8, 1))):
        with torch.no_grad():
            found, want = gradient_buffer(like), torch.empty_like(like)
        assert use()[0] > 0
        assert (found.shape, found.stride(), found.dtype) == (want.shape, want.stride(), want.dtype)
        assert type(found) is type(want)
        assert found.untyped_storage().nbytes() == want.untyped_storage().nbytes()
        assert found.data_ptr() % 64 == 0
        for x in (found, want):
            assert x._base is None and x.is_leaf and x._version == 0 and not x.requires_grad  # noqa: PT018
            assert not x.is_pinned() and not x.is_shared() and not x.is_inference()  # noqa: PT018
        found.fill_(1.5)
        assert found.view(-1)[:: V // 4].eq(1.5).all() if found.is_contiguous() else found.eq(1.5).all()
        del found


def test_under_inference_mode_it_is_an_inference_tensor() -> None:
    with torch.inference_mode():
        assert gradient_buffer(torch.empty(16, V)).is_inference()
    assert use()[1] > 0


def test_it_is_saved_shared_and_resized_like_others() -> None:
    source = torch.randn(16, V)
    found = gradient_buffer(source).copy_(source)
    file = io.BytesIO()
    torch.save(found, file)
    assert file.tell() < found.nbytes + 16384
    file.seek(0)
    assert torch.equal(torch.load(file), source)
    # Shared memory is another's, and the block is free.
    found.share_memory_()
    assert found.is_shared()
    assert torch.equal(found, source)
    assert use()[0] == 0
    found = gradient_buffer(source).copy_(source)
    assert torch.equal(found.resize_(8, V), source[:8])
    leaf = torch.zeros(16, V).requires_grad_()
    leaf.grad = gradient_buffer(leaf.detach()).copy_(source)
    leaf.sum().backward()  # accumulates in place
    assert torch.equal(leaf.grad, source + 1)
    torch.optim.SGD([leaf], lr=1.0).step()
    assert torch.equal(leaf.detach(), -(source + 1))


class Watcher(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), str(func)]
        return func(*args, **(kwargs or {}))


def test_whoever_watches_operators_sees_an_ordinary_allocation() -> None:
    like = torch.empty(16, V)
    with Watcher() as watcher:
        gradient_buffer(like)
    assert watcher.seen == ["aten.empty_like.default"]
    with torch.profiler.profile(profile_memory=True) as profiled:
        gradient_buffer(like)
    assert max(e.self_cpu_memory_usage for e in profiled.key_averages()) >= like.nbytes
    assert use() == (0, 0, 0)
    small = torch.empty(15, V)
    gradient_buffer(small)
    gradient_buffer(torch.empty(64, V, dtype=torch.int8))
    assert use() == (0, 0, 0)
