"""A plugin of pytest, `-p tests.at_once`: what failed is shown when it fails, so that a run which is cut off has told it."""

from __future__ import annotations

import pytest


class AtOnce:
    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._terminal.ensure_newline()
            self._terminal.write_line(f"{report.nodeid} failed in its {report.when}", red=True)
            self._terminal.write_line(report.longreprtext)


# Last: the terminal's reporter is there. Processes of pytest-xdist send their reports to the one that shows them.
@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.getplugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(AtOnce(terminal))
