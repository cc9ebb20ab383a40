"""docs/errors.md is true: its rows are this test's parameters."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from celery import Celery
from sampleapp import app
from typer.testing import CliRunner

import cluster
from cluster import manager
from cluster.cli.main import app as command_line
from cluster.launchers.local import LocalLauncher

DOCUMENT = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()


def rows(section: str) -> list[list[str]]:
    """The rows of the table in this section of the document, as their cells."""
    [text] = re.findall(rf"(?ms)^## {re.escape(section)}$(.*?)(?=^## |\Z)", DOCUMENT)
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in line.strip("| ").split(" | ")] for line in lines]


def says(message: str, error: object) -> bool:
    """Whether an error's text is this message, whose ``…`` stands for anything."""
    pattern = ".*".join(re.escape(part.strip()) for part in message.split("…"))
    return re.fullmatch(pattern, " ".join(str(error).split())) is not None


@pytest.fixture
def _nothing_starts(monkeypatch: pytest.MonkeyPatch):
    """Starting a broker or a worker would be too late for any of these."""

    def started(*_, **__):
        raise AssertionError("something was started")

    monkeypatch.setattr(manager, "Broker", started)
    monkeypatch.setattr(LocalLauncher, "prepare", started)


@pytest.mark.usefixtures("_nothing_starts")
@pytest.mark.parametrize(("call", "message"), rows("`cluster.start`"))
def test_bad_arguments_of_start(call: str, message: str):
    app.set_current()
    names = {"cluster": cluster, "Celery": Celery, "LocalLauncher": LocalLauncher}
    with pytest.raises(cluster.ConfigurationError) as caught:
        eval(call, names)
    assert says(message, caught.value), caught.value
    assert isinstance(caught.value, ValueError)


@pytest.mark.usefixtures("_nothing_starts")
@pytest.mark.parametrize(("variable", "message"), rows("The environment"))
def test_bad_environment(variable: str, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(*variable.split("=", 1))
    with pytest.raises(cluster.ConfigurationError) as caught:
        cluster.start(1, app=app)
    assert says(message, caught.value), caught.value


def test_bad_arguments_of_a_running_cluster(nothing_left):
    with cluster.start(0, app=app) as c:
        for call, message in rows("A running cluster"):
            with pytest.raises(cluster.ConfigurationError) as caught:
                eval(call, {"c": c})
            assert says(message, caught.value), caught.value
        assert c.state == "ready"


@pytest.mark.usefixtures("_nothing_starts")
@pytest.mark.parametrize(("command", "code", "message"), rows("The command line"))
def test_bad_command_lines(command: str, code: str, message: str):
    _, *arguments = shlex.split(command)
    if arguments == ["worker"]:  # it ends its process
        done = subprocess.run(
            [sys.executable, "-m", *shlex.split(command)],
            capture_output=True,
            text=True,
            check=False,
        )
        shown, ended = done.stderr, done.returncode
    else:
        result = CliRunner().invoke(command_line, arguments)
        shown, ended = result.output, result.exit_code
    assert ended == int(code)
    # What a terminal frames and folds: its words, in order.
    words = " ".join(re.findall(r"[^\s│╭╮╰╯─]+", shown))
    assert says(f"…{message}…", words), words
