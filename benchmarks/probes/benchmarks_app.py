"""The app of this project's probes and of stock Celery's, so that both boot the same one."""

from celery import Celery

app = Celery("benchmarks_app")


@app.task  # type: ignore[untyped-decorator]
def one() -> int:
    return 1
