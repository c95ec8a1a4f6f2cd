"""The C++ kernels behind token_logprobs and topk_div: every instruction set, any bits, any column."""

from __future__ import annotations

import pytest

from kl_gpu.backends import native

if not native.available():
    pytest.skip("the compiled kernels are not installed", allow_module_level=True)

from test_native import run_with_isa

AGAINST_EAGER = """
    import torch
    from kl_gpu.ops import complement as complement_ops
    g = torch.Generator().manual_seed(0)
    worst = 0.0
    for dtype, raw in [
        (torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float16, torch.int16),
        (torch.float64, torch.int64),
    ]:
        for columns in (1, 2, 31, 64, 2047, 2048, 2049, 40003):
            rows = 6
            x = (3 * torch.randn(rows, columns, generator=g, dtype=torch.float64)).to(dtype)
            x[1] = x[1] * 0 - 3e4
            x[2, ::3] = -torch.inf
            ends = torch.iinfo(raw)
            # Any bits at all but NaN and +inf, and what log2(e) would make infinite in float64.
            wild = torch.randint(ends.min, ends.max, (columns,), dtype=raw, generator=g).view(dtype)
            x[3] = torch.where(wild.isnan() | (wild == torch.inf), torch.zeros((), dtype=dtype), wild)
            if dtype == torch.float64:
                x[3] = x[3].clamp(-1e300, 1e300)
            x[4, columns // 2] = torch.nan
            x[5, 0] = torch.inf
            k = min(columns, 40)
            ids = torch.stack([torch.randperm(columns, generator=g)[:k] for _ in range(rows)])
            ids[4:] = -1
            flows = torch.rand(rows, k, generator=g).double(), torch.rand(rows, generator=g).double() + 0.5
            turn = torch.rand(rows, generator=g).double()
            found = {}
            for backend in ("native", "eager"):
                u, spread, stats = complement_ops.complement(x, ids, None, 0.8, True, backend)
                grad = torch.empty_like(x)
                complement_ops.complement_gradient(x, ids, None, stats, *flows, turn, 0.8, backend, grad)
                found[backend] = u, spread, grad.double()
            for ours, exact in zip(found["native"], found["eager"]):
                assert torch.equal(ours.isnan(), exact.isnan()), (dtype, columns)
                assert torch.equal(ours.isinf(), exact.isinf()), (dtype, columns)
            near = {torch.float32: 2e-5, torch.float64: 1e-10}.get(dtype, 1e-2)
            for ours, exact, rtol in zip(found["native"], found["eager"], (2e-6, 1e-5, near)):
                torch.testing.assert_close(ours, exact, rtol=rtol, atol=1e-6, equal_nan=True)
                worst = max(worst, float((ours - exact).abs().nan_to_num(0, 0, 0).max()))
    print(worst)
"""


@pytest.mark.parametrize("isa", native.supported_isas())
def test_every_instruction_set_against_eager(isa: str) -> None:
    assert float(run_with_isa(isa, AGAINST_EAGER)) > 0
