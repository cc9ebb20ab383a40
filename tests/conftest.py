"""What all tests share: the environment stripped of this machine's settings, and a
check that a test leaves nothing behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import images
import pytest
from tools import Traces, leaving_nothing, strip_environment, wait_until

# Under nohup, and in the background of a script, these are ignored, and what a test starts
# would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What needs an engine or a cloud is run by those who name it: ``ONLINE=docker``."""
    online = os.environ.get("ONLINE", "").split(",")
    left_out = [item for item in items if item.get_closest_marker("docker")]
    if "docker" in online or not left_out:
        return
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    strip_environment(monkeypatch)


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Waits for a condition with a deadline."""
    return wait_until


@pytest.fixture(scope="session")
def image() -> Iterator[str]:
    """The image of managers and workers with the tests' apps in it, as a user's own has his."""
    with images.engine_or_skip() as client:
        yield images.of_tests(client)


@pytest.fixture
def nothing_left(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Traces]:
    """After the test: no process, listening socket, descriptor, thread or temporary file more
    than before. Yields how they are known."""
    # The records that pytest keeps hold exceptions, these their frames, and
    # those connections; which hang together in cycles besides.
    with leaving_nothing(
        tmp_path_factory.mktemp("tmp"), monkeypatch, lambda: caplog.get_records("call").clear()
    ) as traces:
        yield traces
