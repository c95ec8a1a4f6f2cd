"""Tests marked `pairs` run few of their parameter sets in Triton's interpreter; `make test-all` runs all.

A pytest plugin; tests/pairs.py chooses.
"""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from pairs import left_out


@pytest.hookimpl(tryfirst=True)  # before the sets that are marked here are deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():  # nothing is interpreted
        return
    tests: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("pairs") and _is_interpreted(item):
            tests[f"{item.path}::{item.originalname}"].append(item)
    for sets in tests.values():
        for place in left_out([_values(item) for item in sets]):
            sets[place].add_marker("exhaustive")


def _is_interpreted(item: pytest.Function) -> bool:
    return item.callspec.params.get("backend") == "triton"


def _values(item: pytest.Function) -> list[str]:
    return [f"{name}={value}" for name, value in sorted(item.callspec.params.items()) if name != "backend"]
