"""The last lines of a log file, without reading all of it."""

from __future__ import annotations

from pathlib import Path

#: Bytes to read for each line asked for, at most.
_LINE_AT_MOST = 1000


def last_lines(path: Path, count: int) -> list[str]:
    """The last ``count`` lines, or none where there is no such file (yet)."""
    if count <= 0:
        return []
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(0, end - count * _LINE_AT_MOST))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[-count:]
