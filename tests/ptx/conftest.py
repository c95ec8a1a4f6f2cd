"""Where PTX cannot be executed, the room's tests are skipped before they import what executes it."""

from __future__ import annotations

import pytest

from tests.ptx.requirements import missing


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report(collector: pytest.Collector) -> pytest.CollectReport | None:
    if not isinstance(collector, pytest.Module) or (why := missing()) is None:
        return None
    return pytest.CollectReport(collector.nodeid, "skipped", (str(collector.path), 1, f"Skipped: {why}"), [])
