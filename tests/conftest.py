"""What holds for all tests."""

import signal


def pytest_configure() -> None:
    """Let Ctrl-C reach the commands that tests start, even where the tests run in the background, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
