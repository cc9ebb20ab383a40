"""A Redis in this process: dictionaries, our real scripts in a real Lua, and a network that fails.

It knows the commands that this package uses and no other; one it doesn't know
is an error, as is one for a key of another type. Time stands still: nothing
expires. That a real server runs the scripts as this one does is shown by
``tests/integration/test_handout_model.py`` and ``test_miniredis.py``.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import hashlib
import json
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import lupa.lua51
import msgpack
from redis import Redis
from redis.client import Pipeline
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError, WatchError
from redis.exceptions import TimeoutError as RedisTimeoutError

from cluster.wire.client import lean

Request = tuple[bytes, ...]

#: Commands that change nothing.
READS = frozenset(
    (
        *(b"HLEN", b"HKEYS", b"HVALS", b"HEXISTS", b"GET", b"LINDEX", b"SISMEMBER"),
        *(b"PUBSUB", b"CLIENT", b"SCRIPT", b"INFO"),
    )
)

OK = "OK"
WRONG_TYPE = "WRONGTYPE Operation against a key holding the wrong kind of value"


# -- Lua -----------------------------------------------------------------------------


class Lua:
    """One interpreter for all servers: the scripts that it has compiled are stateless.

    https://redis.io/docs/latest/develop/programmability/lua-api/
    """

    def __init__(self) -> None:
        self._runtime = lupa.lua51.LuaRuntime(encoding=None)
        self._call: Callable[..., Any] = lambda *_: None
        self._null = object()
        names = self._runtime.globals()
        names[b"redis"] = self._table(
            {
                b"call": lambda *args: self._to_lua(self._call(tuple(map(_argument, args)))),
                b"sha1hex": lambda text: hashlib.sha1(text).hexdigest().encode(),
                b"error_reply": lambda text: self._table({b"err": text}),
                b"status_reply": lambda text: self._table({b"ok": text}),
            }
        )
        names[b"cjson"] = self._table(
            {
                b"decode": lambda text: self._to_lua(_loads(text), null=self._null),
                b"encode": lambda value: _dumps(self._from_lua(value)),
                b"null": self._null,
            }
        )
        names[b"cmsgpack"] = self._table(
            {
                b"pack": lambda *values: b"".join(
                    msgpack.packb(self._from_lua(value), use_bin_type=False) for value in values
                ),
                b"unpack": lambda packed: self._to_lua(msgpack.unpackb(packed, raw=True)),
            }
        )

    @cache  # noqa: B019 (there is one, for good)
    def _compiled(self, script: bytes) -> Callable[..., Any]:
        compiled: Callable[..., Any] = self._runtime.execute(
            b"return function(KEYS, ARGV)\n" + script + b"\nend"
        )
        return compiled

    def run(
        self,
        script: bytes,
        names: tuple[bytes, ...],
        arguments: tuple[bytes, ...],
        call: Callable[[Request], Any],
    ) -> Any:
        """Run a script whose ``redis.call`` is ``call``; return its reply."""
        self._call = call
        value = self._compiled(script)(
            self._runtime.table_from(names), self._runtime.table_from(arguments)
        )
        return self._reply(value)

    def _table(self, values: dict[bytes, Any]) -> Any:
        return self._runtime.table_from(values)

    def _to_lua(self, value: Any, null: Any = False) -> Any:
        match value:
            case None:
                return null
            case str():
                return self._table({b"ok": value.encode()}) if value == OK else value.encode()
            case list() | tuple():
                return self._runtime.table_from([self._to_lua(item, null) for item in value])
            case dict():
                return self._table(
                    {key.encode(): self._to_lua(item, null) for key, item in value.items()}
                )
        return value

    def _from_lua(self, value: Any) -> Any:
        """As cjson and cmsgpack see it: a table whose keys are 1, 2, … is a list."""
        if value is self._null:
            return None
        if lupa.lua51.lua_type(value) != "table":
            return value
        items = dict(value.items())
        if items and items.keys() == set(range(1, len(items) + 1)):
            return [self._from_lua(items[index]) for index in range(1, len(items) + 1)]
        return {key: self._from_lua(item) for key, item in items.items()}

    def _reply(self, value: Any) -> Any:
        """https://redis.io/docs/latest/develop/programmability/lua-api/#data-type-conversion"""
        if lupa.lua51.lua_type(value) == "table":
            if value[b"err"] is not None:
                raise ResponseError(value[b"err"].decode())
            if value[b"ok"] is not None:
                return OK
            reply = []
            for index in range(1, len(value) + 1):
                if value[index] is None:
                    break
                reply.append(self._reply(value[index]))
            return reply
        if value is True:
            return 1
        if value is False:
            return None
        return int(value) if isinstance(value, float) else value


def _argument(value: bytes | float) -> bytes:
    if isinstance(value, bytes):
        return value
    assert isinstance(value, int | float) and not isinstance(value, bool), value
    return b"%.17g" % value


def _loads(text: bytes) -> Any:
    return json.loads(text.decode(errors="surrogateescape"))


def _dumps(value: Any) -> bytes:
    return json.dumps(_text(value), ensure_ascii=False).encode(errors="surrogateescape")


def _text(value: Any) -> Any:
    match value:
        case bytes():
            return value.decode(errors="surrogateescape")
        case list():
            return [_text(item) for item in value]
        case dict():
            return {_text(key): _text(item) for key, item in value.items()}
    return value


@cache
def lua() -> Lua:
    return Lua()


# -- the server ----------------------------------------------------------------------


@dataclass(eq=False)
class Connection:
    """What the server sees of a client."""

    name: str = ""
    channels: set[str] = field(default_factory=set)
    since: float = 0.0  # when it last sent something
    waits_for: tuple[bytes, ...] = ()  # the lists that it is blocked on
    waits_until: float = 0.0
    popped: bytes | None = None  # what ended that
    inbox: list[bytes] = field(default_factory=list)  # what was published for it


class Server:
    """Keys, scripts, connections; and what is on its way to it.

    Args:
        now: the clock, for the idle times of connections.
    """

    def __init__(self, now: Callable[[], float] = lambda: 0.0) -> None:
        self.now = now
        self.data: dict[bytes, Any] = {}
        self.scripts: dict[str, bytes] = {}
        self.connections: list[Connection] = []
        self.late: list[tuple[str, list[Request]]] = []  # whose, and what
        self.up = True
        self.arriving = False  # what is executed has been on its way for long
        #: Carries out each request from outside; to be replaced by what looks at its effects.
        self.around: Callable[[str, Request, Callable[[Request], Any]], Any] = (
            lambda _who, request, carry_out: carry_out(request)
        )

    def stop(self) -> None:
        """Killed. What it has answered it has written; what it hasn't read is lost."""
        self.up = False
        self.scripts.clear()
        self.connections.clear()
        self.late.clear()

    def start(self) -> None:
        self.up = True

    def only_reads(self, request: Request) -> bool:
        """Whether this changes nothing; so does a script that isn't known."""
        name, *arguments = request
        if name not in {b"EVAL", b"EVALSHA"}:
            return name in READS
        script = arguments[0] if name == b"EVAL" else self.scripts.get(arguments[0].decode(), b"")
        return READS.issuperset(re.findall(rb"redis.call\('(\w+)'", script))

    def execute(self, who: str, request: Request) -> Any:
        """One request from outside."""
        try:
            return self.around(who, request, self._command)
        finally:
            self._serve_blocked()

    def arrive(self, index: int) -> None:
        """One that was held back comes in now; nobody waits for its reply any more."""
        who, requests = self.late.pop(index)
        self.arriving = True
        for request in requests:
            with contextlib.suppress(ResponseError):
                self.execute(who, request)
        self.arriving = False

    def block(self, connection: Connection, seconds: float, *names: str) -> None:
        """``BLPOP`` on a connection of its own; what it pops will be there."""
        connection.waits_until = self.now() + seconds
        connection.popped, connection.waits_for = None, tuple(name.encode() for name in names)
        self._serve_blocked()

    def _serve_blocked(self) -> None:
        for connection in self.connections:  # who connected first has waited longest: near enough
            for name in connection.waits_for:
                if name in self.data and self.now() < connection.waits_until:
                    connection.popped = self._command((b"LPOP", name))
                    connection.waits_for = ()
                    break

    def _command(self, request: Request) -> Any:
        name, *arguments = request
        method = getattr(self, f"_{name.decode().lower()}", None)
        if method is None:
            raise ResponseError(f"unknown command '{name.decode()}'")
        return method(*arguments)

    # -- values

    def _value(self, key: bytes, kind: type) -> Any:
        value = self.data.get(key)
        if value is not None and not isinstance(value, kind):
            raise ResponseError(WRONG_TYPE)
        return kind() if value is None else value

    def _keep(self, key: bytes, value: Any) -> None:
        if value:
            self.data[key] = value
        else:
            self.data.pop(key, None)

    def _set(self, key: bytes, value: bytes, *_options: bytes) -> str:
        self.data[key] = value
        return OK

    def _setex(self, key: bytes, _seconds: bytes, value: bytes) -> str:
        return self._set(key, value)

    def _setnx(self, key: bytes, value: bytes) -> int:
        return int(self.data.setdefault(key, value) is value)

    def _get(self, key: bytes) -> bytes | None:
        return self._value(key, bytes) if key in self.data else None

    def _incrby(self, key: bytes, amount: bytes) -> int:
        number = int(self._value(key, bytes) or 0) + int(amount)
        self.data[key] = b"%d" % number
        return number

    def _incr(self, key: bytes) -> int:
        return self._incrby(key, b"1")

    def _exists(self, *names: bytes) -> int:
        return sum(key in self.data for key in names)

    def _del(self, *names: bytes) -> int:
        return sum(self.data.pop(key, None) is not None for key in names)

    _unlink = _del

    def _expire(self, key: bytes, *_: bytes) -> int:
        return int(key in self.data)

    _pexpire = _expire

    def _persist(self, _key: bytes) -> int:
        return 0

    def _flushall(self) -> str:
        self.data.clear()
        return OK

    # -- hashes

    def _hset(self, key: bytes, *pairs: bytes) -> int:
        value = self._value(key, dict)
        new = set(pairs[::2]) - value.keys()
        value.update(zip(pairs[::2], pairs[1::2], strict=True))
        self._keep(key, value)
        return len(new)

    def _hsetnx(self, key: bytes, name: bytes, item: bytes) -> int:
        return 0 if self._hexists(key, name) else self._hset(key, name, item)

    def _hget(self, key: bytes, name: bytes) -> bytes | None:
        item: bytes | None = self._value(key, dict).get(name)
        return item

    def _hmget(self, key: bytes, *names: bytes) -> list[bytes | None]:
        return [self._hget(key, name) for name in names]

    def _hdel(self, key: bytes, *names: bytes) -> int:
        value = self._value(key, dict)
        gone = [value.pop(name) for name in set(names) if name in value]
        self._keep(key, value)
        return len(gone)

    def _hexists(self, key: bytes, name: bytes) -> int:
        return int(name in self._value(key, dict))

    def _hincrby(self, key: bytes, name: bytes, amount: bytes) -> int:
        number = int(self._hget(key, name) or 0) + int(amount)
        self._hset(key, name, b"%d" % number)
        return number

    def _hlen(self, key: bytes) -> int:
        return len(self._value(key, dict))

    def _hkeys(self, key: bytes) -> list[bytes]:
        return list(self._value(key, dict))

    def _hvals(self, key: bytes) -> list[bytes]:
        return list(self._value(key, dict).values())

    def _hgetall(self, key: bytes) -> list[bytes]:
        return [part for pair in self._value(key, dict).items() for part in pair]

    # -- lists

    def _lpush(self, key: bytes, *items: bytes) -> int:
        value = [*reversed(items), *self._value(key, list)]
        self.data[key] = value
        return len(value)

    def _rpush(self, key: bytes, *items: bytes) -> int:
        value = [*self._value(key, list), *items]
        self.data[key] = value
        return len(value)

    def _lpop(self, key: bytes) -> bytes | None:
        return self._pop(key, 0)

    def _rpop(self, key: bytes) -> bytes | None:
        return self._pop(key, -1)

    def _pop(self, key: bytes, end: int) -> bytes | None:
        value = list(self._value(key, list))
        if not value:
            return None
        item: bytes = value.pop(end)
        self._keep(key, value)
        return item

    def _llen(self, key: bytes) -> int:
        return len(self._value(key, list))

    def _lindex(self, key: bytes, index: bytes) -> bytes | None:
        value = self._value(key, list)
        with contextlib.suppress(IndexError):
            item: bytes = value[int(index)]
            return item
        return None

    def _lrange(self, key: bytes, first: bytes, last: bytes) -> list[bytes]:
        value = self._value(key, list)
        start, stop = (
            int(end) if int(end) >= 0 else max(len(value) + int(end), 0 if end is first else -1)
            for end in (first, last)
        )
        return list(value[start : stop + 1])

    def _ltrim(self, key: bytes, first: bytes, last: bytes) -> str:
        self._keep(key, self._lrange(key, first, last))
        return OK

    def _lmove(self, source: bytes, target: bytes, off: bytes, onto: bytes) -> bytes | None:
        item = self._pop(source, 0 if off == b"LEFT" else -1)
        if item is not None:
            (self._lpush if onto == b"LEFT" else self._rpush)(target, item)
        return item

    def _lrem(self, key: bytes, count: bytes, item: bytes) -> int:
        value, most, gone = list(self._value(key, list)), int(count), 0
        if most < 0:
            value.reverse()
        while item in value and (most == 0 or gone < abs(most)):
            value.remove(item)
            gone += 1
        if most < 0:
            value.reverse()
        self._keep(key, value)
        return gone

    # -- sets

    def _sadd(self, key: bytes, *items: bytes) -> int:
        value = self._value(key, set)
        new = set(items) - value
        self.data[key] = value | new
        return len(new)

    def _srem(self, key: bytes, *items: bytes) -> int:
        value = self._value(key, set)
        gone = set(items) & value
        self._keep(key, value - gone)
        return len(gone)

    def _sismember(self, key: bytes, item: bytes) -> int:
        return int(item in self._value(key, set))

    def _smembers(self, key: bytes) -> list[bytes]:
        return sorted(self._value(key, set))

    def _scard(self, key: bytes) -> int:
        return len(self._value(key, set))

    # -- transactions

    def watched(self, names: tuple[bytes, ...]) -> dict[bytes, Any]:
        """What these keys hold; a transaction that follows is carried out if that is still so."""
        return {name: copy.copy(self.data.get(name)) for name in names}

    def _exec(self, watched: dict[bytes, Any], requests: list[Request]) -> list[Any] | None:
        if any(self.data.get(name) != value for name, value in watched.items()):
            return None
        return [self._command(request) for request in requests]

    # -- connections and scripts

    def _ping(self, *_: bytes) -> str:
        return "PONG"

    def _info(self, *_: bytes) -> str:
        return "used_memory:0\r\nmaxmemory:0\r\n"

    def _publish(self, channel: bytes, message: bytes) -> int:
        for connection in self.connections:
            if channel.decode() in connection.channels:
                connection.inbox.append(message)
        return self._subscribers(channel.decode())

    def _subscribers(self, channel: str) -> int:
        return sum(channel in connection.channels for connection in self.connections)

    def _pubsub(self, _numsub: bytes, *channels: bytes) -> list[Any]:
        return [
            part for channel in channels for part in (channel, self._subscribers(channel.decode()))
        ]

    def _client(self, what: bytes, *options: bytes) -> bytes | str:
        if what != b"LIST":
            return OK
        wanted = options[1].lower() if options else None
        lines = [
            f"id={number} addr=127.0.0.1:{number} name={connection.name} "
            f"age=0 idle={int(self.now() - connection.since)} flags=N db=0 "
            f"sub={len(connection.channels)} psub=0 lib-name= lib-ver= cmd=ping user=default\n"
            for number, connection in enumerate(self.connections, 1)
            if wanted is None or wanted == (b"pubsub" if connection.channels else b"normal")
        ]
        return "".join(lines).encode()

    def _script(self, what: bytes, *arguments: bytes) -> Any:
        if what == b"EXISTS":
            return [int(sha.decode() in self.scripts) for sha in arguments]
        assert what == b"LOAD", what
        sha = hashlib.sha1(arguments[0]).hexdigest()
        self.scripts[sha] = arguments[0]
        return sha.encode()

    def _eval(self, script: bytes, *rest: bytes) -> Any:
        return self._evalsha(self._script(b"LOAD", script), *rest)

    def _evalsha(self, sha: bytes, count: bytes, *rest: bytes) -> Any:
        script = self.scripts.get(sha.decode())
        if script is None:
            raise NoScriptError("No matching script. Please use EVAL.")
        return lua().run(script, rest[: int(count)], rest[int(count) :], self._command)


# -- the way to it -------------------------------------------------------------------


class Fate(enum.Enum):
    """What may become of a request."""

    DONE = "it is executed and answered"
    LOST = "it never arrives"
    UNANSWERED = "it is executed, and the reply is lost"
    TWICE = "the reply is lost, and it is sent again"
    LATE = "the sender has long given up when it arrives"


class Link:
    """One party's way to the server: its connection, and what becomes of its requests.

    A fate holds for one request that changes something: what comes of the others is the same
    as if the connection had broken before.
    """

    def __init__(self, server: Server, who: str, name: str = "") -> None:
        self.server, self.who, self.name = server, who, name
        self.cut = False
        self.failed = False  # whether a request ever did
        self.fates: deque[Fate] = deque()
        self.connection: Connection | None = None
        self._abandoned: list[Connection] = []

    def call(self, requests: list[Request]) -> list[Any]:
        """Send these together; return replies, or the errors that are."""
        reads = all(self.server.only_reads(request) for request in requests)
        fate = self.fates.popleft() if self.fates and not reads else Fate.DONE
        if not self.server.up:
            raise RedisConnectionError("Connection refused")
        if self.cut and fate is not Fate.LATE:
            fate = Fate.LOST
        self.failed = self.failed or fate is not Fate.DONE
        if fate is Fate.LATE:
            self.server.late.append((self.who, requests))
        if fate in (Fate.LATE, Fate.LOST):
            self.close()
            raise RedisTimeoutError("Timeout reading from socket")
        self._connect()
        replies = self._executed(requests)
        if fate is Fate.TWICE:
            replies = self._executed(requests)
        if fate is Fate.UNANSWERED:
            self.close()
            raise RedisConnectionError("Connection closed by server.")
        return replies

    def _executed(self, requests: list[Request]) -> list[Any]:
        replies: list[Any] = []
        for request in requests:
            try:
                replies.append(self.server.execute(self.who, request))
            except ResponseError as error:
                replies.append(error)
        return replies

    def _connect(self) -> None:
        if self.connection not in self.server.connections:
            self.connection = Connection(self.name)
            self.server.connections.append(self.connection)
        self.connection.since = self.server.now()

    def block(self, seconds: float, *names: str) -> Connection:
        """Block on these lists; the server sees it on this connection."""
        self._reach()
        assert self.connection is not None
        self.server.block(self.connection, seconds, *names)
        return self.connection

    def _reach(self) -> None:
        if self.cut or not self.server.up:
            self.close()
            raise RedisConnectionError("Connection refused")
        self._connect()

    def watch(self, *names: str) -> dict[bytes, Any]:
        """As ``WATCH``."""
        self._reach()
        return self.server.watched(tuple(name.encode() for name in names))

    def subscribe(self, *channels: str) -> Connection:
        """Hear what is published there; sending this again is a sign of life and no more."""
        self._reach()
        assert self.connection is not None
        self.connection.channels.update(channels)
        return self.connection

    def close(self) -> None:
        """The server hears of it, unless nothing gets through to it: then when something does."""
        if self.connection is not None:
            self._abandoned.append(self.connection)
        self.connection = None
        if not self.cut:
            for connection in self._abandoned:
                if connection in self.server.connections:
                    self.server.connections.remove(connection)
            self._abandoned.clear()


class Client(Redis):
    """redis-py's own client, whose requests go over a :class:`Link`."""

    def __init__(self, link: Link) -> None:
        super().__init__(protocol=2, **lean())
        self.link = link

    def execute_command(self, *args: Any, **options: Any) -> Any:
        [reply] = self._send([(args, options)])
        if isinstance(reply, Exception):
            raise reply
        return reply

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Pipeline:
        return _Pipeline(self, transaction)

    def _send(
        self,
        commands: list[tuple[tuple[Any, ...], dict[str, Any]]],
        watched: dict[bytes, Any] | None = None,
    ) -> list[Any]:
        """Send these together; as a transaction, if something is ``watched`` for it."""
        encode = self.get_encoder().encode
        requests: list[Any] = [
            (
                *(word.encode() for word in args[0].split()),
                *(bytes(encode(argument)) for argument in args[1:]),
            )
            for args, _ in commands
        ]
        if watched is None:
            replies = self.link.call(requests)
        else:
            [replies] = self.link.call([(b"EXEC", watched, requests)])
        if replies is None:
            raise WatchError("Watched variable changed.")
        return [
            self._parsed(args[0], reply, options)
            for (args, options), reply in zip(commands, replies, strict=True)
        ]

    def _parsed(self, name: str, reply: Any, options: dict[str, Any]) -> Any:
        """As redis-py does it: ``Redis.parse_response``."""
        if isinstance(reply, Exception):
            return reply
        if isinstance(reply, str):
            reply = reply.encode()
        options = {key: value for key, value in options.items() if key != "keys"}
        options.pop("NEVER_DECODE", None)
        callback = self.response_callbacks.get(name)
        return reply if callback is None else callback(reply, **options)


class _Pipeline(Pipeline):
    def __init__(self, client: Client, transaction: bool) -> None:
        super().__init__(client.connection_pool, client.response_callbacks, transaction, None)
        self._client = client
        self._watched: dict[bytes, Any] = {}

    def watch(self, *names: str) -> bool:
        self.watching = True
        self._watched = self._client.link.watch(*names)
        return True

    def immediate_execute_command(self, *args: Any, **options: Any) -> Any:
        return self._client.execute_command(*args, **options)

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        commands = [(args, options) for args, options in self.command_stack]
        watched, atomic = self._watched, self.transaction or self.explicit_transaction
        self._watched = {}
        self.reset()
        if not commands:
            return []
        replies = self._client._send(commands, watched if atomic else None)
        if raise_on_error:
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
        return replies
