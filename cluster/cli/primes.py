"""The demo's app: how many primes are there below a thousand million?"""

from __future__ import annotations

import math
import time

from celery import Celery

#: The question, and the answer as the tables have it: https://oeis.org/A006880
BELOW = 1_000_000_000
PRIMES_BELOW = 50_847_534

#: Numbers that one task sieves.
SPAN = 5_000_000

app = Celery("cluster-demo")


@app.task(name="cluster-demo.count_primes")  # type: ignore[untyped-decorator]
def count_primes(low: int, high: int) -> tuple[int, float]:
    """Count the primes in ``[low, high)`` by the sieve of Eratosthenes.

    Returns:
        How many, and the seconds it took.
    """
    began = time.perf_counter()
    low = max(low, 2)
    candidates = bytearray(b"\x01") * (high - low)
    for divisor in _primes_up_to(math.isqrt(high - 1)):
        first = max(divisor * divisor, -(-low // divisor) * divisor)
        candidates[first - low :: divisor] = bytes(len(range(first, high, divisor)))
    return candidates.count(1), time.perf_counter() - began


def _primes_up_to(limit: int) -> list[int]:
    candidates = bytearray(b"\x01") * (limit + 1)
    for number in range(2, math.isqrt(limit) + 1):
        if candidates[number]:
            candidates[number * number :: number] = bytes(
                len(range(number * number, limit + 1, number))
            )
    return [number for number in range(2, limit + 1) if candidates[number]]
