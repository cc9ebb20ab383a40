"""How this package starts its own modules as processes of the same Python."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence


def module_command(module: str, *arguments: str) -> Sequence[str]:
    """The command that runs ``module``; to be started with :func:`module_environment`.

    ``-P`` keeps the working directory off ``sys.path``: a ``redis.py`` that
    happens to lie there must not be imported in place of the library.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def module_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, with its ``sys.path`` for the module's imports.

    Args:
        extra: variables to add.
    """
    return {**os.environ, "PYTHONPATH": os.pathsep.join(_search_path()), **extra}


def search_path() -> str:
    """``sys.path`` with every entry absolute, as JSON: an entry may hold any character."""
    return json.dumps(_search_path())


def _search_path() -> list[str]:
    return [os.path.abspath(entry) for entry in sys.path]


def restore_search_path(path: str) -> None:
    """In the started module: the manager's ``sys.path``, and no ``PYTHONPATH`` for others.

    A program that a task runs must not inherit a search path made for this one.
    """
    original = os.environ.pop("CLUSTER_PYTHONPATH", "")
    if original:
        os.environ["PYTHONPATH"] = original
    else:
        os.environ.pop("PYTHONPATH", None)
    if path:
        sys.path[:] = json.loads(path)


def original_python_path(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What :func:`restore_search_path` puts back.

    Args:
        environment: what the started process is to have.
    """
    return {"CLUSTER_PYTHONPATH": environment.get("PYTHONPATH", "")}
