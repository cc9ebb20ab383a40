"""What of a difference between manager and worker matters, and how it is shown."""

from __future__ import annotations

import pytest

from cluster import tables
from cluster.mismatch import Difference, Mismatches, Side, compare
from cluster.versions import versions

SAME = {"celery-cluster": "1.0.0", "Python": "3.11.7", "Celery": "5.7.0", "kombu": "5.7.0"}
MANAGER = Side(SAME, {"a", "b"})


@pytest.mark.parametrize(
    ("what", "version", "fatal"),
    [
        ("celery-cluster", "1.0.1", True),
        ("Celery", "4.4.7", True),
        ("Celery", "5.6.0", False),
        ("Celery", "5.7.1", None),
        ("kombu", "4.6.11", True),
        ("kombu", "5.8.0", False),
        ("Python", "3.12.1", False),
        ("Python", "3.11.2", None),
        ("Python", "4.0.0", True),
    ],
)
def test_versions_that_differ(what, version, fatal):
    found = compare(MANAGER, Side({**SAME, what: version}, {"a", "b", "celery.chord"}))
    assert [(one.what, one.worker, one.fatal) for one in found] == (
        [] if fatal is None else [(what, version, fatal)]
    )


def test_tasks_that_are_missing():
    assert compare(MANAGER, Side(SAME, {"b", "a", "more"})) == ()
    [some] = compare(MANAGER, Side(SAME, {"a"}))
    assert (some.what, some.manager, some.worker, some.fatal) == ("tasks", "2", "1", False)
    assert "not registered there: b." in some.meaning
    [none] = compare(MANAGER, Side(SAME, {"celery.chord"}))
    assert none.fatal
    assert compare(Side(SAME, ()), Side(SAME, ())) == ()


def test_what_many_workers_have_in_common_is_one_line():
    found = Mismatches(MANAGER)
    assert found.join("w1", MANAGER) == (False, False)
    other = Side({**SAME, "Python": "3.12.1"}, {"a", "b"})
    assert found.join("w1", other) == (False, True)
    assert found.join("w2", other) == (False, False)
    assert "w1, w2" in str(found)
    found.join("w3", other)
    assert str(found).splitlines() == [
        "          manager  worker  on",
        "  Python  3.11.7   3.12.1  3 workers  pickled arguments and results may not load",
    ]
    assert found.join("w4", Side({**SAME, "Celery": "4.4.7"}, {"a", "b"})) == (True, True)
    assert "can't work: another major version" in str(found)
    assert isinstance(compare(MANAGER, other)[0], Difference)


def test_the_versions_are_those_of_this_process():
    assert list(versions()) == list(SAME)
    assert all(version[0].isdigit() for version in versions().values())


def test_html_escapes_what_it_shows():
    shown = tables.as_html("a & b", [("x",), ("<script>",)])
    assert "a &amp; b" in shown and "&lt;script&gt;" in shown and "<th>x</th>" in shown
