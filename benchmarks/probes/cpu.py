"""CPU time of this process and all below it, to the microsecond.

What ``/proc`` says of other processes comes in hundredths of a second, cut off: for twenty
processes that is more than a stop takes. POSIX has a clock for each process instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
import time

import psutil


def seconds() -> float:
    """Of this process, of those that it reaped and of those that run below it."""
    mine = resource.getrusage(resource.RUSAGE_SELF)
    reaped = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = mine.ru_utime + mine.ru_stime + reaped.ru_utime + reaped.ru_stime
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            total += _of(process)
    return total


def _of(process: psutil.Process) -> float:
    times = process.cpu_times()
    # Those that it reaped itself: none or few, so the cut off part does no harm.
    reaped = times.children_user + times.children_system if sys.platform == "linux" else 0.0
    if sys.platform != "linux":
        return times.user + times.system
    clock = ctypes.c_int()
    number = ctypes.CDLL(None).clock_getcpuclockid(process.pid, ctypes.byref(clock))
    if number != 0:
        raise ProcessLookupError(number, f"process {process.pid} has no clock")
    return time.clock_gettime(clock.value) + reaped
