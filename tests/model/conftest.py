"""The world's clock is everybody's."""

from __future__ import annotations

import logging

import pytest
from machine import CLOCK

from cluster.broker import workers as guardian_module
from cluster.wire import ledger


@pytest.fixture(autouse=True)
def the_worlds_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guardian_module, "time", CLOCK)
    monkeypatch.setattr(logging.getLogger(ledger.__name__), "disabled", True)
