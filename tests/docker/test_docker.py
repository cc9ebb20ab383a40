"""Workers in containers: the whole way, from a process on the host and from a container."""

from __future__ import annotations

import gc
import io
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import images
import pytest
from sampleapp import add, app, kill_own_process, where
from tools import wait_until

import cluster
from cluster.launchers.belongings import CLUSTER, WORKER
from cluster.wire.exitcodes import ExitCode

pytestmark = [pytest.mark.docker, pytest.mark.timeout(180)]

#: Seconds for a result.
SOON = 60


@pytest.fixture
def engine(nothing_left) -> Iterator[docker.DockerClient]:
    with images.engine_or_skip() as client:
        yield client


@pytest.fixture(autouse=True)
def capable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the others are to use: the bundled server speaks no TLS."""
    monkeypatch.delenv("CLUSTER_BROKER_SERVER", raising=False)


def start(image: str, workers: int = 2, **options: Any) -> cluster.Cluster:
    arguments = {"app": app, "launcher": "docker", "progress": False, "image": image, **options}
    return cluster.start(workers, **arguments)


def listed(client: docker.DockerClient, cluster_id: str, *, everything: bool = False) -> list[Any]:
    """A cluster's containers that run, or all."""
    filters = {"label": f"{CLUSTER}={cluster_id}"}
    return client.containers.list(all=everything, filters=filters, ignore_removed=True)


def containers(client: docker.DockerClient, c: cluster.Cluster) -> dict[str, Any]:
    """Its workers' containers, by the workers' ids."""
    return {one.labels[WORKER]: one for one in listed(client, c._id)}


def of(c: cluster.Cluster, node: str) -> str:
    [worker] = [view.id for view in c.status().workers if view.node == node]
    return worker


def left(client: docker.DockerClient, c: cluster.Cluster) -> list[str]:
    return [name for name in images.left(client) if c._id in name]


def test_workers_are_containers_with_addresses_of_their_own(engine, image: str):
    with start(image, environment={"GREETING": "hello"}, memory="256MiB", cpus=1) as c:
        assert len(c.workers) == 2
        assert add.delay(1, 2).get(timeout=SOON) == 3
        nodes = {where.delay().get(timeout=SOON)[0] for _ in range(20)}
        assert nodes <= set(c.workers)
        found = containers(engine, c)
        assert set(found) == {view.id for view in c.status().workers}
        addresses = set()
        for one in found.values():
            one.reload()
            settings, host = one.attrs["NetworkSettings"], one.attrs["HostConfig"]
            addresses |= {network["IPAddress"] for network in settings["Networks"].values()}
            assert (host["Memory"], host["NanoCpus"]) == (256 * 2**20, 10**9)
            assert "GREETING=hello" in one.attrs["Config"]["Env"]
            assert one.name.startswith(f"cluster-{c._id}-")
        assert len(addresses) == 2
        assert c._broker.endpoint.tls
        assert c._broker.endpoint.host not in addresses
    assert left(engine, c) == []


def test_the_secret_is_in_one_variable_and_nowhere_else(engine, image: str):
    with start(image, 1) as c:
        [one] = containers(engine, c).values()
        one.reload()
        environment = one.attrs["Config"].pop("Env")
        secret = c._broker.endpoint.secret
        assert [text.partition("=")[0] for text in environment if secret in text] == [
            "CLUSTER_SECRET"
        ]
        assert secret not in str(one.attrs)
        assert secret not in str(c.logs()) + repr(c) + str(c.status())


def test_a_killed_container_gives_its_task_to_another_and_is_replaced(engine, image: str):
    with start(image) as c:
        before = set(c.workers)
        node, _, _ = where.delay().get(timeout=SOON)
        containers(engine, c)[of(c, node)].kill()
        wait_until(lambda: len(set(c.workers) - before) == 1, "it is replaced", SOON)
        reasons = [view.status.reason for view in c.status().workers if view.node == node]
        wait_until(lambda: "SIGKILL" in str(c.status()), f"it is told how it ended: {reasons}")
        assert add.delay(1, 2).get(timeout=SOON) == 3
    assert left(engine, c) == []


@pytest.mark.parametrize("how", ["paused", "disconnected"])
def test_who_gives_no_sign_of_life_is_replaced(engine, image: str, how: str, monkeypatch):
    """A container that is paused, and one whose network is taken away without a word."""
    monkeypatch.setenv("CLUSTER_LIVENESS_TIMEOUT", "2")
    with start(image) as c:
        before = set(c.workers)
        victim = containers(engine, c)[of(c, min(before))]
        if how == "paused":
            victim.pause()
        else:
            [network] = engine.networks.list(filters={"label": f"{CLUSTER}={c._id}"})
            network.disconnect(victim)
        wait_until(lambda: len(set(c.workers) - before) == 1, "it is replaced", SOON)
        assert [add.delay(i, 1).get(timeout=SOON) for i in range(10)] == list(range(1, 11))
    assert left(engine, c) == []


def test_a_volume_is_there_and_what_is_printed_is_shown(
    engine, image: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    from bigapp import app as bigapp
    from bigapp import read

    tmp_path.chmod(0o755)
    (tmp_path / "words").write_text("hello")
    volumes = {str(tmp_path): "/data:ro"}
    with start(image, 1, app=bigapp, volumes=volumes) as c:
        assert read.delay("/data/words").get(timeout=SOON) == "hello"
        wait_until(lambda: "reading /data/words" in str(c.logs()), "it is in the logs")
    assert " | reading /data/words" in capfd.readouterr().err


def test_who_asks_for_too_much_memory_is_told_so(engine, image: str):
    """The limit is the container's; the worker's child dies of it, or all of it does."""
    from bigapp import app as bigapp
    from bigapp import swallow

    with start(image, 1, app=bigapp, memory="160MiB"), pytest.raises(cluster.WorkerLost) as caught:
        swallow.delay(400).get(timeout=SOON)
    assert "SIGKILL" in str(caught.value) or "memory" in str(caught.value)
    assert len(caught.value.deaths) == 3


def test_a_task_that_kills_its_process_is_given_up(engine, image: str):
    with start(image, 1), pytest.raises(cluster.WorkerLost) as caught:
        kill_own_process.delay("/tmp/log").get(timeout=SOON)
    assert len(caught.value.deaths) == 3


def test_a_start_that_fails_says_why_and_leaves_nothing(engine, image: str):
    """Its app isn't in the image."""
    base = images.BASE
    with pytest.raises(cluster.WorkersNotReady, match="No module named 'sampleapp'") as caught:
        start(base, 2)
    codes = {status.exit_code for status in caught.value.statuses.values()}
    assert codes == {ExitCode.IMPORT_FAILED}
    assert images.left(engine) == []


def test_an_image_without_the_package_is_refused_with_what_to_do(engine, image: str):
    bare = images.built(
        engine, f"{images.TAG}-bare", "USER root", "RUN rm -rf /opt/cluster", base=images.BASE
    )
    with pytest.raises(cluster.WorkersNotReady, match=r"1 failed: its image has no program"):
        start(bare, 1)
    assert images.left(engine) == []


def test_an_image_with_another_celery_is_shown_in_a_table(engine, image: str):
    """Another Celery by its number; the worker sees it as it compares itself, and ends."""
    script = "import celery, pathlib; p = pathlib.Path(celery.__file__); "
    script += 'p.write_text(p.read_text().replace(\\"\'5.\\", \\"\'4.\\"))'
    other = images.built(
        engine, f"{images.TAG}-other", "USER root", f'RUN python3 -c "{script}"', "USER worker"
    )
    with pytest.raises(cluster.VersionMismatch, match=r"Celery +5\.\S+ +4\."):
        start(other, 1)
    assert images.left(engine) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "no-such-image"}, "no image no-such-image. Build or pull it first"),
        ({"network": "no-such-network"}, "no network 'no-such-network'"),
    ],
)
def test_what_the_engine_lacks_is_said_before_anything_starts(engine, image, options, message):
    with pytest.raises(cluster.ConfigurationError, match=message):
        start(**{"image": image, **options})


def test_without_an_image_there_must_be_one_to_run_in(engine):
    with pytest.raises(cluster.ConfigurationError, match=r"Say which image.*image="):
        cluster.start(1, app=app, launcher="docker")


@pytest.mark.filterwarnings("ignore:Exception ignored in.*socket")
def test_without_an_engine_it_is_said_what_to_do(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    with pytest.raises(cluster.ConfigurationError, match="No Docker engine answers.*DOCKER_HOST"):
        cluster.start(1, app=app, launcher="docker", image="x")
    gc.collect()  # Docker's package closes no socket that found nobody


def test_a_container_that_is_removed_behind_our_back_is_replaced(engine, image: str):
    with start(image) as c:
        before = set(c.workers)
        [first, _] = containers(engine, c).values()
        first.remove(force=True)
        wait_until(lambda: len(set(c.workers) - before) == 1, "it is replaced", SOON)
    assert left(engine, c) == []


def test_on_the_hosts_network_nothing_is_made_but_containers(engine, image: str):
    with start(image, 2, network="host") as c:
        assert not c._broker.endpoint.tls
        assert len({where.delay().get(timeout=SOON)[0] for _ in range(20)}) >= 1
        assert len(set(c.workers)) == 2, "though they share one host name"
    assert left(engine, c) == []


MANAGER = """
    import cluster
    from sampleapp import add, app

    if __name__ == "__main__":
        with cluster.start(2, app=app, launcher="docker", progress=False, output=False) as c:
            print("id", c._id, flush=True)
            print("sum", sum(r.get(timeout=60) for r in [add.delay(i, i) for i in range(10)]))
            print("host", c._broker.endpoint.host, flush=True)
            {then}
"""


@pytest.fixture
def manager(engine, image: str, tmp_path: Path) -> Iterator[Any]:
    """Runs a script in a container of that image, with the engine's socket."""
    made = []

    def run(then: str, **options: Any) -> Any:
        text = textwrap.dedent(MANAGER).format(then=then).encode()
        container = engine.containers.create(
            image,
            ["python3", "/app/manager.py"],
            user="root",
            volumes=["/var/run/docker.sock:/var/run/docker.sock"],
            detach=True,
            **options,
        )
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            info = tarfile.TarInfo("manager.py")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
        container.put_archive("/app", archive.getvalue())
        made.append(container)
        container.start()
        return container

    yield run
    for container in made:
        container.remove(force=True)


def said(container: Any, word: str) -> str:
    """What the manager has printed after this word."""
    wait_until(lambda: f"{word} " in container.logs().decode(), f"it says {word}", SOON)
    for line in container.logs().decode().splitlines():
        if line.startswith(f"{word} "):
            return line.partition(" ")[2]
    pytest.fail(container.logs().decode())


def test_a_manager_in_a_container_runs_workers_of_its_own_image(engine, manager):
    """It finds out which that is, and joins the workers' network."""
    container = manager("")
    assert said(container, "sum") == "90"
    assert container.wait(timeout=SOON)["StatusCode"] == 0, container.logs().decode()
    assert said(container, "id") not in str(images.left(engine))


def test_a_manager_in_a_container_with_the_hosts_network_is_as_one_on_the_host(engine, manager):
    container = manager("", network_mode="host")
    assert said(container, "sum") == "90"
    assert container.wait(timeout=SOON)["StatusCode"] == 0, container.logs().decode()


def test_workers_of_a_manager_whose_container_is_killed_end_and_are_removed(
    engine, manager, image: str
):
    container = manager("input()", stdin_open=True, environment={"CLUSTER_ORPHAN_TIMEOUT": "2"})
    id_ = said(container, "id")
    said(container, "host")
    labelled = {"label": f"{CLUSTER}={id_}"}
    assert len(listed(engine, id_)) == 2
    container.kill()
    wait_until(lambda: not listed(engine, id_), "they end themselves", SOON)
    assert len(listed(engine, id_, everything=True)) == 2
    with start(image, 0):
        assert not listed(engine, id_, everything=True), "the next start removes them"
        assert not engine.networks.list(filters=labelled)


def test_a_manager_that_is_killed_on_the_host_leaves_nothing_that_runs(
    engine, image: str, tmp_path: Path
):
    script = tmp_path / "manager.py"
    script.write_text(
        textwrap.dedent(MANAGER)
        .format(then="input()")
        .replace('launcher="docker"', f'launcher="docker", image="{image}"')
    )
    here = Path(__file__).parent.parent
    with subprocess.Popen(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(here)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        id_ = process.stdout.readline().split()[1]
        assert process.stdout.readline() == "sum 90\n"
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: not listed(engine, id_), "they end", SOON)
    with start(image, 0):
        assert not listed(engine, id_, everything=True)
    assert id_ not in str(images.left(engine))


SCRIPT = """
    import cluster
    from celery import Celery

    app = Celery("demo")


    @app.task
    def square(x):
        return x * x


    if __name__ == "__main__":
        with cluster.start(1, launcher="docker", image="IMAGE", progress=False):
            print(square.name, square.delay(7).get(timeout=60))
"""


def test_a_script_is_found_in_the_images_working_directory(engine, image: str, tmp_path: Path):
    """It lies elsewhere on the host; its tasks are named as there."""
    tag = f"{images.TAG}-script"
    script = tmp_path / "script_in_an_image.py"
    script.write_text(textwrap.dedent(SCRIPT).replace("IMAGE", tag))
    images.built(engine, tag, files={script.name: script.read_text()})
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=SOON, check=False
    )
    assert done.stdout == "demo.square 49\n", done.stderr


def test_a_script_that_is_nowhere_in_the_image_is_asked_for(engine, image: str, tmp_path: Path):
    script = tmp_path / "nowhere.py"
    script.write_text(textwrap.dedent(SCRIPT).replace("IMAGE", image))
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=SOON, check=False
    )
    assert "COPY nowhere.py ./" in done.stderr
    assert images.left(engine) == []


def test_the_example_runs_in_its_own_image(engine, image: str):
    """As the README has it: the same demo.py, and no line of it changed."""
    examples = Path(__file__).parents[2] / "examples"
    engine.images.build(path=str(examples), tag=f"{images.TAG}-example", rm=True)
    shown = engine.containers.run(
        f"{images.TAG}-example",
        ["python", "demo.py"],
        user="root",
        volumes=["/var/run/docker.sock:/var/run/docker.sock"],
        environment={"CLUSTER_LAUNCHER": "docker"},
        remove=True,
    )
    assert shown.decode() == "328350\n"
    assert images.left(engine) == []


def test_the_images_command_is_not_swallowed_and_signals_pass(engine, image: str):
    """What is given is run, as on Batch; SIGTERM reaches it, and it isn't root's."""
    command = ["python3", "-c", "import os; print(os.getpid() != 1, os.getuid())"]
    assert engine.containers.run(image, command, remove=True).decode().split() == ["True", "1000"]
    sleeper = engine.containers.run(image, ["sleep", "60"], detach=True)
    try:
        sleeper.stop(timeout=30)
        assert sleeper.wait()["StatusCode"] == 128 + signal.SIGTERM, "killed after the grace"
    finally:
        sleeper.remove(force=True)


def test_the_image_has_what_it_needs_and_no_more(engine, image: str):
    script = (
        "redis-server --version && cluster --version && python3 -c "
        "'from cluster.broker.server import find_server as f; print(f(tls=True).path)' && "
        "! command -v gcc && ! command -v flower && ! python3 -c 'import flower' 2>/dev/null"
    )
    shown = engine.containers.run(images.BASE, ["sh", "-c", script], remove=True).decode()
    assert "/usr/bin/redis-server" in shown
    attributes = engine.images.get(images.BASE).attrs
    assert attributes["Config"]["Labels"]["org.opencontainers.image.title"] == "celery-cluster"
