"""How a worker's process ends, as a number its platform keeps.

A platform may start a worker again for reasons of its own and after
:attr:`ExitCode.PLATFORM_NOTICE`; after any other of these it must not. The
numbers are outside those that shells (126–165) and ``sysexits.h`` (64–78) use.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """The table."""

    LEFT = 0  # told to leave by its manager
    PLATFORM_NOTICE = 81  # told to leave by its platform (SIGTERM); handed its work back
    ORPHANED = 82  # the manager or the broker is gone
    FENCED = 83  # was declared dead, and came back
    IMPORT_FAILED = 84  # the app can't be imported, or Celery builds no worker for it
    VERSION_MISMATCH = 85  # it runs what can't work with the manager


_MEANING = {
    ExitCode.LEFT: "left when told to",
    ExitCode.PLATFORM_NOTICE: "told to leave by its platform (SIGTERM)",
    ExitCode.ORPHANED: "ended itself: manager or broker gone",
    ExitCode.FENCED: "had been declared dead and ended itself when it came back",
    ExitCode.IMPORT_FAILED: "the app can't be imported or set up",
    ExitCode.VERSION_MISMATCH: "runs what can't work with the manager",
}

#: A new worker in its place would end the same way.
HOPELESS = frozenset({ExitCode.IMPORT_FAILED, ExitCode.VERSION_MISMATCH})


def explain(code: int) -> str:
    """Say an exit code in words; a negative one is a signal, as in ``subprocess``."""
    try:
        return _MEANING[ExitCode(code)]
    except ValueError:
        pass
    if code < 0:
        import signal

        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exit code {code}"
