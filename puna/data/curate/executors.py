"""Who does units of work: processes of this machine, a Ray cluster, or this process itself.

All do the same function over the same files. An executor starts units and says which are over; when the
process of one died, or hung and was ended, the unit counts as dead, and :mod:`~puna.data.curate.curation`
decides how it goes on.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from puna.core.errors import PunaError
from puna.data.curate.guard import Range
from puna.data.curate.shard import Unit, work

_SERVE = "import sys; from puna.data.curate.executors import serve; serve(int(sys.argv[1]))"
# One core each: what libraries do on several threads gets in the way of the other workers.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# What one batch has freed the next one takes: glibc would give it back and have it cleared anew each time.
_KEPT_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(128 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
_ENVIRONMENT = {**_ONE_THREAD, **_KEPT_MEMORY}


def _path() -> str:
    """Where this process finds modules, for those that it starts."""
    return os.pathsep.join(filter(None, sys.path))


@dataclass(frozen=True)
class Over:
    """A unit is over: done, failed with an ``error`` of the user's, or ``died`` with its process."""

    unit: Unit
    error: PunaError | None = None
    died: bool = False


class Executor(Protocol):
    """What runs units."""

    slots: int
    """How many units run at once."""

    def start(self, path: str, unit: Unit, deadly: Sequence[Range]) -> None:
        """Begin a unit on the pool at ``path``."""
        ...

    def poll(self, seconds: float) -> list[Over]:
        """What is over; waits no longer than ``seconds``."""
        ...

    def kill(self, unit: Unit) -> None:
        """End the process of a unit; it will be told as dead."""
        ...

    def close(self) -> None:
        """End all processes."""
        ...


class Here:
    """Runs units in this process: for tests and for looking into operators. A death is a death of all."""

    slots = 1

    def __init__(self) -> None:
        self._over: list[Over] = []

    def start(self, path: str, unit: Unit, deadly: Sequence[Range]) -> None:
        """Do the unit."""
        try:
            work(path, unit, deadly)
        except PunaError as error:
            self._over.append(Over(unit, error))
        else:
            self._over.append(Over(unit))

    def poll(self, seconds: float) -> list[Over]:
        """What was done."""
        over, self._over = self._over, []
        return over

    def kill(self, unit: Unit) -> None:
        """Nothing runs between calls."""

    def close(self) -> None:
        """Nothing to end."""


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Connection[Any, Any]
    unit: Unit | None = None


class Processes:
    """Runs units in processes of their own, started anew so that they hold nothing of this one.

    They import puna and nothing of the program that this is part of, whatever that is. All start at once
    and before there is work, as importing takes a while.
    """

    def __init__(self, workers: int) -> None:
        self.slots = workers
        self._workers = [self._begun() for _ in range(workers)]

    def start(self, path: str, unit: Unit, deadly: Sequence[Range]) -> None:
        """Hand the unit to a process that has none."""
        free = next((worker for worker in self._workers if worker.unit is None), None)
        if free is None:
            free = self._begun()
            self._workers.append(free)
        free.unit = unit
        free.pipe.send((path, unit, list(deadly)))

    def _begun(self) -> _Worker:
        here, there = socket.socketpair()
        with there:
            process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, str(there.fileno())],
                pass_fds=[there.fileno()],
                env={**os.environ, "PYTHONPATH": _path(), **_ENVIRONMENT},
            )
        return _Worker(process, Connection(here.detach()))

    def poll(self, seconds: float) -> list[Over]:
        """What is over; a closed pipe is a dead process."""
        busy = {worker.pipe: worker for worker in self._workers if worker.unit is not None}
        over = []
        for pipe in wait(list(busy), seconds):
            worker = busy[pipe]  # type: ignore[index]
            unit = worker.unit
            assert unit is not None
            worker.unit = None
            try:
                over.append(Over(unit, worker.pipe.recv()))
            except (EOFError, OSError):
                self._end(worker)
                over.append(Over(unit, died=True))
        return over

    def kill(self, unit: Unit) -> None:
        """Kill the unit's process."""
        for worker in self._workers:
            if worker.unit == unit:
                worker.process.kill()

    def close(self) -> None:
        """End the processes."""
        for worker in list(self._workers):
            self._end(worker)

    def _end(self, worker: _Worker) -> None:
        worker.pipe.close()
        worker.process.kill()
        worker.process.wait()
        self._workers.remove(worker)


def serve(descriptor: int) -> None:
    """What a worker does until its parent ends: units, one after another."""
    import gc

    import pyarrow

    from puna.data.curate.operator import all_operators

    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    _spare_pandas()
    all_operators()
    gc.freeze()  # What was imported stays: no collection need look at it.
    pipe: Connection[Any, Any] = Connection(descriptor)
    while True:
        try:
            path, unit, deadly = pipe.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        try:
            work(path, unit, deadly)
        except PunaError as error:
            pipe.send(PunaError(str(error)))
        except KeyboardInterrupt:
            return
        except Exception as error:
            import traceback

            traceback.print_exc()
            pipe.send(PunaError(f"{type(error).__name__}: {error}", where=f"{unit.task} {unit.name}"))
        else:
            pipe.send(None)


class _NoPandas:
    """A finder of modules for which pandas is not installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Nothing, so that other finders are asked; an error for pandas."""
        if name == "pandas":
            raise ModuleNotFoundError(name)


def _spare_pandas() -> None:
    """Let pyarrow find out that there is no pandas, whose import takes 0.2 s and 68 MB.

    It asks once, when it is first given a list, in case that is of pandas. A worker may still import pandas,
    but not make pyarrow's tables into its frames.
    """
    import pyarrow

    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        pyarrow.array([""])
    finally:
        sys.meta_path.remove(finder)


class Ray:
    """Runs units as tasks on a Ray cluster; the pool lies where every node can read and write it."""

    def __init__(self, workers: int, address: str | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise PunaError("this needs ray", fix="pip install 'puna[ray]'") from None
        self._ray = ray
        self.slots = workers
        self._ours = not ray.is_initialized()
        if self._ours:
            own: dict[str, Any] = {"address": address}
            if address is None:
                own = {"num_cpus": workers, "include_dashboard": False}
                own["runtime_env"] = {"env_vars": {"PYTHONPATH": _path(), **_ENVIRONMENT}}
            ray.init(log_to_driver=False, logging_level="error", **own)
        # A worker process is used once where a unit killed it; Ray must not try such a unit again itself.
        self._remote = ray.remote(num_cpus=1, max_retries=0)(_ray_unit)
        self._running: dict[Any, Unit] = {}

    def start(self, path: str, unit: Unit, deadly: Sequence[Range]) -> None:
        """Submit the unit."""
        self._running[self._remote.remote(path, unit, list(deadly))] = unit

    def poll(self, seconds: float) -> list[Over]:
        """What is over; Ray tells of workers that died."""
        done, _ = self._ray.wait(list(self._running), timeout=seconds)
        over = []
        for reference in done:
            unit = self._running.pop(reference)
            try:
                message = self._ray.get(reference)
            except self._ray.exceptions.RayError:
                over.append(Over(unit, died=True))
            else:
                over.append(Over(unit, None if message is None else PunaError(message)))
        return over

    def kill(self, unit: Unit) -> None:
        """Cancel the unit by force."""
        for reference, running in self._running.items():
            if running == unit:
                self._ray.cancel(reference, force=True)

    def close(self) -> None:
        """Leave the cluster, or end it if it was started here."""
        if self._ours:
            self._ray.shutdown()


def _ray_unit(path: str, unit: Unit, deadly: Sequence[Range]) -> str | None:
    """A unit as a task: a user's error comes back as its message."""
    try:
        work(path, Unit(*unit), deadly)
    except PunaError as error:
        return str(error)
    return None


def make_executor(name: str, workers: int, address: str | None = None) -> Executor:
    """The executor of that name: processes, ray, or here."""
    if name == "ray":
        return Ray(workers, address)
    return Here() if name == "here" else Processes(workers)
