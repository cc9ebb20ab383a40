"""The ``cluster`` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cluster._version import __version__
from cluster.errors import ClusterError

app = typer.Typer(
    name="cluster",
    help="Celery workers that come and go with the job that needs them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # they may hold the run's secret
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"celery-cluster {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    workers: Annotated[
        int | None,
        typer.Option("--workers", "-w", min=1, help="How many. Default: one for each CPU."),
    ] = None,
) -> None:
    """Count the primes below a thousand million on a cluster of local processes."""
    from cluster.cli.demo import run

    try:
        right = run(workers)
    except ClusterError as error:
        print(f"cluster demo: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    if not right:
        raise typer.Exit(1)


@app.command()
def worker() -> None:
    """Run a worker: what a manager starts, in a process or a container.

    A manager (cluster.start) says by CLUSTER_... environment variables which
    cluster to join and which app to import. The exit code says why the worker
    ended: 0 told to leave, 81 by its platform, 82 manager or broker gone, 83
    declared dead, 84 the app can't be imported, 85 it runs what can't
    work with the manager.
    """
    from cluster.worker.boot import main

    main()
