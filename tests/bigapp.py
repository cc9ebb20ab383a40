"""An app for workers in containers: a task that takes much memory, one that reads a file."""

from __future__ import annotations

from pathlib import Path

from celery import Celery

app = Celery("big")


@app.task
def swallow(mebibytes: int) -> int:
    return len(b"x" * (mebibytes * 2**20))


@app.task
def read(path: str) -> str:
    print(f"reading {path}")
    return Path(path).read_text()
