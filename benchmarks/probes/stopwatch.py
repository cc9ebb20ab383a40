"""What a probe tells the script that runs it: a JSON file, written once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def report(data: Mapping[str, Any]) -> None:
    """Hand the measurements over, all or nothing: the probe may be killed at any time."""
    path = Path(os.environ["BENCHMARK_REPORT"])
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(data))
    unfinished.replace(path)


def report_first_result(result: object, called: float) -> None:
    """Take the time of the first result.

    Args:
        result: what came; anything but 1 would mean that nothing was measured.
        called: ``time.monotonic()`` at the call that starts everything. That clock
            is the same in all processes of a machine.
    """
    came = time.monotonic()
    if result != 1:
        raise ValueError(f"The task's result is {result!r}, and should be 1.")
    report({"called": called, "came": came})
