"""``make chaos``: one run, by the environment's ``SEED``, ``KILLS`` and ``FAULTS``."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest
from tools import Traces

from chaos.drive import run
from chaos.faults import LIVENESS_TIMEOUT, chosen
from chaos.plan import make_plan
from chaos.report import as_json, as_text, failures

#: Kills of a run in CI.
KILLS = 200

#: Seconds that a run may take: some, and so many a kill.
AT_LEAST, EACH = 300, 2


def number(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)


@pytest.mark.filterwarnings("ignore:.*tasks at once on:RuntimeWarning")
@pytest.mark.timeout(AT_LEAST + EACH * number("CHAOS_KILLS", KILLS))
def test_every_task_has_its_one_result(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    nothing_left: Traces,
):
    """However many processes are killed and frozen, each task's result comes and is right; each
    run of a task beyond its first has a reason; nothing is left at the end."""
    seed = number("CHAOS_SEED", secrets.randbelow(10**6))
    monkeypatch.setenv("CLUSTER_LIVENESS_TIMEOUT", str(LIVENESS_TIMEOUT))
    monkeypatch.setenv("CLUSTER_MAX_DELIVERIES", "1000")
    names = os.environ.get("CHAOS_FAULTS", "").split()
    plan = make_plan(seed, number("CHAOS_KILLS", KILLS), chosen(names))

    def say(what: str) -> None:
        with capsys.disabled():
            print(f"seed {seed}: {what}", flush=True)

    say(f"{len(plan.steps)} faults on {plan.workers} workers. Again: make chaos SEED={seed}")
    done = run(plan, tmp_path / "executions", say)
    report = os.environ.get("CHAOS_REPORT")
    if report:
        Path(report).write_text(as_json(done))
    say(as_text(done))
    assert not failures(done), as_text(done)
