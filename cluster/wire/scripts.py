"""The protocol's steps that must not be torn apart, as Lua that the broker runs.

A message is always in exactly one place: a queue, one node's hash of
unacknowledged messages, or the list of those given up. Each script moves it
whole, and each that acts for a node asks the fence first, so that a node that
was declared dead changes nothing any more.

An entry in a node's hash is ``cmsgpack{queue list, wake list}``. The message itself lies beside
it, in a list of one that is named after the hash and the number: moved from list to list it is
neither copied through Lua nor written to the append-only file once more.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Sequence
from typing import Any, cast

from redis import Redis
from redis.commands.core import Script
from redis.exceptions import NoScriptError, ResponseError

from cluster.settings import LARGE_REFUSED_FROM, MAX_DELIVERIES, SENDERS_REFUSED_FROM
from cluster.wire import keys

#: The first word of the error by which a script refuses a fenced node.
FENCED_ERROR = "FENCED"
FENCED_REPLY = f"{FENCED_ERROR} this node was declared dead"
#: The first word of the error by which REGISTER refuses a name in use.
TAKEN_ERROR = "TAKEN"

#: Bytes from which on a value isn't passed through a script. Publishing 64 kB took the server as
#: long either way, and the client longer by its second round trip; 128 kB took half the server's
#: time by a transaction, and less of both together.
LARGE = 128 * 2**10

_FENCE = f"""
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then
  return redis.error_reply('{FENCED_REPLY}')
end
"""

#: Bytes of a message or result from which on it is itself compared with the room there is.
SIZEABLE = 16 * 2**10

# no_room(bytes, part): whether so much more is beyond that part of the memory, in words.
_NO_ROOM = f"""
local function no_room(bytes, part)
  if bytes < {SIZEABLE} then return false end
  local memory = redis.call('INFO', 'memory')
  local used = tonumber(string.match(memory, 'used_memory:(%d+)'))
  local most = tonumber(string.match(memory, 'maxmemory:(%d+)'))
  return most > 0 and used + bytes > part * most and used .. ' of ' .. most .. ' bytes are used'
end
"""

# give_back(hash, number, returns key, given-up key, most deliveries, node, 'front' or 'back',
# how it died or '' if nobody did, started, later). A task with an ETA, or one that the node says it
# holds for later, has killed nobody unless it had started.
_GIVE_BACK = """
local function waiting(raw)
  local fine, message = pcall(cjson.decode, raw)
  local headers = fine and type(message) == 'table' and message.headers
  return type(headers) == 'table' and type(headers.eta) == 'string'
end
local function give_back(hash, number, returns, given_up, most, node, where, how, started, later)
  local e = cmsgpack.unpack(redis.call('HGET', hash, number))
  local held = hash .. ':' .. number
  redis.call('HDEL', hash, number)
  local raw = how ~= '' and redis.call('LINDEX', held, 0)
  if raw and (started or not (later or waiting(raw))) then
    local digest = redis.sha1hex(raw)
    local before = redis.call('HGET', returns, digest)
    local deaths = before and cjson.decode(before) or {}
    deaths[#deaths + 1] = {node, how}
    if #deaths >= most then
      redis.call('HDEL', returns, digest)
      redis.call('DEL', held)
      redis.call('LPUSH', given_up, cjson.encode({message = raw, deaths = deaths}))
      return
    end
    redis.call('HSET', returns, digest, cjson.encode(deaths))
  end
  redis.call('LMOVE', held, e[1], 'LEFT', where == 'front' and 'RIGHT' or 'LEFT')
  redis.call('LPUSH', e[2], '1')
end
"""

# The numbers in a node's hash, the last hand-out first: given back to the front
# of their queues in this order, the oldest is next again.
_NUMBERS = """
local function numbers_of(hash)
  local numbers = redis.call('HKEYS', hash)
  table.sort(numbers, function(a, b) return tonumber(a) > tonumber(b) end)
  return numbers
end
"""

#: Hand out the next message. KEYS: fence, the node's hash, counter, returns,
#: then the lists by priority and queue, then each queue's wake list.
#: ARGV: node, how many lists, how many queues.
#: Returns {list, number, times it came back, message}; where there is none, how
#: many the node holds, so that it can tell whether a reply was lost. The tokens
#: are cleared then, so that who blocks on them next is woken by a message
#: published from now on and by no older one.
#: (To make the counter last changes nothing; but see ANNOUNCE: a full broker must hand out.)
TAKE = (
    _FENCE
    + """
local lists, queues = tonumber(ARGV[2]), tonumber(ARGV[3])
for i = 0, lists - 1 do
  if redis.call('EXISTS', KEYS[5 + i]) == 1 then
    redis.call('PERSIST', KEYS[3])
    local number = redis.call('INCR', KEYS[3])
    local wake = KEYS[5 + lists + i % queues]
    local raw = redis.call('LMOVE', KEYS[5 + i], KEYS[2] .. ':' .. number, 'RIGHT', 'LEFT')
    redis.call('HSET', KEYS[2], number, cmsgpack.pack({KEYS[5 + i], wake}))
    local returned = 0
    if redis.call('EXISTS', KEYS[4]) == 1 then
      local deaths = redis.call('HGET', KEYS[4], redis.sha1hex(raw))
      returned = deaths and #cjson.decode(deaths) or 0
    end
    return {KEYS[5 + i], number, returned, raw}
  end
end
for i = 0, queues - 1 do redis.call('DEL', KEYS[5 + lists + i]) end
return redis.call('HLEN', KEYS[2])
"""
)

#: Acknowledge. KEYS: fence, the node's hash, returns, started, done, waiting. ARGV: node, number.
ACK = (
    _FENCE
    + """
local held = KEYS[2] .. ':' .. ARGV[2]
if redis.call('EXISTS', KEYS[3]) == 1 then
  local raw = redis.call('LINDEX', held, 0)
  if raw then redis.call('HDEL', KEYS[3], redis.sha1hex(raw)) end
end
redis.call('DEL', held)
redis.call('SREM', KEYS[4], ARGV[2])
redis.call('SREM', KEYS[6], ARGV[2])
local found = redis.call('HDEL', KEYS[2], ARGV[2])
if found == 1 then redis.call('HINCRBY', KEYS[5], ARGV[1], 1) end
return found
"""
)

#: Put back at the end of its queue. KEYS: fence, the node's hash, returns, given up, started,
#: waiting.
#: ARGV: node, number, most deliveries, how a process died of it or ''.
REJECT = (
    _FENCE
    + _GIVE_BACK
    + """
if redis.call('HEXISTS', KEYS[2], ARGV[2]) == 0 then return 0 end
redis.call('SREM', KEYS[5], ARGV[2])
redis.call('SREM', KEYS[6], ARGV[2])
give_back(KEYS[2], ARGV[2], KEYS[3], KEYS[4], tonumber(ARGV[3]), ARGV[1], 'back', ARGV[4], true)
return 1
"""
)

#: Give back what the broker handed out and the node never got (the reply was
#: lost with the connection). KEYS as REJECT, but for the sets. ARGV: node, the lost numbers, the
#: last first. Lost once is lost for ever, so this may come late, and again.
RECONCILE = (
    _FENCE
    + _GIVE_BACK
    + """
local lost = 0
for i = 2, #ARGV do
  if redis.call('HEXISTS', KEYS[2], ARGV[i]) == 1 then
    give_back(KEYS[2], ARGV[i], KEYS[3], KEYS[4], 0, ARGV[1], 'front', '', false)
    lost = lost + 1
  end
end
return lost
"""
)

#: A task that was held for later runs now, or begins to be held: the set says which. KEYS: fence,
#: the node's hash, started or waiting. ARGV: node, number.
MARK = (
    _FENCE
    + """
if redis.call('HEXISTS', KEYS[2], ARGV[2]) == 0 then return 0 end
return redis.call('SADD', KEYS[3], ARGV[2])
"""
)

#: Fence a node and give back all it holds, oldest to the front of its queue.
#: KEYS: fence, the node's hash, returns, given up, workers, started, waiting.
#: ARGV: node, most deliveries, why, '1' if the node died with the messages, the node's channel.
#: Who is only taken for dead hears of it there, should it still hear anything.
#: Returns how many messages it held, or -1 if it was fenced before.
RELEASE = (
    _GIVE_BACK
    + _NUMBERS
    + """
redis.call('HDEL', KEYS[5], ARGV[1])
if redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[3]) == 0 then return -1 end
local numbers = numbers_of(KEYS[2])
for _, number in ipairs(numbers) do
  give_back(KEYS[2], number, KEYS[3], KEYS[4],
            tonumber(ARGV[2]), ARGV[1], 'front', ARGV[4] == '1' and ARGV[3] or '',
            redis.call('SISMEMBER', KEYS[6], number) == 1,
            redis.call('SISMEMBER', KEYS[7], number) == 1)
end
redis.call('DEL', KEYS[2], KEYS[6], KEYS[7])
if ARGV[4] == '1' then redis.call('PUBLISH', ARGV[5], 'fenced') end
return #numbers
"""
)

#: Take part. KEYS: fence, workers. ARGV: node, registration.
REGISTER = (
    _FENCE
    + """
if redis.call('HSETNX', KEYS[2], ARGV[1], ARGV[2]) == 0
    and redis.call('HGET', KEYS[2], ARGV[1]) ~= ARGV[2] then
  return redis.error_reply('TAKEN a worker of this name takes part already')
end
return 1
"""
)

# why_not(bytes): what PUT returns if it does nothing, else nil.
_WHY_NOT_PUT = (
    _NO_ROOM
    + f"""
local function why_not(bytes)
  local last = redis.call('GET', KEYS[1])
  if last and tonumber(last) >= tonumber(ARGV[1]) then return 0 end
  local full = ARGV[3] == '1'
    and (redis.call('GET', KEYS[2]) or no_room(bytes, {SENDERS_REFUSED_FROM}))
  return full and redis.error_reply('FULL ' .. full) or nil
end
"""
)

#: Publish a message, and a token for one who waits for it. KEYS: the publisher's last number,
#: full, the list, its wake list, and the queue's other lists, if it expires. ARGV: number,
#: message, '1' from outside of a worker, milliseconds until the queue expires or 0, seconds to
#: remember the number. A publisher numbers its messages and sends one after the other; what it
#: sends again since no answer came is published once. Returns 1, or 0 if it was there.
PUT = (
    _WHY_NOT_PUT
    + """
local no = why_not(#ARGV[2])
if no then return no end
redis.call('LPUSH', KEYS[3], ARGV[2])
redis.call('LPUSH', KEYS[4], '1')
redis.call('SETEX', KEYS[1], ARGV[5], ARGV[1])
local expires = tonumber(ARGV[4])
if expires > 0 then
  for i = 3, #KEYS do redis.call('PEXPIRE', KEYS[i], expires) end
end
return 1
"""
)

#: Whether PUT would, for what is too large for a script. KEYS: the first two of PUT's. ARGV: as
#: PUT's, with the number of bytes in place of the message. Returns as PUT does.
MAY_PUT = _WHY_NOT_PUT + "return why_not(tonumber(ARGV[2])) or 1"

#: Announce a worker to the manager. KEYS: joined. ARGV: registration. Cutting the list changes
#: nothing, but what follows a write isn't refused for want of memory, and this must not be:
#: https://redis.io/docs/latest/develop/programmability/lua-api/ (allow-oom)
ANNOUNCE = """
redis.call('LTRIM', KEYS[1], 0, -1)
return redis.call('LPUSH', KEYS[1], ARGV[1])
"""

#: Keep that tasks were revoked, as many and for as long as Celery does (celery/worker/state.py).
#: KEYS: revoked. ARGV: now, in seconds; ids.
KEEP_REVOKED = """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[1] - 10800)
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -50001)
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], ARGV[1], ARGV[i]) end
return #ARGV - 1
"""

#: Say which results are waited for. KEYS: awaited. ARGV: the results' keys.
AWAIT = """
redis.call('SREM', KEYS[1], '')
for i = 1, #ARGV do redis.call('SADD', KEYS[1], ARGV[i]) end
return #ARGV
"""

#: Say that the broker is full, in the server's words for it, and however full that is.
#: KEYS: full. ARGV: the words.
SAY_FULL = """
redis.call('DEL', KEYS[1])
return redis.call('SET', KEYS[1], ARGV[1])
"""

#: Tell all workers that it is over. KEYS: over. ARGV: grace, channel, message.
SAY_OVER = """
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1])
return redis.call('PUBLISH', ARGV[2], ARGV[3])
"""

#: Note results as delivered, so that they can be freed when room is needed. KEYS: delivered.
#: ARGV: the results' keys. What doesn't fit stays until it expires.
DELIVER = """
redis.call('LTRIM', KEYS[1], 0, 999999)
for i = 1, #ARGV do redis.call('LPUSH', KEYS[1], ARGV[i]) end
return #ARGV
"""

#: Free results that were delivered, the first ones first. KEYS: delivered. ARGV: how many; what
#: stands for a while in the place of one that was large, and for how many seconds.
#: Returns how many there were to free.
FREE = """
for i = 1, tonumber(ARGV[1]) do
  local key = redis.call('RPOP', KEYS[1])
  if not key then return i - 1 end
  local size = redis.call('STRLEN', key)
  redis.call('DEL', key)
  if size > 1024 then redis.call('SETEX', key, ARGV[3], ARGV[2]) end
end
return tonumber(ARGV[1])
"""

# why_not(bytes): what STORE returns if it does nothing, else nil.
_WHY_NOT_STORE = (
    _NO_ROOM
    + f"""
local function why_not(bytes)
  if (redis.call('GET', KEYS[2]) or '') ~= ARGV[4] then return 0 end
  local full = redis.call('GET', KEYS[3])
  local word = full and string.match(full, '^%a+')
  local near = ARGV[5] == '0' and no_room(bytes, {LARGE_REFUSED_FROM})
  if near and not word then word, full = 'large', near end
  if (word == 'large' and ARGV[5] == '0' or word == 'all' and ARGV[5] ~= '2')
    and redis.call('SISMEMBER', KEYS[4], KEYS[2]) == 0 then
    return redis.error_reply('FULL ' .. full)
  end
end
"""
)

#: Store a result and tell who waits. KEYS: fence, result, full, awaited. ARGV: node, or '' outside
#: of a worker; value; expiry in s or 0; what is there, or '': if it is something else by now,
#: nothing is stored; '0' for a large one, '1' for a small one, '2' for a small failure. As the
#: broker fills up, large ones are refused and then all but failures, save for those that are
#: waited for. What follows a write, if only a DEL, isn't refused by the server. Returns whether it
#: was stored.
STORE = (
    _FENCE
    + _WHY_NOT_STORE
    + """
local no = why_not(#ARGV[2])
if no then return no end
if ARGV[5] == '2' then redis.call('DEL', KEYS[2]) end
if tonumber(ARGV[3]) > 0 then
  redis.call('SETEX', KEYS[2], ARGV[3], ARGV[2])
else
  redis.call('SET', KEYS[2], ARGV[2])
end
redis.call('SREM', KEYS[4], KEYS[2])
redis.call('PUBLISH', KEYS[2], ARGV[2])
return 1
"""
)

#: Whether STORE would, for what is too large for a script. KEYS and ARGV: as STORE's, with the
#: number of bytes in place of the value. Returns as STORE does.
MAY_STORE = _FENCE + _WHY_NOT_STORE + "return why_not(tonumber(ARGV[2])) or 1"

#: The first word of the error by which PUT and STORE refuse for want of room; and the first words
#: of the key that say that results are refused, too.
FULL_ERROR = "FULL"
RESULTS_REFUSED = ("large", "all")

#: What stands where a large delivered result was that has been freed, and for how many seconds.
FREED = b"cluster:freed"
FREED_FOR = 600


def run(client: Any, script: str, *arguments: Any) -> Any:
    """Run a script over this very connection, also while a pipeline watches: redis-py's
    :class:`Script` would then ask once more whether the script is known.

    Args:
        client: or a pipeline that watches.
        script: one of this module's.
        arguments: how many keys, the keys, the rest.
    """
    try:
        return client.evalsha(_digest(script), *arguments)
    except NoScriptError:
        return client.eval(script, *arguments)


@functools.cache
def _digest(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


def is_fenced(error: ResponseError) -> bool:
    """Whether a script refused because the node is fenced."""
    return str(error).startswith(FENCED_ERROR)


def is_taken(error: ResponseError) -> bool:
    """Whether REGISTER refused because the name is in use."""
    return str(error).startswith(TAKEN_ERROR)


def take_arguments(node: str, queues: Sequence[str], lists: Sequence[str]) -> list[Any]:
    """The keys and arguments of TAKE, as EVALSHA wants them.

    Args:
        node: who takes.
        queues: the queues' names.
        lists: their lists, by priority and then in the order of ``queues``.
    """
    names = [
        keys.FENCED,
        keys.unacked(node),
        keys.HANDOUTS,
        keys.RETURNS,
        *lists,
        *(keys.wake(queue) for queue in queues),
    ]
    return [len(names), *names, node, len(lists), len(queues)]


class Scripts:
    """The scripts, bound to one client; a missing one is loaded by redis-py itself.

    Args:
        client: of the broker.
        max_deliveries: how often a message may come back from the dead.
    """

    def __init__(self, client: Redis, max_deliveries: int = MAX_DELIVERIES) -> None:
        self.client = client
        self._most = max_deliveries
        self.take_script: Script = client.register_script(TAKE)
        self._ack: Script = client.register_script(ACK)
        self._reject: Script = client.register_script(REJECT)
        self._mark: Script = client.register_script(MARK)
        self._reconcile: Script = client.register_script(RECONCILE)
        self._release: Script = client.register_script(RELEASE)
        self._register: Script = client.register_script(REGISTER)
        self._free: Script = client.register_script(FREE)

    def take(self, node: str, queues: Sequence[str], lists: Sequence[str]) -> list[Any] | int:
        """Hand out a message: ``[list, number, returned, raw]``, or how many ``node`` holds."""
        count, *rest = take_arguments(node, queues, lists)
        reply: list[Any] | int = self.take_script(keys=rest[:count], args=rest[count:])
        return reply

    def ack(self, node: str, number: int) -> None:
        self._ack(
            keys=[
                keys.FENCED,
                keys.unacked(node),
                keys.RETURNS,
                keys.started(node),
                keys.DONE,
                keys.waiting(node),
            ],
            args=[node, number],
        )

    def wait(self, node: str, number: int) -> None:
        """This one is only held. For most, being taken is being started."""
        self._mark(keys=[keys.FENCED, keys.unacked(node), keys.waiting(node)], args=[node, number])

    def start(self, node: str, number: int) -> None:
        """One that was held, or has an ETA, runs now."""
        self._mark(keys=[keys.FENCED, keys.unacked(node), keys.started(node)], args=[node, number])

    def held(self, node: str) -> set[int]:
        """The numbers of the messages that ``node`` holds, as the broker has it."""
        return {
            int(number) for number in cast("list[bytes]", self.client.hkeys(keys.unacked(node)))
        }

    def reject(self, node: str, number: int, *, died: str) -> None:
        """Put a message back. If its task took a process with it, which counts, ``died`` says
        how; else it is empty."""
        self._reject(
            keys=[
                keys.FENCED,
                keys.unacked(node),
                keys.RETURNS,
                keys.GIVEN_UP,
                keys.started(node),
                keys.waiting(node),
            ],
            args=[node, number, self._most, died],
        )

    def reconcile(self, node: str, lost: Collection[int]) -> int:
        """Give back what ``node`` was handed and never got, the oldest to the front of its queue;
        returns how many there were."""
        found: int = self._reconcile(
            keys=[keys.FENCED, keys.unacked(node), keys.RETURNS, keys.GIVEN_UP],
            args=[node, *sorted(lost, reverse=True)],
        )
        return found

    def release(self, node: str, why: str, *, died: bool) -> int:
        """Fence ``node`` and give back what it holds. ``died``: that counts against what it ran.

        Returns how many messages it held, or -1 if it had been fenced before.
        """
        held: int = self._release(
            keys=[
                keys.FENCED,
                keys.unacked(node),
                keys.RETURNS,
                keys.GIVEN_UP,
                keys.WORKERS,
                keys.started(node),
                keys.waiting(node),
            ],
            args=[node, self._most, why, int(died), keys.presence(node)],
        )
        return held

    def register(self, node: str, registration: str) -> None:
        """Take part. From now on the guardian misses the node when it is gone."""
        self._register(keys=[keys.FENCED, keys.WORKERS], args=[node, registration])

    def announce(self, registration: str) -> None:
        """Tell the manager that this worker is ready to answer."""
        self.client.eval(ANNOUNCE, 1, keys.JOINED, registration)

    def free(self, count: int) -> int:
        """Free up to ``count`` results that were delivered; returns how many there were."""
        freed: int = self._free(keys=[keys.DELIVERED], args=[count, FREED, FREED_FOR])
        return freed
