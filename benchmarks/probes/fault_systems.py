"""The systems that faults happen to, each behind the same few methods."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import byhand
import psutil


class System(ABC):
    """Workers, and what hands tasks to them."""

    #: Whether a worker is two processes, one of which runs the tasks.
    has_pool = False

    def __init__(self, workers: int, *, respawn: bool) -> None:
        self.wanted = workers
        self.respawn = respawn
        self.stack = contextlib.ExitStack()

    @abstractmethod
    def start(self) -> None:
        """Return when all workers are ready."""

    @abstractmethod
    def submit(self, task: str, *arguments: str) -> Any:
        """Hand in one of ``fault_tasks``."""

    @abstractmethod
    def get(self, handle: Any) -> Any:
        """Wait for its result, for as long as it takes."""

    @abstractmethod
    def is_done(self, handle: Any) -> bool:
        """Whether there is a result or an error, as far as is known now."""

    @abstractmethod
    def workers(self) -> Sequence[int]:
        """The main processes of the workers there are."""

    def broker(self) -> int:
        """The process that has the queue."""
        raise NotImplementedError

    def restart_broker(self) -> None:  # noqa: B027 (most have nothing of the kind)
        """What somebody who knows it well has set up for its death, if anything."""

    def stop(self) -> None:
        self.stack.close()


class CeleryLike(System):
    """What this project and stock Celery have in common: the app."""

    has_pool = True

    def submit(self, task: str, *arguments: str) -> Any:
        import faults_app

        return getattr(faults_app, task).delay(*arguments)

    def get(self, handle: Any) -> Any:
        return handle.get()

    def is_done(self, handle: Any) -> bool:
        return bool(handle.ready())


class Ours(CeleryLike):
    """This project."""

    def start(self) -> None:
        from faults_app import app

        import cluster

        running = cluster.start(self.wanted, app=app, progress=False)
        self.stack.callback(running.stop, timeout=0)

    def workers(self) -> Sequence[int]:
        return self._of_role("worker, main process")

    def broker(self) -> int:
        [pid] = self._of_role("broker")
        return pid

    def _of_role(self, role: str) -> Sequence[int]:
        from roles import roles

        return [process.pid for process, its in roles(psutil.Process()).items() if its == role]


class Stock(CeleryLike):
    """Celery by hand: workers that are started again when they end, as by systemd, and a server
    that keeps what it has."""

    def start(self) -> None:
        from redis import Redis

        self._ending = False
        self._port = byhand.free_port()
        byhand.use_server(self._port)
        self._server = self._start_server()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self.stack.callback(self._end)
        client = self.stack.enter_context(Redis(host="127.0.0.1", port=self._port))
        byhand.wait_for_server(self._server, client)
        for number in range(self.wanted):
            self._spawn(number)
            threading.Thread(target=self._look_after, args=(number,), daemon=True).start()
        byhand.wait_for_subscribers(client, self.wanted)

    def workers(self) -> Sequence[int]:
        return [process.pid for process in self._processes.values() if process.poll() is None]

    def broker(self) -> int:
        return self._server.pid

    def restart_broker(self) -> None:
        self._server.wait()
        self._server = self._start_server()

    def _start_server(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(byhand.server_command(self._port, byhand.DURABLE))

    def _spawn(self, number: int) -> None:
        command = byhand.worker_command("faults_app", number, byhand.LEAN)
        self._processes[number] = subprocess.Popen(command)

    def _look_after(self, number: int) -> None:
        while True:
            self._processes[number].wait()
            if self._ending or not self.respawn:
                return
            self._spawn(number)

    def _end(self) -> None:
        self._ending = True
        for process in [*self._processes.values(), self._server]:
            process.kill()


class StockEarly(Stock):
    """Celery with its own defaults: a task is acknowledged before it runs."""

    def start(self) -> None:
        os.environ["FAULTS_EARLY"] = "1"
        super().start()


class Dask(System):
    """``LocalCluster``: workers in processes, each with a nanny that starts it again."""

    def start(self) -> None:
        import dask
        from distributed import Client, LocalCluster

        # The nannies of workers that can't come back must not report to us for ever.
        dask.config.set({"distributed.worker.preload": ["fault_tasks"]})
        started = self.stack.enter_context(
            LocalCluster(  # type: ignore[no-untyped-call]
                n_workers=self.wanted,
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
            )
        )
        self._connect(Client(started))  # type: ignore[no-untyped-call]

    def _connect(self, client: Any) -> None:
        self.client = self.stack.enter_context(client)
        self.client.wait_for_workers(self.wanted)

    def submit(self, task: str, *arguments: str) -> Any:
        import fault_tasks

        return self.client.submit(getattr(fault_tasks, task), *arguments, pure=False)

    def get(self, handle: Any) -> Any:
        return handle.result()

    def is_done(self, handle: Any) -> bool:
        return bool(handle.done())

    def workers(self) -> Sequence[int]:
        return [
            process.pid
            for process in psutil.Process().children(recursive=True)
            if "spawn_main" in " ".join(process.cmdline())
        ]


class DaskByHand(Dask):
    """``dask scheduler`` and ``dask worker`` processes: ``LocalCluster`` keeps its scheduler
    inside the process that waits for results."""

    def start(self) -> None:
        import sys

        from distributed import Client

        port = byhand.free_port()
        python = [sys.executable, "-m", "distributed.cli"]
        address = f"tcp://127.0.0.1:{port}"
        scheduler = [f"{python[2]}.dask_scheduler", "--port", str(port), "--no-dashboard"]
        self._scheduler = self._run([*python[:2], *scheduler, "--host", "127.0.0.1"])
        worker = [f"{python[2]}.dask_worker", address, "--nthreads", "1", "--no-dashboard"]
        for _ in range(self.wanted):
            self._run([*python[:2], *worker])
        self._connect(Client(address))  # type: ignore[no-untyped-call]

    def broker(self) -> int:
        return self._scheduler.pid

    def _run(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command)
        self.stack.callback(process.kill)
        return process


class Ray(System):
    """``ray.init``; its workers come and go as they are needed."""

    def start(self) -> None:
        from pathlib import Path

        import fault_tasks
        import ray

        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it would ask the internet
        ray.init(
            num_cpus=self.wanted,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=str(Path.cwd() / "ray"),
        )
        self.stack.callback(ray.shutdown)
        self._ray = ray
        self._tasks = {
            name: ray.remote(getattr(fault_tasks, name)) for name in ("wait_for", "short", "long")
        }

    def submit(self, task: str, *arguments: str) -> Any:
        return self._tasks[task].remote(*arguments)

    def get(self, handle: Any) -> Any:
        return self._ray.get(handle)

    def is_done(self, handle: Any) -> bool:
        done, _ = self._ray.wait([handle], timeout=0)
        return bool(done)

    def workers(self) -> Sequence[int]:
        # Its agents have such names as well.
        names = {"ray::IDLE", *(f"ray::{task}" for task in self._tasks)}
        return [
            process.pid
            for process in psutil.Process().children(recursive=True)
            if process.name() in names
        ]

    def broker(self) -> int:
        [pid] = [
            process.pid
            for process in psutil.Process().children(recursive=True)
            if process.name() == "gcs_server"
        ]
        return pid


#: By the name that the script uses; the second where the broker is a process of its own.
SYSTEMS: dict[str, tuple[Callable[..., System], Callable[..., System]]] = {
    "cluster": (Ours, Ours),
    "celery": (Stock, Stock),
    "celery-early": (StockEarly, StockEarly),
    "dask": (Dask, DaskByHand),
    "ray": (Ray, Ray),
}
