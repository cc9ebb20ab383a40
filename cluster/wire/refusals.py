"""What is refused to whoever sends a task or stores a result, and in which words.

The exceptions are Celery's ``EncodeError`` as well: what a worker can't send on
or store, a result or the next task of a chain, then fails the task, and with it
all that waits for it (celery/app/trace.py, build_tracer). Any other exception
would end there without a result.
"""

from __future__ import annotations

from typing import NoReturn

from kombu.exceptions import EncodeError

from cluster import errors

_REMEDY = (
    "Send where the data is rather than the data itself, such as the path of a file that all "
    "workers reach or an address in S3; or raise the limit by CLUSTER_MESSAGE_LIMIT."
)


class MessageTooLarge(errors.MessageTooLarge, EncodeError):  # type: ignore[misc]
    """As the public one."""


class BrokerFull(errors.BrokerFull, EncodeError):  # type: ignore[misc]
    """As the public one."""


def check_size(what: str, size: int, limit: int) -> None:
    """Raise :class:`MessageTooLarge` if ``size`` is beyond ``limit``, both in bytes.

    Args:
        what: is too large, at the beginning of a sentence.
    """
    if size > limit:
        raise MessageTooLarge(
            f"{what}: {megabytes(size)}, and the limit is {megabytes(limit)}. {_REMEDY}",
            size,
            limit,
        )


def refuse_as_full(why: str) -> NoReturn:
    """Raise :class:`BrokerFull`; ``why`` is the broker's word."""
    raise BrokerFull(
        f"The broker has no room for more ({why}). Nothing was sent or stored. Get results before "
        "you send more, set ignore_result=True for tasks whose results nobody asks for, or give "
        "the broker more memory by CLUSTER_BROKER_MEMORY."
    )


def refuse_for_now(why: str) -> NoReturn:
    """Raise :class:`BrokerFull` for a broker that can't write; ``why`` is its word."""
    raise BrokerFull(
        f"The broker can't write at the moment ({why}): the disk with its directory, in TMPDIR, "
        "may be full. Nothing was sent or stored. Make room there, and send again."
    )


def megabytes(size: int) -> str:
    """A number of bytes, for people."""
    return f"{size / 2**20:.1f} MiB"
