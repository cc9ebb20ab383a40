"""Ends a process when its parent ends, whatever it is doing.

A process that holds the GIL in a C extension notices nothing by itself; the
kernel needs no notice. Linux only: elsewhere what watches in Python has to do.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

#: https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html
_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """From now on this process is killed when the thread that forked it ends: call it only where
    that is the parent's main thread.

    Args:
        parent: the process id of the parent as this process was forked. If it has another by
            now, this one ends here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
