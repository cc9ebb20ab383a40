"""The directory of one run: sockets, logs, the broker's data. Who crashes leaves it behind.

Its manager holds a lock on a file in it, which the kernel takes back when the
manager is gone, however that came about. A directory without a holder is a
leftover, and its name says whose.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "cluster-"
_LOCK = "held"


class RunDirectory:
    """A new one, held by this process until :meth:`let_go`, or its end.

    Args:
        cluster_id: whose it is.

    Raises:
        OSError: there is no place for it.
    """

    def __init__(self, cluster_id: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{cluster_id}-"))
        try:
            # Locked before it has its name: without a lock it is taken for a leftover's.
            new = self.path / f"{_LOCK}.new"
            self._lock = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            new.rename(self.path / _LOCK)
        except BaseException:
            self.remove()
            raise
        _held.add(self)

    def let_go(self) -> None:
        """Hold it no more. Idempotent."""
        if self in _held:
            _held.discard(self)
            os.close(self._lock)

    def remove(self) -> None:
        """Remove it with all that is in it. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)


_held: weakref.WeakSet[RunDirectory] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # The lock is the manager's; who has a copy of the descriptor would keep it.
    for directory in list(_held):
        directory.let_go()


os.register_at_fork(after_in_child=_after_fork_in_child)


def leftovers() -> Iterator[tuple[str, Path]]:
    """The directories of this user's managers that crashed, by cluster id."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        cluster_id = path.name.removeprefix(_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):  # another user's, or gone by now, or held
            if path.stat().st_uid != os.geteuid():
                continue
            lock = os.open(path / _LOCK, os.O_WRONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield cluster_id, path
            finally:
                os.close(lock)


def kill_all(cluster_id: str) -> None:
    """Kill what there still is of a crashed manager's processes on this machine: a guardian or
    fork server that was stopped and so hasn't noticed. They have its id in their environment."""
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # gone, or another user's
            if process.environ().get("CLUSTER_ID") == cluster_id:
                process.kill()
