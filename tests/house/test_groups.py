"""Tests that must share a process do."""

from __future__ import annotations

import os

import pytest


@pytest.mark.ray
@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs all tests")
def test_a_mark_of_the_suite_is_a_group_of_xdist(request: pytest.FixtureRequest) -> None:
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("pytest-xdist runs without --dist loadgroup, as make test does not")
    assert request.node.nodeid.endswith("@ray")
