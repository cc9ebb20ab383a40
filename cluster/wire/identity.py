"""Who a worker is: its Celery node name, and the fence that goes with it.

The name is made of the platform's own name for the worker and a nonce of this
boot, so that no two workers share one: with host networking all containers of
a machine have the same host name, and Celery merges equal names silently. A
platform that runs the same job again boots a new nonce: another worker.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable
from typing import NoReturn

from cluster.errors import StateError

_node: str | None = None
_main: int | None = None
_on_fenced: Callable[[], NoReturn] | None = None


class Fenced(BaseException):
    """This node was declared dead; what it was about to do has not been done.

    Not an ``Exception``: nothing may take it for a task's or a connection's
    error and go on.
    """


def new_node_name(worker: str) -> str:
    """A node name for this boot of the platform's ``worker``."""
    return f"{worker}-{secrets.token_hex(4)}@{socket.gethostname()}"


def assume(node: str, on_fenced: Callable[[], NoReturn]) -> None:
    """Make this process, and those it forks, that worker.

    Args:
        node: the Celery node name.
        on_fenced: ends the process; called where the broker refuses the node.
    """
    global _node, _on_fenced, _main
    _node, _on_fenced, _main = node, on_fenced, os.getpid()


def current() -> str | None:
    """This process's node name, or ``None`` outside a worker."""
    return _node


def taking() -> str | None:
    """The node name in the one process that takes messages for the node, else ``None``.

    What a task consumes by itself, in a child of the pool, is the task's.
    """
    return _node if os.getpid() == _main else None


def fenced(node: str) -> NoReturn:
    """The broker refused the node: leave, by the way the worker has set."""
    if _on_fenced is not None and node == _node:
        _on_fenced()
    raise Fenced(f"{node} (process {os.getpid()}) was declared dead")


def refuse_start(*_: object, **__: object) -> NoReturn:
    """``cluster.start`` in a worker.

    Raises:
        StateError: always.
    """
    from celery import current_task

    if current_task:
        raise StateError(
            f"cluster.start was called in the task {current_task.name}, and no worker starts a "
            "cluster. Start it in the program that sends the tasks."
        )
    raise StateError(
        "cluster.start was called inside a worker. When a worker imports your script, it must "
        'not start a cluster of its own: put the call under if __name__ == "__main__":.'
    )
