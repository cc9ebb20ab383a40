"""From an environment to a Celery worker that takes part in its cluster."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cluster._version import __version__
from cluster.errors import ConfigurationError
from cluster.interpreter import restore_search_path
from cluster.model import Endpoint
from cluster.settings import (
    CELERY_OVERRIDES,
    THREAD_LIMITS,
    WORKER_VARIABLES,
    WorkerSettings,
    worker_settings,
)
from cluster.wire.exitcodes import ExitCode

if TYPE_CHECKING:
    from celery import Celery

    from cluster.worker.drain import Drain


def main() -> NoReturn:
    """Run a worker until it leaves; ends the process with a code of the table."""
    try:
        settings = worker_settings()
    except ConfigurationError as error:
        sys.exit(f"cluster worker: {error}")
    for name in WORKER_VARIABLES:
        os.environ.pop(name, None)
    # Who limits OpenMP means all of them.
    threads = os.environ.get("OMP_NUM_THREADS") or str(settings.threads)
    for name in THREAD_LIMITS:
        os.environ.setdefault(name, threads)
    restore_search_path(settings.path)
    if not settings.path:
        _find_what_is_here(settings)
    # Into a file or a container's log, and to be seen as it comes.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if settings.version != __version__:
        print(
            f"This worker runs celery-cluster {__version__}, its manager {settings.version}. "
            "Install the same version on both sides.",
            file=sys.stderr,
        )
        sys.exit(ExitCode.VERSION_MISMATCH)
    sys.exit(_run(settings))


def _find_what_is_here(settings: WorkerSettings) -> None:
    """On another machine than the manager's, or in a container: as for Celery's own command,
    modules are in the working directory, too. So may the script be, if it isn't where it was."""
    sys.path.insert(0, str(Path.cwd()))
    script = Path(settings.app["script"])
    if not settings.app["script"] or script.exists():
        return
    here = Path.cwd() / script.name
    if here.exists():
        settings.app["script"] = os.environ["MP_MAIN_FILE"] = str(here)


def _run(settings: WorkerSettings) -> int:
    # What these import includes Celery, which looks at MP_MAIN_FILE then.
    from cluster import appref, binding
    from cluster.wire import identity
    from cluster.wire.secret import WORKER
    from cluster.worker.drain import Drain
    from cluster.worker.processes import end_now, keep_to_main, mark_main
    from cluster.worker.request import use_for_all_tasks
    from cluster.worker.watchdog import Watchdog

    node = identity.new_node_name(settings.worker)
    mark_main(settings.scratch)
    identity.assume(node, on_fenced=lambda: end_now(ExitCode.FENCED))
    host, _, port = settings.address.rpartition(":")
    endpoint = Endpoint(host, int(port), settings.secret, WORKER)
    keep_to_main(endpoint.host, endpoint.port)
    drain = Drain()
    watchdog = Watchdog(
        endpoint,
        node=node,
        parent=settings.parent,
        liveness_timeout=settings.liveness_timeout,
        orphan_timeout=settings.orphan_timeout,
        drain=drain,
    )
    # Before the app is imported: that may take minutes, or never end.
    watchdog.start()
    if not watchdog.wait_until_subscribed():
        print(f"No connection to the broker at {settings.address}.", file=sys.stderr)
        return ExitCode.ORPHANED
    binding.set_defaults()
    use_for_all_tasks()
    ref = appref.AppRef.from_fields(settings.app)
    try:
        app = appref.import_app(ref)
    except (Exception, SystemExit):  # noqa: BLE001 (it is the user's code)
        _print_users_part_of_traceback()
        print(f"The app can't be imported from {ref.script or ref.home}.", file=sys.stderr)
        return ExitCode.IMPORT_FAILED
    for name in CELERY_OVERRIDES:  # they would beat what comes now
        os.environ.pop(name, None)
    binding.bind_worker(
        app,
        endpoint,
        max_deliveries=settings.max_deliveries,
        message_limit=settings.message_limit,
    )
    return _serve(app, settings, node, drain)


def _print_users_part_of_traceback() -> None:
    """Without the frames, ours and the import system's, that come before the user's."""
    error = sys.exception()
    assert error is not None
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith(
        ("cluster.", "importlib")
    ):
        trace = trace.tb_next
    traceback.print_exception(error.with_traceback(trace or error.__traceback__))


def _serve(app: Celery, settings: WorkerSettings, node: str, drain: Drain) -> int:
    from celery.exceptions import SecurityWarning
    from celery.signals import worker_process_init, worker_ready

    from cluster.worker import pool
    from cluster.worker.membership import Membership
    from cluster.worker.processes import begin_child

    # It runs as whoever started it does, and in a container that is mostly root.
    warnings.simplefilter("ignore", SecurityWarning)
    # Celery lets no root accept pickle, since whoever reaches the broker could then run
    # anything; here that takes the run's secret.
    force_root = os.environ.get("C_FORCE_ROOT")
    os.environ["C_FORCE_ROOT"] = "true"
    try:
        worker = app.Worker(
            hostname=node,
            pool=pool.NAME,
            concurrency=settings.concurrency,
            loglevel=settings.loglevel,
            without_mingle=True,
            without_gossip=True,
            without_heartbeat=True,
            quiet=True,
        )
    except Exception:  # noqa: BLE001 (whatever it is, another worker would fail alike)
        traceback.print_exc()
        print("Celery can't build a worker for this app.", file=sys.stderr)
        return ExitCode.IMPORT_FAILED
    finally:
        if force_root is None:
            del os.environ["C_FORCE_ROOT"]
        else:
            os.environ["C_FORCE_ROOT"] = force_root
    membership = Membership(worker, settings.worker, drain)
    worker_process_init.connect(begin_child)
    worker_ready.connect(membership.begin)
    worker.start()
    return int(worker.exitcode or ExitCode.LEFT)
