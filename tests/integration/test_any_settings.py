"""Whatever an app's configuration says: where its own servers are, queues, serializers, workers.

docs/apps.md is the table of these cases.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import cluster

Module = Callable[[str, str], str]

#: Seconds for a result. None of these tasks takes one.
SOON = 20

TASKS = """
from celery import Celery
app = Celery("t")
@app.task
def one(): return 1
"""


@pytest.fixture
def forced_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Celery asks of a root that accepts pickle."""
    monkeypatch.setenv("C_FORCE_ROOT", "1")


def run_one(module: Module, name: str, text: str) -> object:
    """Start a cluster for the app in this module and get the result of its task ``one``."""
    with cluster.start(1, app=f"{module(name, text)}:app", timeout=15):
        return sys.modules[name].one.delay().get(timeout=SOON)


ELSEWHERE = {
    "amqp": """
        broker_url = ["amqp://one//", "amqp://two//"]
        broker_failover_strategy = "shuffle"
        broker_transport_options = {
            "confirm_publish": True, "max_retries": 3, "interval_start": 0,
            "client_properties": {"product": "x"}, "login_method": "PLAIN", "read_timeout": 3,
        }
        broker_login_method = "EXTERNAL"
        broker_use_ssl = {"ca_certs": "/nowhere/ca.pem", "cert_reqs": 2}
        broker_user, broker_password, broker_vhost = "me", "secret", "/production"
        result_backend = "rpc://"
        result_persistent = True
        """,
    "redis": """
        broker_url = "rediss://:secret@elsewhere:1/3?ssl_cert_reqs=required"
        result_backend = "rediss://:secret@elsewhere:1/3?ssl_cert_reqs=required"
        broker_use_ssl = {"ssl_cert_reqs": 0, "ssl_ca_certs": "/nowhere/ca.pem"}
        redis_backend_use_ssl = {"ssl_cert_reqs": 0, "ssl_ca_certs": "/nowhere/ca.pem"}
        redis_host, redis_port, redis_db = "elsewhere", 1, 9
        redis_username, redis_password = "me", "secret"
        redis_backend_credential_provider = "nowhere.Provider"
        broker_transport_options = {
            "global_keyprefix": "mine:", "visibility_timeout": 1, "fanout_prefix": False,
            "sep": "::", "max_connections": 3, "socket_timeout": 0.001, "unacked_key": "x",
            "username": "me", "password": "secret",
        }
        result_backend_transport_options = {"global_keyprefix": "mine_"}
        """,
    "sentinel": """
        broker_url = "sentinel://one:26379;sentinel://two:26379"
        broker_transport_options = {"master_name": "m", "sentinel_kwargs": {"password": "x"}}
        result_backend = "sentinel://one:26379"
        result_backend_transport_options = {"master_name": "m"}
        """,
    "sqs": """
        broker_url = "sqs://"
        broker_transport_options = {
            "region": "eu-west-1", "polling_interval": 5, "queue_name_prefix": "abc-",
            "predefined_queues": {"celery": {"url": "https://nowhere"}},
        }
        broker_pool_limit = 0
        broker_heartbeat = 0
        broker_connection_retry_on_startup = False
        result_backend = "disabled"
        """,
    "old names": """
        BROKER_URL = "amqp://elsewhere//"
        BROKER_USE_SSL = True
        CELERY_RESULT_BACKEND = "db+sqlite:///x"
        CELERY_TASK_SERIALIZER = "json"
        """,
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_broker_that_is_set_elsewhere_is_left_alone(kind: str, module: Module):
    """All that says how to reach the app's own servers is set aside for the run, and is there
    again after it."""
    configuration = textwrap.indent(textwrap.dedent(ELSEWHERE[kind]), "    ")
    name = f"elsewhere_{kind.replace(' ', '_')}"
    source = module(
        name, f"{TASKS}class Settings:{configuration}\napp.config_from_object(Settings)"
    )
    __import__(source)
    before = dict(sys.modules[name].app.conf)
    with cluster.start(1, app=sys.modules[name].app, timeout=15):
        assert sys.modules[name].one.delay().get(timeout=SOON) == 1
    assert dict(sys.modules[name].app.conf) == before


def test_an_app_that_is_connected_already(module: Module):
    """To a broker in memory, with messages and results there: it finds them again afterwards."""
    name = module("connected", TASKS.replace(
        '"t"', '"t", broker="memory://", backend="cache+memory://"'))  # fmt: skip
    __import__(name)
    tasks = sys.modules[name]
    queued = tasks.one.delay()
    tasks.app.backend.store_result("mine", 7, "SUCCESS")
    with cluster.start(1, app=tasks.app, timeout=15):
        assert tasks.one.delay().get(timeout=SOON) == 1
    assert tasks.app.AsyncResult("mine").get(timeout=1) == 7
    with tasks.app.connection_for_read() as connection:
        message = connection.SimpleQueue("celery").get(timeout=1)
        message.ack()
        assert message.headers["id"] == queued.id
    tasks.app.close()


ROUTED = """
from celery import Celery
from kombu import Exchange, Queue
app = Celery("routed")
app.conf.update(
    task_default_queue="plain",
    task_default_exchange="work",
    task_default_exchange_type="topic",
    task_default_routing_key="work.plain",
    task_queues=[
        Queue("plain", Exchange("work", type="topic"), routing_key="work.#"),
        Queue("feeds", Exchange("work", type="topic"), routing_key="feed.#"),
        Queue("urgent"),
    ],
    task_routes={
        "routed.feed": {"queue": "feeds", "routing_key": "feed.import"},
        "routed.urgent": "urgent",
    },
    task_create_missing_queues=False,
    worker_direct=True,
)
@app.task(bind=True)
def feed(self): return self.request.delivery_info["routing_key"]
@app.task
def plain(): return "plain"
@app.task
def urgent(): return "urgent"
@app.task(bind=True)
def node(self): return self.request.hostname
"""


def test_queues_routes_and_exchanges(module: Module):
    """Workers take from all of task_queues, whatever the default; and from their own queue."""
    name = module("routed", ROUTED)
    with cluster.start(1, app=f"{name}:app", timeout=15) as c:
        routed = sys.modules[name]
        assert routed.plain.delay().get(timeout=SOON) == "plain"
        assert routed.feed.delay().get(timeout=SOON) == "feed.import"
        assert routed.urgent.delay().get(timeout=SOON) == "urgent"
        from celery.utils.nodenames import worker_direct

        [worker] = c.workers
        direct = routed.node.apply_async(queue=worker_direct(worker))
        assert direct.get(timeout=SOON) == worker


PRIORITIES = """
from pathlib import Path
import time
from celery import Celery
app = Celery("priorities")
app.conf.task_queue_max_priority = 10
app.conf.task_default_priority = 5
app.conf.broker_transport_options = {
    "priority_steps": list(range(10)), "queue_order_strategy": "priority", "sep": ":",
}
@app.task
def hold(started, go):
    Path(started).touch()
    while not Path(go).exists(): time.sleep(0.01)
@app.task
def note(log, line):
    with open(log, "a") as file: file.write(line)
"""


def test_priorities(module: Module, tmp_path: Path, eventually):
    """Redis has 0 as the highest, with as many steps as the app says."""
    name = module("priorities", PRIORITIES)
    started, go, log = (str(tmp_path / each) for each in ("started", "go", "log"))
    with cluster.start(1, app=f"{name}:app", timeout=15):
        app = sys.modules[name]
        app.hold.delay(started, go)
        eventually(Path(started).exists, "the worker is busy")
        results = [app.note.apply_async((log, str(p)), priority=p) for p in (9, 3, 7, 0)]
        results.append(app.note.delay(log, "default"))
        Path(go).touch()
        for result in results:
            result.get(timeout=SOON)
    assert Path(log).read_text() == "03default79"


SERIALIZED = """
import base64, json
from celery import Celery
from kombu.serialization import register
register("packed", lambda o: base64.b85encode(json.dumps(o).encode()).decode(),
         lambda s: json.loads(base64.b85decode(s)),
         content_type="application/x-packed", content_encoding="utf-8")
app = Celery("serialized")
app.conf.update(accept_content=["json", "packed", "yaml", "msgpack"], result_serializer="packed",
                result_extended=True, task_track_started=True, result_expires=60,
                task_compression="bzip2")
@app.task(bind=True)
def one(self, x): return [x, self.request.delivery_info is not None]
"""


def test_serializers(module: Module):
    """One that the app registers itself, also for results; JSON, YAML and msgpack besides."""
    name = module("serialized", SERIALIZED)
    with cluster.start(1, app=f"{name}:app", timeout=15):
        for serializer in ("packed", "json", "yaml", "msgpack"):
            result = sys.modules[name].one.apply_async(("word",), serializer=serializer)
            assert result.get(timeout=SOON) == ["word", True]


PICKLED = """
from celery import Celery
app = Celery("pickled")
app.conf.update(accept_content=["pickle"], task_serializer="pickle", result_serializer="pickle",
                event_serializer="pickle")
@app.task
def one(x=None): return x or {1, 2}
"""


def test_pickle_and_nothing_else(module: Module, forced_root: None):
    """What the workers say of themselves comes in pickle, too."""
    assert run_one(module, "pickled", PICKLED) == {1, 2}


def test_pickle_as_root(module: Module, monkeypatch: pytest.MonkeyPatch):
    """In a container everybody is root. Celery refuses since whoever reaches the broker could
    run anything; here that takes the run's secret."""
    monkeypatch.delenv("C_FORCE_ROOT", raising=False)
    assert run_one(module, "pickled_as_root", PICKLED) == {1, 2}


CANNOT_BE_BUILT = """
from celery import Celery, bootsteps
app = Celery("unbuildable")
class Step(bootsteps.Step):
    def __init__(self, parent, **kwargs): raise ValueError("no such licence")
app.steps["worker"].add(Step)
"""


def test_a_worker_that_cannot_be_built_ends_the_start_early(module: Module):
    """Another one would end alike: the app's configuration is no passing trouble."""
    name = module("unbuildable", CANNOT_BE_BUILT)
    with pytest.raises(cluster.WorkersNotReady, match="no such licence") as caught:
        cluster.start(1, app=f"{name}:app", timeout=60)
    assert [status.exit_code for status in caught.value.statuses.values()] == [84]


WORKER_SETTINGS = """
app.conf.update(
    worker_pool="solo", worker_concurrency=7, worker_max_tasks_per_child=1,
    worker_max_memory_per_child=1_000_000, worker_hijack_root_logger=False,
    worker_redirect_stdouts=False, worker_task_log_format="%(message)s",
    worker_disable_rate_limits=True, worker_enable_soft_shutdown_on_idle=True,
    worker_prefetch_multiplier=0, worker_eta_task_limit=3, worker_lost_wait=1,
    task_protocol=1, task_annotations={"*": {"rate_limit": "100/s"}},
    timezone="Europe/Berlin", enable_utc=False, control_exchange="orders", event_exchange="told",
    control_queue_ttl=5.0, event_queue_prefix="told",
)
"""


def test_a_workers_own_settings(module: Module):
    """A new process for each task, a time zone, exchanges of its own names; the pool is ours,
    which is said."""
    name = module("settled", f"{TASKS}{WORKER_SETTINGS}\nimport os\n"
                  "@app.task\ndef pid(): return os.getpid(), str(app.timezone)\n")  # fmt: skip
    with pytest.warns(RuntimeWarning) as warned:
        c = cluster.start(1, app=f"{name}:app", timeout=15)
    said = sorted(str(warning.message).split(" is ")[0] for warning in warned)
    assert said == ["worker_concurrency=7", "worker_pool='solo'"]
    with c:
        pids = [sys.modules[name].pid.delay().get(timeout=SOON) for _ in range(3)]
        assert len({pid for pid, _ in pids}) == 3
        assert {zone for _, zone in pids} == {"Europe/Berlin"}


TASK_SETTINGS = """
from celery import Celery, Task
class Base(Task):
    autoretry_for = (ValueError,)
    max_retries = 3
    default_retry_delay = 0
app = Celery("tasks", task_cls=Base, set_as_current=False)
app.conf.task_ignore_result = True
@app.on_after_configure.connect
def configure(sender=None, **_): sender.conf.task_default_queue = "late"
@app.task(bind=True, ignore_result=False)
def one(self):
    if self.request.retries < 2: raise ValueError("not yet")
    return self.request.retries
@app.task
def silent(): return 1
"""


def test_a_base_class_for_all_tasks_and_no_results(module: Module):
    """task_cls, set_as_current=False, a signal that configures, and task_ignore_result."""
    name = module("based", TASK_SETTINGS)
    with cluster.start(1, app=f"{name}:app", timeout=15):
        assert sys.modules[name].one.delay().get(timeout=SOON) == 2
        assert sys.modules[name].silent.delay().get(timeout=SOON) is None


def test_a_task_with_a_result_backend_of_its_own(module: Module, tmp_path: Path):
    """It stays the task's: what it stores goes there, and not to the cluster."""
    (tmp_path / "results").mkdir()
    name = module(
        "own_backend",
        f"{TASKS}from celery.backends.filesystem import FilesystemBackend\n"
        f"there = FilesystemBackend(app=app, url='file://{tmp_path / 'results'}')\n"
        "@app.task(backend=there)\ndef two(): return 2\n",
    )
    with cluster.start(1, app=f"{name}:app", timeout=15):
        result = sys.modules[name].two.delay()
        assert result.get(timeout=SOON) == 2
    assert sys.modules[name].two.AsyncResult(result.id).get(timeout=SOON) == 2
