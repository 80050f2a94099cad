"""What every test relies on."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def kvrouter_logger_as_it_was():
    """The command line sets the package's logger up for its process; a test that runs it in this one shall not."""
    package = logging.getLogger("kvrouter")
    handlers, propagate, level = list(package.handlers), package.propagate, package.level
    yield
    package.handlers[:] = handlers
    package.propagate = propagate
    package.setLevel(level)
