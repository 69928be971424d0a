"""Tasks in worker processes of one thread each: a failure, or a killed worker, costs its own task.

Workers live on from task to task (imports take seconds). The parent hands a task to whoever is free
and collects errors by name; a worker that dies is replaced.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

Work = Callable[[Any], None]  # a module's function: it is sent by name


class Outcome(NamedTuple):
    """Of a task."""

    task: Any
    error: str | None  # one line, or None where it went well
    details: str = ""  # the traceback


class _Worker:
    def __init__(self, context: Any, work: Work) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        with _one_thread():
            self.process.start()
        theirs.close()
        self.task: Any = None

    def ask(self, task: Any) -> None:
        self.task = task
        with suppress(OSError):  # one that died at its start: `answer` tells
            self.pipe.send(task)

    def answer(self) -> Outcome:
        try:
            error, details = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            error, details = f"its process ended with exit code {self.process.exitcode}", ""
        task, self.task = self.task, None
        return Outcome(task, error, details)

    def stop(self) -> None:
        """An idle one ends by itself; one at work is ended."""
        self.pipe.close()
        if self.task is not None:
            self.process.terminate()
        self.process.join()


@contextmanager
def _one_thread() -> Iterator[None]:
    """A process that is started inside has one thread in every library, and no bars."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS", "TQDM_DISABLE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Connection, work: Work) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            work(task)
            pipe.send((None, ""))
        except Exception as error:
            told = " ".join(str(error).split()) or type(error).__name__
            pipe.send((f"{type(error).__name__}: {told}", traceback.format_exc()))


def run_tasks(tasks: Sequence[Any], work: Work, workers: int) -> Iterator[Outcome]:
    """Each task's outcome as it comes; the order in which they begin is that of `tasks`."""
    context = multiprocessing.get_context("spawn")
    left = list(tasks)
    pool: list[_Worker] = []
    try:
        while left or any(w.task is not None for w in pool):
            pool = [w for w in pool if w.task is not None or w.process.is_alive()]
            idle = [w for w in pool if w.task is None]
            while left and (idle or len(pool) < workers):
                if not idle:
                    idle.append(_Worker(context, work))
                    pool.append(idle[-1])
                idle.pop().ask(left.pop(0))
            ready = wait([w.pipe for w in pool if w.task is not None])
            for worker in [w for w in pool if w.pipe in ready]:
                yield worker.answer()
    finally:
        for worker in pool:
            worker.stop()
