"""Celery workers that come and go with the job that needs them.

``cluster.start(4)`` starts a private broker, starts four workers that boot
your Celery app, waits until all four have answered a ping and hands you a
:class:`Cluster`. When it ends, however it ends, everything it started is gone.

The names are loaded when they are first used: the broker's guardian and the
workers are processes of this package too, and pay only for what they need.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cluster._version import __version__
from cluster.errors import (
    BrokerError,
    BrokerFull,
    BrokerLost,
    BrokerStartError,
    ClusterError,
    ConfigurationError,
    LaunchError,
    MessageTooLarge,
    StateError,
    VersionMismatch,
    WorkerLost,
    WorkersNotReady,
)

if sys.platform == "win32":
    raise ImportError(
        "celery-cluster runs on Linux and macOS. On Windows, use it inside WSL: "
        "https://learn.microsoft.com/windows/wsl/"
    )

if TYPE_CHECKING:
    from cluster.manager import Cluster, start

__all__ = [
    "BrokerError",
    "BrokerFull",
    "BrokerLost",
    "BrokerStartError",
    "Cluster",
    "ClusterError",
    "ConfigurationError",
    "LaunchError",
    "MessageTooLarge",
    "StateError",
    "VersionMismatch",
    "WorkerLost",
    "WorkersNotReady",
    "__version__",
    "start",
]

_LAZY = {"Cluster": "cluster.manager", "start": "cluster.manager"}


def __getattr__(name: str) -> Any:
    identity = sys.modules.get("cluster.wire.identity")
    if name == "start" and identity is not None and identity.current() is not None:
        # A worker imports the user's script, which imports this name: it needn't
        # pay for what it is refused.
        return identity.refuse_start
    try:
        module = _LAZY[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
