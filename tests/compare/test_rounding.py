"""A model's own copies with rounded weights, and the text of `make demo-compare`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.docstrings import documentation
from kl_gpu.compare import ComparisonError, Model, open_side
from kl_gpu.compare.rounding import GROUP, rounded


def test_weights_lie_on_the_nearest_of_their_groups_levels(models: dict[str, Path]) -> None:
    base = open_side(str(models["base"]), device="cpu")
    assert isinstance(base, Model)
    ends = {
        id(layer.weight) for layer in (base.model.get_input_embeddings(), base.model.get_output_embeddings())
    }
    sizes = []
    for bits in (8, 4, 3):
        found, nbytes = rounded(base, bits), 0.0
        for of, to in zip(base.model.parameters(), found.model.parameters(), strict=True):
            if of.dim() < 2 or id(of) in ends:
                assert to.equal(of)
                nbytes += 4 * of.numel()
                continue
            groups = zip(of.split(GROUP, 1), to.split(GROUP, 1), strict=True)
            for before, after in groups:
                step = before.abs().amax(1) / (2 ** (bits - 1) - 1)
                apart = (after - before).abs().amax(1)
                assert (apart <= 0.5001 * step + 1e-6).all()
                assert apart.mean() > 0.2 * step.mean()
                assert max(len(row.unique()) for row in after) < 2**bits
                # A scale of 16 bits a group.
                nbytes += bits / 8 * before.numel() + 2 * len(before)
        assert found.nbytes == round(nbytes)
        assert found.name == f"base rtn{bits}"
        sizes.append(found.nbytes)
    assert base.nbytes is not None
    assert base.nbytes > sizes[0] > sizes[1] > sizes[2]
    with pytest.raises(ComparisonError, match="2 to 8 bits, got 9"):
        rounded(base, 9)


def test_documentation_is_prose_and_repeats() -> None:
    text = documentation(5000)
    assert len(text) == 5000
    assert text == documentation(5000)
    assert "import" in text
    assert torch.tensor([len(line) for line in text.splitlines()]).float().mean() > 20
