"""Without the command line's choice, a few points: `pytest bench/suite` is for watching one change."""

from __future__ import annotations

import pytest

from ..harness.options import usual_device
from .plan import cpu_plan
from .plugin import NAME, Suite
from .stage import Stage


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.has_plugin(NAME):
        device = usual_device()
        config.pluginmanager.register(Suite(cpu_plan(), device, repeats=9), NAME)


@pytest.fixture(scope="session")
def suite(pytestconfig: pytest.Config) -> Suite:
    plugin = pytestconfig.pluginmanager.get_plugin(NAME)
    assert isinstance(plugin, Suite)
    return plugin


@pytest.fixture(scope="session")
def stage(suite: Suite) -> Stage:
    return Stage(suite.device)
