"""One measurement: a probe in a fresh Python process, with a deadline, and nothing left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import end_descendants, wait_until_gone

PROBES = Path(__file__).parent / "probes"

#: Seconds that a probe's processes get to end after it, before they are killed.
GRACE = 5.0

#: Seconds for killed processes to be gone.
KILL_TIMEOUT = 10.0

LOG_TAIL = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How a probe went."""

    spawned: float  # by time.monotonic()
    data: Mapping[str, Any] | None  # what it reported
    trouble: str  # what went wrong, if anything
    log: str  # the end of what it wrote


def run(probe: str, *arguments: str, deadline: float, variables: Mapping[str, str]) -> Run:
    """Run a probe to its end.

    Args:
        probe: its file's name in ``probes``, without the suffix.
        arguments: its arguments.
        deadline: seconds until it is killed, with all it started.
        variables: added to its environment.
    """
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as scratch:
        report, log = Path(scratch, "report.json"), Path(scratch, "log")
        environment = {
            **os.environ,
            "BENCHMARK_REPORT": str(report),
            # For the probe, and for processes that import it or the app by name.
            "PYTHONPATH": os.pathsep.join([str(PROBES), str(PROBES.parent)]),
            "TMPDIR": scratch,
            "IPYTHONDIR": str(Path(scratch, "ipython")),
            **variables,
        }
        with log.open("wb") as output:
            spawned = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, str(PROBES / f"{probe}.py"), *arguments],
                cwd=scratch,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                trouble = _wait(process, deadline)
            finally:
                killed = end_descendants(KILL_TIMEOUT)
        if killed and not trouble:
            trouble = f"left {killed} processes running"
        return Run(
            spawned=spawned,
            data=json.loads(report.read_text()) if report.exists() else None,
            trouble=trouble,
            log="\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL:]),
        )


def _wait(process: subprocess.Popen[bytes], deadline: float) -> str:
    """What went wrong, if anything."""
    try:
        code = process.wait(deadline)
    except subprocess.TimeoutExpired:
        # Before it is reaped: later its number may be another group's.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"hung, killed after {deadline:g} s"
    wait_until_gone(GRACE)
    return f"failed with {code}" if code else ""
