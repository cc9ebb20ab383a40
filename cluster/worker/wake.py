"""Wakes the worker's event loop from a signal handler or another thread."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any


class Wake:
    """Calling it has the loop call back, soon; several calls may make one.

    The loop's own ``call_soon`` doesn't do from a signal handler: the wait that
    the handler interrupts is taken up again (PEP 475).
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def attach(self, hub: Any, callback: Callable[[], None]) -> None:
        """Use this loop from now on; calls before now count."""

        def on_readable() -> None:
            with contextlib.suppress(BlockingIOError):
                os.read(self._read, 4096)
            callback()

        hub.add_reader(self._read, on_readable)

    def __call__(self, *_: Any) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it wakes as it is
            os.write(self._write, b"x")
