"""What all tests share: the environment stripped of this machine's settings, and a
check that a test leaves nothing behind."""

from __future__ import annotations

import gc
import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator

import psutil
import pytest
from tools import GONE_WITHIN, MARK, Traces, descriptors_of, wait_until

from cluster.settings import CELERY_OVERRIDES


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on what happens to be set; the choice of the server is CI's."""
    for name in list(os.environ):
        if name.startswith(("CLUSTER_", "AWS_", "ECS_")) and name != "CLUSTER_BROKER_SERVER":
            monkeypatch.delenv(name)
    for name in CELERY_OVERRIDES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Waits for a condition with a deadline."""
    return wait_until


@pytest.fixture
def nothing_left(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Traces]:
    """After the test: no process, listening socket, descriptor, thread or temporary file more
    than before. Yields how they are known."""
    mark = secrets.token_hex(8)
    directory = tmp_path_factory.mktemp("tmp")
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", None)
    me = psutil.Process()
    threads = set(threading.enumerate())
    descriptors = set(descriptors_of(me))
    traces = Traces(mark, directory)
    yield traces
    traces.check_gone()
    wait_until(
        lambda: set(threading.enumerate()) <= threads,
        f"threads are left: {set(threading.enumerate()) - threads}",
        GONE_WITHIN,
    )
    # The records that pytest keeps hold exceptions, these their frames, and
    # those connections; which hang together in cycles besides.
    caplog.get_records("call").clear()
    gc.collect()
    more = set(descriptors_of(me)) - descriptors
    assert not more, f"descriptors are left: {more}"
