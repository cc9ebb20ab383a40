"""Which server is taken, and with which configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

import cluster
from cluster.broker import server
from cluster.model import Endpoint
from cluster.wire.secret import password

SECRET = "00" * 32

REDIS_7 = "Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64 build=1"
VALKEY_8 = "Valkey server v=8.1.1 sha=00000000:1 malloc=libc bits=64 build=2"
OLD = "Redis server v=6.0.16 sha=00000000:0 malloc=jemalloc-5.2.1 bits=64 build=3"


@pytest.mark.parametrize(
    ("output", "version"),
    [(REDIS_7, (7, 0, 15)), (VALKEY_8, (8, 1, 1)), ("v=7", (7,)), ("redis 7.0", None), ("", None)],
)
def test_reading_a_version(output, version):
    assert server.read_version(output) == version


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts programs that print a version on an otherwise empty PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def put(name: str, output: str) -> str:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho '{output}'\n")
        path.chmod(0o755)
        return str(path)

    return put


def test_a_fit_server_on_the_path_is_preferred(programs):
    programs("valkey-server", VALKEY_8)
    path = programs("redis-server", REDIS_7)
    assert server.find_server() == server.Server(path, "7.0.15")


def test_one_that_is_too_old_is_passed_over(programs):
    programs("redis-server", OLD)
    path = programs("valkey-server", VALKEY_8)
    assert server.find_server().path == path


def test_the_bundled_one_is_taken_where_the_path_has_none(programs):
    programs("redis-server", OLD)
    found = server.find_server()
    assert found.path == server.bundled_server()
    assert tuple(map(int, found.version.split("."))) >= server.MINIMUM_VERSION


def test_an_explicit_one_is_taken_or_refused(programs):
    path = programs("my-server", VALKEY_8)
    assert server.find_server(path).path == path
    with pytest.raises(cluster.ConfigurationError, match=r"version 6\.0\.16, and 6\.2 is needed"):
        server.find_server(programs("old-server", OLD))
    with pytest.raises(cluster.ConfigurationError, match="doesn't run"):
        server.find_server("/no/such/server")
    with pytest.raises(cluster.ConfigurationError, match="no version"):
        server.find_server(programs("liar", "hello"))


def test_one_that_speaks_no_tls_is_passed_over_where_that_is_needed(programs):
    redis, valkey = programs("redis-server", REDIS_7), programs("valkey-server", VALKEY_8)
    found = server.find_server(tls=True, ask_tls=lambda path: path == valkey)
    assert found.path == valkey
    with pytest.raises(cluster.ConfigurationError, match="it speaks no TLS"):
        server.find_server(redis, tls=True, ask_tls=lambda _: False)
    with pytest.raises(cluster.BrokerStartError, match="must speak TLS, and there is no Redis"):
        server.find_server(tls=True, ask_tls=lambda _: False)


def test_the_bundled_server_is_known_to_speak_no_tls():
    path = server.bundled_server()
    assert path is not None
    assert not server.speaks_tls(path)


def test_beyond_loopback_it_speaks_tls_and_nothing_else():
    endpoint = Endpoint("10.1.2.3", 7000, SECRET)
    settings = server.configuration(endpoint=endpoint, directory="/run/x", memory=1, workers=1)
    assert (settings["port"], settings["tls-port"]) == ("0", "7000")
    assert settings["bind"] == "10.1.2.3"


def test_without_any_the_error_says_what_to_do(programs, monkeypatch):
    programs("redis-server", OLD)
    monkeypatch.setattr(server, "bundled_server", lambda: None)
    with pytest.raises(cluster.BrokerStartError, match=r"6\.0\.16.*Install redis-server 6\.2"):
        server.find_server()


def test_the_configuration_keeps_to_one_address_and_loses_no_task():
    settings = server.configuration(
        endpoint=Endpoint("127.0.0.1", 7000, SECRET),
        directory="/run/x",
        memory=2**30,
        workers=100,
    )
    assert settings["bind"] == "127.0.0.1"
    assert settings["requirepass"] == password(SECRET)
    assert settings["port"] == "7000"
    assert not any(name.startswith("tls") for name in settings)
    assert settings["maxmemory-policy"] == "noeviction"
    assert (settings["appendonly"], settings["appendfsync"]) == ("yes", "no")
    assert int(settings["maxclients"]) >= 10_000
    text = server.write_configuration({**settings, "dir": '/a "b" \\c'})
    assert 'port "7000"\n' in text and 'save ""\n' in text
    assert r'dir "/a \"b\" \\c"' in text
