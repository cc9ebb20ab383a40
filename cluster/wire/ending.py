"""Which brokers of this process's are no more, or get no more results, and why.

Celery and kombu meet a broker that is gone with patience: they try again for
a while, or for ever. Once the cluster knows better, whoever asks its broker
for something is told at once. And where only the workers are gone, what is
there can still be got; who waits for more is told.
"""

from __future__ import annotations

from cluster.errors import ClusterError

# By password: each run has its own. An entry stays, since results outlive
# their cluster, and one is small.
_ended: dict[str, ClusterError] = {}
_complete: dict[str, ClusterError] = {}


def end(password: str, why: ClusterError) -> None:
    """The broker with this password is no more. The first reason counts."""
    _ended.setdefault(password, why)


def complete(password: str, why: ClusterError) -> None:
    """Nothing will be added to the broker with this password. The first reason counts."""
    _complete.setdefault(password, why)


def has_ended(password: str) -> bool:
    """Whether it is no more."""
    return password in _ended


def is_complete(password: str) -> bool:
    """Whether nothing will be added to it."""
    return password in _ended or password in _complete


def check(password: str) -> None:
    """Raise why the broker with this password is no more, if it isn't."""
    _raise(_ended.get(password))


def check_coming(password: str) -> None:
    """Raise why there will be no more results, if so."""
    _raise(_ended.get(password) or _complete.get(password))


def _raise(why: ClusterError | None) -> None:
    if why is not None:
        # A new one each time: one exception raised in several threads would
        # collect the tracebacks of all.
        raise type(why)(*why.args)
