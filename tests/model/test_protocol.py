"""The hand-out's protocol, checked without a process: whatever is lost, late, frozen or dead, each
message is done once or given up, and nothing is run by two at a time.
"""

from __future__ import annotations

import os

import pytest
from machine import Focus, run

#: Histories to try. More find rarer things: CLUSTER_TEST_HISTORIES=10000.
HISTORIES = int(os.environ.get("CLUSTER_TEST_HISTORIES", "100"))

#: Seconds that one may take on a machine that has other things to do as well.
EACH = 2


@pytest.mark.timeout(60 + EACH * HISTORIES)
def test_everything_published_is_done_once_or_given_up():
    run(Focus(), steps=40, max_examples=HISTORIES)
