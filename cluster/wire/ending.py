"""Which brokers of this process's are no more, and why.

Celery and kombu meet a broker that is gone with patience: they try again for
a while, or for ever. Once the cluster knows better, whoever asks its broker
for something is told at once.
"""

from __future__ import annotations

from cluster.errors import ClusterError

# By password: each run has its own. An entry stays, since results outlive
# their cluster, and one is small.
_ended: dict[str, ClusterError] = {}


def end(password: str, why: ClusterError) -> None:
    """The broker with this password is no more. The first reason counts."""
    _ended.setdefault(password, why)


def has_ended(password: str) -> bool:
    """Whether it is no more."""
    return password in _ended


def check(password: str) -> None:
    """Raise why the broker with this password is no more, if it isn't."""
    why = _ended.get(password)
    if why is not None:
        # A new one each time: one exception raised in several threads would
        # collect the tracebacks of all.
        raise type(why)(*why.args)
