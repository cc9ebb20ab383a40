"""Count words in files, one task a file; a task that fails doesn't take the others along.

python examples/word_count.py README.md docs/*.md
"""

import sys
from collections import Counter
from pathlib import Path

from celery import Celery

import cluster

app = Celery("word-count")


@app.task(autoretry_for=(OSError,), max_retries=2, default_retry_delay=0.1)
def count_words(path: str) -> dict[str, int]:
    return Counter(Path(path).read_text().lower().split())


def main(paths: list[str]) -> None:
    total: Counter[str] = Counter()
    with cluster.start(minimum=1, app=app):  # a worker for each CPU; one will do
        results = {path: count_words.delay(path) for path in paths}
        for path, result in results.items():
            try:
                total.update(result.get())
            except OSError as error:
                print(f"{path}: {error}", file=sys.stderr)
    for word, count in total.most_common(10):
        print(f"{count:6} {word}")


if __name__ == "__main__":
    main(sys.argv[1:])
