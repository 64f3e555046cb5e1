"""Call a function on many arguments: in this process, in processes of this machine, or on a Dask cluster."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from onnxprune import runtime
from onnxprune.errors import OnnxPruneError, UsageError

CONNECT_SECONDS = 8

Call = tuple[Any, ...]
"""The arguments of one call; what several calls share is sent once."""


class WorkerLostError(OnnxPruneError):
    """The process that ran a call ended before the call did."""


def cores() -> int:
    """Cores that this process may use, containers' limits included."""
    return int(_joblib().cpu_count())


def processes(provider: str) -> int:
    """Processes to start where nobody says how many: one per core, but a GPU is shared badly."""
    return cores() if runtime.provider_for(provider) == runtime.CPU else 1


def locally(
    function: Callable[..., Any], calls: Sequence[Call], jobs: int, threads: int
) -> Generator[tuple[int, Any | WorkerLostError]]:
    """Call in up to ``jobs`` processes, each with ``threads`` threads for linear algebra; with one job in this process.

    Yields the number of each call and what it returned, as they finish. Where a process dies, the calls that have not
    finished are made again one after another, each in a process of its own, so that one bad call costs no other.

    Raises
    ------
    UsageError
        There are several jobs, and the system lets this process have no semaphores, which processes share.
    """
    if min(jobs, len(calls)) <= 1:
        for number, call in enumerate(calls):
            yield number, function(*call)
        return
    _require_semaphores()
    from joblib.externals.loky.process_executor import BrokenProcessPool  # noqa: PLC0415 (only sweeps need it)

    waiting = dict(enumerate(calls))
    try:
        for number, result in _processes(function, list(waiting.items()), min(jobs, len(calls)), threads):
            del waiting[number]
            yield number, result
    except BrokenProcessPool:
        pass
    for number, call in waiting.items():
        try:
            ((_, result),) = _processes(function, [(number, call)], 2, threads)
        except BrokenProcessPool:
            result = WorkerLostError("the process that ran it was killed (out of memory?); use fewer jobs")
        yield number, result


def _processes(
    function: Callable[..., Any], calls: Iterable[tuple[int, Call]], jobs: int, threads: int
) -> Iterator[tuple[int, Any]]:
    joblib = _joblib()
    with joblib.parallel_config("loky", n_jobs=jobs, inner_max_num_threads=threads):
        parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1, max_nbytes=None)
        with _interrupts_held(), _quiet_tracker():
            results = parallel(joblib.delayed(_numbered)(function, number, call) for number, call in calls)
    try:
        while True:
            with _quiet():  # an interruption may find joblib inside of next()
                try:
                    result = next(results)
                except StopIteration:
                    return
            yield result
    finally:
        with _quiet():
            results.close()  # stops the processes where not all results were taken


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep joblib from warning that work was thrown away, which is what an interruption means."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _quiet_tracker() -> Iterator[None]:
    """Keep the process that frees what killed processes held from warning of it, after this one's last line."""
    before = sys.warnoptions[:]
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")  # is passed on to processes that are started
    try:
        yield
    finally:
        sys.warnoptions[:] = before


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold SIGINT back for a moment: processes that are started meanwhile leave Ctrl-C to this one, which ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _joblib() -> Any:
    with _quiet():  # without semaphores it says so once imported, even where it only counts cores
        import joblib  # noqa: PLC0415 (only sweeps need it)

    return joblib


def _require_semaphores() -> None:
    try:
        multiprocessing.Semaphore()
    except (ImportError, OSError) as error:
        raise UsageError(
            f"processes cannot work together here, because the system gives no semaphores ({error}); use --jobs 1, or let "
            "/dev/shm be written"
        ) from error


def _numbered(function: Callable[..., Any], number: int, call: Call) -> tuple[int, Any]:
    return number, function(*call)


def on_dask(
    function: Callable[..., Any], calls: Sequence[Call], scheduler: str, note: Callable[[str], None]
) -> Generator[tuple[int, Any | WorkerLostError]]:
    """Call on the workers of a Dask cluster; yields the number of each call and what it returned, as they finish.

    Raises
    ------
    UsageError
        distributed is not installed, or no scheduler answers at the address.
    """
    distributed = _distributed()
    client = _connect(distributed, scheduler)
    futures: dict[str, Any] = {}
    with _silent("distributed.client"), _closing(client, futures):
        if not client.scheduler_info()["workers"]:
            note(f"{scheduler} has no workers yet; waiting for them")
        sent = {id(part): client.scatter(part, hash=False) for call in calls for part in call[1:]}
        for call in calls:
            future = client.submit(function, call[0], *(sent[id(part)] for part in call[1:]), pure=False)
            futures[future.key] = future
        numbers = {key: number for number, key in enumerate(futures)}
        for future in distributed.as_completed(list(futures.values()), loop=client.loop, raise_errors=False):
            yield numbers[future.key], _result(future, scheduler)
            del futures[future.key]


def _distributed() -> Any:
    try:
        import distributed  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise UsageError("the dask backend needs distributed: pip install 'onnxprune[dask]'") from error
    return distributed


def _connect(distributed: Any, scheduler: str) -> Any:
    """Ask who is there before a Client is made, because one that fails goes on trying for long in the background."""

    async def ask() -> Any:
        async with distributed.rpc(scheduler) as there:
            return await there.identity()

    def answer() -> Any:
        return asyncio.run(asyncio.wait_for(ask(), CONNECT_SECONDS))

    try:
        with (
            _silent("distributed"),
            ThreadPoolExecutor(1) as thread,
        ):  # of its own, because a notebook's thread runs an event loop already
            kind = thread.submit(answer).result()["type"]
    except Exception as error:  # a port of something else than Dask gives errors of any kind
        why = str(error).splitlines()[0] if str(error) else f"waited {CONNECT_SECONDS} s"
        raise UsageError(
            f"{scheduler}: no Dask scheduler answers there ({why}); start one with 'dask scheduler'"
        ) from error
    if kind != "Scheduler":
        raise UsageError(f"{scheduler}: is the address of a Dask {kind.lower()}; give the scheduler's")
    return distributed.Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)


@contextmanager
def _closing(client: Any, futures: Mapping[str, Any]) -> Iterator[None]:
    """In the end cancel what has not finished, as after Ctrl-C, and leave the cluster."""
    try:
        yield
    finally:
        client.cancel(list(futures.values()), force=True)
        client.close()


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Keep distributed from logging pages about what an error or a row says in a line."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _result(future: Any, scheduler: str) -> Any | WorkerLostError:
    if future.status == "finished":
        return future.result()
    if future.status == "cancelled":
        return WorkerLostError(f"the connection to {scheduler} was lost")
    error = future.exception()
    if type(error).__name__ == "KilledWorker":
        return WorkerLostError("the Dask workers that ran it were killed, one after another (out of memory?)")
    return WorkerLostError(
        f"the Dask worker cannot run it ({type(error).__name__}: {error}); is onnxprune installed there?"
    )
