"""What holds for all tests."""

import signal
from collections.abc import Sequence

import pytest

from versions import lacking


def pytest_configure() -> None:
    """Let Ctrl-C reach the commands that tests start, even where the tests run in the background, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Leave out what older libraries cannot do."""
    for item in items:
        if why := lacking(item.nodeid):
            item.add_marker(pytest.mark.skip(reason=why))
