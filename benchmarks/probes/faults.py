"""One fault that happens to one system, and what comes of it.

faults.py SYSTEM FAULT SEED
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import turn
from fault_systems import SYSTEMS, System
from fault_tasks import BROKEN
from processes import adopt_orphans, descendants
from stopwatch import report

#: How many workers there are.
WORKERS = 4

#: Seconds after which no recovery is awaited any more.
CAP = 60.0

#: Seconds between two looks.
LOOK_EVERY = 0.01
SELDOM = 0.25

#: Seconds for what should happen without any fault.
PATIENCE = 60.0

#: Seconds that a system has run before it is struck: what it still begins with is over.
SETTLED = 1.0

#: Short tasks, and how many workers are killed while they run.
SHORT_TASKS = 300
KILLS = 5

#: Tasks that wait while others run.
QUEUED = 100

#: Seconds that a broker is away before the tasks that run may end.
AWAY = 1.0


# -- looking on ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """A task started, as it wrote itself."""

    name: str
    at: float
    pid: int
    parent: int


def starts(log: Path) -> Sequence[Start]:
    if not log.exists():
        return []
    rows = [line.split() for line in log.read_text().splitlines()]
    return [Start(name, float(at), int(pid), int(parent)) for name, at, pid, parent in rows]


def runs(log: Path) -> Counter[str]:
    """How often each task was started."""
    return Counter(start.name for start in starts(log))


def wait_until(condition: Callable[[], object], seconds: float, every: float = LOOK_EVERY) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True


def expect(condition: Callable[[], object], what: str) -> None:
    """Wait for what happens without a fault."""
    if not wait_until(condition, PATIENCE):
        raise RuntimeError(f"Waited in vain until {what}.")


class Waiting(threading.Thread):
    """Somebody who waits for a result, without a time limit of its own."""

    def __init__(self, system: System, handle: Any) -> None:
        super().__init__(daemon=True)
        self._system = system
        self._handle = handle
        self.end = "hangs"
        self.at = 0.0
        self.text = ""
        self.start()

    def run(self) -> None:
        try:
            self._system.get(self._handle)
            end = "returns"
        except BaseException as error:  # noqa: BLE001 (what it raises is what is asked)
            end, self.text = f"raises {type(error).__name__}", str(error)[:500]
        self.at = time.monotonic()
        self.end = end

    def outcome(self, since: float) -> Mapping[str, Any]:
        """What came of it, by the cap at the latest."""
        self.join(max(0.0, since + CAP - time.monotonic()))
        seconds = self.at - since if self.at else None
        return {"get": self.end, "get_seconds": seconds, "get_text": self.text}


def arrived(system: System, handles: Sequence[Any], until: float) -> Mapping[str, int]:
    """How many results there are by then, and how many errors in place of one."""
    waiting = list(handles)
    results = errors = 0
    while waiting:
        if not is_done(system, waiting[0]):
            if time.monotonic() > until:
                # The others may be there nevertheless.
                undone = [handle for handle in waiting if not is_done(system, handle)]
                waiting = [handle for handle in waiting if handle not in undone]
                if not waiting:
                    break
            else:
                time.sleep(SELDOM)
            continue
        try:
            system.get(waiting.pop(0))
            results += 1
        except Exception:  # noqa: BLE001 (an error is no result, whichever it is)
            errors += 1
    return {"wanted": len(handles), "results": results, "errors": errors}


def is_done(system: System, handle: Any) -> bool:
    try:
        return system.is_done(handle)
    except Exception:  # noqa: BLE001 (nothing can be asked: it isn't known)
        return False


# -- the faults ------------------------------------------------------------------------------


def killed_pool(system: System, _: int) -> Mapping[str, Any]:
    """The process that runs the task is killed; where that is the worker itself, see below."""
    return rerun_after(system, lambda start: os.kill(start.pid, signal.SIGKILL))


def killed(system: System, _: int) -> Mapping[str, Any]:
    """The whole worker is killed, by its main process."""
    return rerun_after(system, lambda start: os.kill(main_of(system, start), signal.SIGKILL))


def frozen(system: System, _: int) -> Mapping[str, Any]:
    """All of a worker is frozen and stays so."""

    def freeze(start: Start) -> None:
        for pid in {start.pid, main_of(system, start)}:
            os.kill(pid, signal.SIGSTOP)

    return rerun_after(system, freeze)


def main_of(system: System, start: Start) -> int:
    return start.parent if system.has_pool else start.pid


def rerun_after(system: System, fault: Callable[[Start], None]) -> Mapping[str, Any]:
    """Seconds until a task that had begun begins again."""
    log, go = Path("starts").absolute(), Path("go").absolute()
    handle = system.submit("wait_for", str(log), "task", str(go))
    expect(lambda: starts(log), "the task runs")
    [first] = starts(log)
    time.sleep(SETTLED)
    turn.pass_on_soon()
    began = time.monotonic()
    fault(first)
    again = wait_until(lambda: len(starts(log)) > 1, CAP)
    seconds = starts(log)[1].at - began if again else None
    go.touch()
    done = again and wait_until(lambda: is_done(system, handle), PATIENCE)
    return {"seconds": seconds, "result": done and system.get(handle) == "task"}


def storm(system: System, seed: int) -> Mapping[str, Any]:
    """Workers are killed, one after the other, while short tasks run."""
    chance = random.Random(seed)
    log = Path("starts").absolute()
    moments = sorted(chance.uniform(0.2, 3.0) for _ in range(KILLS))
    handles = [system.submit("short", str(log), str(number)) for number in range(SHORT_TASKS)]
    expect(lambda: starts(log), "a task runs")
    began = time.monotonic()
    kills = 0
    for moment in moments:
        time.sleep(max(0.0, began + moment - time.monotonic()))
        victims = sorted(system.workers())
        if victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(victims), signal.SIGKILL)
                kills += 1
    last = time.monotonic()
    turn.pass_on_soon()
    found = arrived(system, handles, last + CAP)
    return {
        **found,
        "kills": kills,
        "missing": found["wanted"] - found["results"],
        "seconds": time.monotonic() - last,
        "again": sum(runs(log).values()) - len(runs(log)),
    }


def broker_killed(system: System, _: int) -> Mapping[str, Any]:
    """The broker is killed with tasks that run and others that wait."""
    log, go = Path("starts").absolute(), Path("go").absolute()
    handles = [
        system.submit("wait_for", str(log), f"running{number}", str(go))
        for number in range(WORKERS)
    ]
    handles += [system.submit("short", str(log), str(number)) for number in range(QUEUED)]
    expect(lambda: len(starts(log)) >= WORKERS, "all workers run a task")
    waiting = Waiting(system, handles[0])
    turn.pass_on_soon()
    began = time.monotonic()
    os.kill(system.broker(), signal.SIGKILL)
    system.restart_broker()
    time.sleep(AWAY)  # the tasks run on meanwhile
    go.touch()
    outcome = waiting.outcome(began)
    return {
        **outcome,
        **arrived(system, handles, began + CAP),
        "again": sum(runs(log).values()) - len(runs(log)),
    }


def broker_frozen(system: System, _: int) -> Mapping[str, Any]:
    """The broker is frozen and stays so."""
    log, go = Path("starts").absolute(), Path("go").absolute()
    handle = system.submit("wait_for", str(log), "task", str(go))
    expect(lambda: starts(log), "the task runs")
    waiting = Waiting(system, handle)
    time.sleep(SELDOM)  # so that it waits
    turn.pass_on_soon()
    began = time.monotonic()
    os.kill(system.broker(), signal.SIGSTOP)
    time.sleep(AWAY)  # the task runs on meanwhile
    go.touch()
    return waiting.outcome(began)


def workers_gone(system: System, _: int) -> Mapping[str, Any]:
    """All workers are killed at once, and none can start again."""
    log, go = Path("starts").absolute(), Path("go").absolute()
    handle = system.submit("wait_for", str(log), "task", str(go))
    expect(lambda: starts(log), "the task runs")
    waiting = Waiting(system, handle)
    turn.pass_on_soon()
    Path(os.environ[BROKEN]).touch()
    began = time.monotonic()
    for pid in system.workers():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return waiting.outcome(began)


def manager_killed(name: str) -> Mapping[str, Any]:
    """The script that started all is killed while its workers are busy for an hour."""
    adopt_orphans()
    log = Path("starts").absolute()
    manager = subprocess.Popen([sys.executable, __file__, name, "manage", "0"])
    expect(lambda: len(starts(log)) >= WORKERS, "all workers run a task")
    started = [process for process in descendants() if process.pid != manager.pid]
    turn.pass_on_soon()
    began = time.monotonic()
    manager.kill()
    manager.wait()
    gone = wait_until(lambda: not _left(started), CAP)
    return {
        "seconds": time.monotonic() - began if gone else None,
        "started": len(started),
        "left": len(_left(started)),
    }


def _left(started: Sequence[psutil.Process]) -> Sequence[psutil.Process]:
    descendants()  # reaps
    return [process for process in started if process.is_running()]


def manage(system: System, _: int) -> Mapping[str, Any]:
    """The script that is killed."""
    log = Path("starts").absolute()
    for number in range(WORKERS):
        system.submit("long", str(log), str(number))
    threading.Event().wait()
    return {}


FAULTS = {
    "killed": killed,
    "killed_pool": killed_pool,
    "storm": storm,
    "frozen": frozen,
    "broker_killed": broker_killed,
    "broker_frozen": broker_frozen,
    "workers_gone": workers_gone,
    "manage": manage,
}

#: In these the workers are started again if they end; with a frozen or killed broker as well.
NO_RESPAWN = {"workers_gone"}
BROKER_APART = {"broker_killed", "broker_frozen"}


def main(name: str, fault: str, seed: int) -> None:
    if fault == "manager_killed":
        turn.take()
        report(manager_killed(name))
        return
    if fault != "manage":
        turn.take()
    os.environ[BROKEN] = str(Path("broken").absolute())
    factory = SYSTEMS[name][fault in BROKER_APART]
    system = factory(WORKERS, respawn=fault not in NO_RESPAWN)
    try:
        system.start()
        report(FAULTS[fault](system, seed))
        turn.pass_on()
    finally:
        # What hangs now is killed by the script that runs this probe.
        system.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
