"""Which versions this process runs, of all that manager and workers must agree on."""

from __future__ import annotations

import platform
from collections.abc import Mapping

from cluster._version import __version__


def versions() -> Mapping[str, str]:
    """By name."""
    import celery
    import kombu

    return {
        "celery-cluster": __version__,
        "Python": platform.python_version(),
        "Celery": celery.__version__,
        "kombu": kombu.__version__,
    }
