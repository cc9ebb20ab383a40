"""The command line says what it can do and ends with a code that fits."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from cluster._version import __version__
from cluster.cli.main import app
from cluster.cli.primes import count_primes

runner = CliRunner()


@pytest.mark.parametrize("command", [["-m", "cluster", "--version"]])
def test_the_version(command):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    assert done.stdout == f"celery-cluster {__version__}\n"


def test_help_names_the_commands():
    shown = runner.invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert "demo" in shown.output and "worker" in shown.output
    assert runner.invoke(app, []).output.split() == shown.output.split()
    assert "exit code" in runner.invoke(app, ["worker", "--help"]).output


def test_a_bad_option_is_refused():
    shown = runner.invoke(app, ["demo", "--workers", "0"])
    assert shown.exit_code == 2


def test_a_worker_by_hand_says_who_starts_workers():
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "worker"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "CLUSTER_ADDRESS" in done.stderr and "cluster.start" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("low", "high", "primes"),
    [(0, 10, 4), (0, 3, 1), (2, 3, 1), (10, 20, 4), (0, 100_000, 9592), (90, 97, 0), (90, 98, 1)],
)
def test_the_demos_task_counts_right(low, high, primes):
    assert count_primes(low, high)[0] == primes
