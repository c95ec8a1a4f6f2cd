"""Without the command line's choice, a few points: `pytest bench/suite` is for watching one change."""

from __future__ import annotations

import pytest

from ..harness.options import usual_device
from .plan import cpu_plan
from .plugin import Suite


def pytest_configure(config: pytest.Config) -> None:
    if not any(isinstance(plugin, Suite) for plugin in config.pluginmanager.get_plugins()):
        config.pluginmanager.register(Suite(cpu_plan(), usual_device(), repeats=9))
