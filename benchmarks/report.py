"""Markdown: tables, what was measured with, and the output."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import psutil


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def spread(values: Sequence[float], unit: str, digits: int = 2) -> str:
    """The median, and the least and the greatest."""
    if not values:
        return "–"
    middle = f"{statistics.median(values):.{digits}f}"
    return f"{middle} {unit} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def machine(distributions: Iterable[str], *others: str) -> str:
    """The machine and the versions, as a list.

    Args:
        distributions: those to tell the version of, if they are installed.
        others: further versions, as text.
    """
    versions = [f"{name} {version}" for name in distributions if (version := installed(name))]
    cpus = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else None
    memory = psutil.virtual_memory().total / 2**30
    lines = [
        f"{cpus or os.cpu_count()} CPUs ({_model()}), {memory:.0f} GiB",
        f"{platform.system()} {platform.machine()}, load {os.getloadavg()[0]:.1f} at the beginning",
        f"{platform.python_implementation()} {platform.python_version()}",
        ", ".join([*versions, *others]),
    ]
    return "\n".join(f"- {line}" for line in lines)


def installed(distribution: str) -> str | None:
    """Its version, or ``None``."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def publish(text: str, output: Path | None) -> None:
    """Print it, and write it to the file if there is one."""
    print(text)
    if output is not None:
        output.write_text(text + "\n")


def _model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or "unknown"
