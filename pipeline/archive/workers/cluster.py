"""The executor on a Dask cluster, whoever started that. It is given a client, so Dask is not imported here.

Tasks for the detector ask for half of the resource GPU, so that two of them share one and the next block is read while
this one computes; the others ask for the resource CPU. A resource that no worker offers is not asked for.
"""

import contextlib
import ipaddress
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from pipeline.errors import DeviceLost, RunError

_ASK_AGAIN_S = 5.0  # for how long the resources that the workers offer are cached
_ANSWER_S = 5.0  # for how long an answer of the scheduler is waited for


class Cluster:
    """The workers of a `dask.distributed.Client`, as they come and go."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._asked, self._offered = float("-inf"), {"GPU": 0.0, "CPU": 0.0, "workers": 0.0}
        self.silent = False
        self.ended: tuple[str, ...] = ()
        self._known: set[str] = set()  # workers on which `run_on_new_workers` has run
        scheduler = client.scheduler_info(n_workers=0)
        self.dashboard: str = client.dashboard_link if "dashboard" in scheduler.get("services", {}) else ""
        self.warning = exposed(scheduler.get("address", ""))

    def _offers(self) -> dict[str, float]:
        if time.monotonic() - self._asked > _ASK_AGAIN_S:
            workers = self._workers()
            self._asked = time.monotonic()
            if workers is None:
                return self._offered
            resources = [worker.get("resources", {}) for worker in workers.values()]
            offered = {name: sum(each.get(name, 0) for each in resources) for name in ("GPU", "CPU")}
            self._offered = {**offered, "workers": len(workers)}
        return self._offered

    def _workers(self) -> dict[str, Any] | None:
        """The workers by their addresses; None where the scheduler does not answer in time."""
        ask = self._client.scheduler.identity
        try:
            answer = self._client.sync(ask, callback_timeout=_ANSWER_S)
        except TimeoutError:
            self.silent = True
            return None
        self.silent = False
        workers: dict[str, Any] = answer.get("workers", {})
        return workers

    @property
    def detectors(self) -> int:
        offers = self._offers()
        return int(offers["GPU"] if offers["CPU"] else offers["GPU"] or offers["workers"])

    @property
    def feeders(self) -> int:
        offers = self._offers()
        return int(offers["CPU"] or offers["workers"])

    def run_on_new_workers(self, function: Callable[..., Any], *args: Any, retire: bool = False) -> list[str]:
        if (workers := self._workers()) is not None:
            self.ended += tuple(sorted(self._known - workers.keys()))
            self._known &= workers.keys()
        new = [address for address in workers or () if address not in self._known]
        self._known.update(new)
        answers = self._client.run(function, *args, workers=new, on_error="return") if new else {}
        problems = {address: answer for address, answer in answers.items() if answer is not None}
        # not those that did not answer: they may be busy
        unfit = [address for address, problem in problems.items() if retire and isinstance(problem, RunError)]
        if unfit:
            self._known.difference_update(unfit)  # so that they do not count as ended
            self._client.retire_workers(unfit)
        retired = dict.fromkeys(unfit, "; it is retired")
        return [f"the worker at {address} {problem}{retired.get(address, '')}" for address, problem in problems.items()]

    def prepare(self, function: Callable[..., Any], *args: Any) -> None:
        offered = {address: worker.get("resources", {}) for address, worker in (self._workers() or {}).items()}
        detecting = [address for address, resources in offered.items() if resources.get("GPU")]
        if detecting or (offered and not any(offered.values())):
            chosen = {"workers": detecting or list(offered), "wait": False, "on_error": "ignore"}
            with contextlib.suppress(Exception):  # of a worker that ends just now, or does not answer
                self._client.run(_beside_tasks, function, *args, **chosen, callback_timeout=_ANSWER_S)

    def submit(self, on_device: bool, function: Callable[..., Any], *args: Any) -> Future[Any]:
        offers = self._offers()
        # workers with GPUs may be late, or away: where others offer the resource CPU, these are waited for
        resources = {"GPU": 0.5} if on_device else {"CPU": 1}
        if not (offers["CPU"] or (on_device and offers["GPU"])):
            resources = {}
        executor = self._client.get_executor(pure=False, resources=resources)
        call = (_on_device, function) if on_device else (function,)
        future: Future[Any] = executor.submit(*call, *args)
        return future


async def _beside_tasks(function: Callable[..., Any], *args: Any) -> None:
    """Have a thread of a worker call a function; the thread ends with its process.

    A coroutine, as Dask runs nothing else without waiting for it.
    """

    def call() -> None:
        with contextlib.suppress(Exception):
            function(*args)

    threading.Thread(target=call, daemon=True).start()


def _on_device(function: Callable[..., Any], *args: Any) -> Any:
    """What a task returns, or raises. A worker that has lost its GPU ends: Dask starts another, which does the task."""
    try:
        return function(*args)
    except DeviceLost as error:
        if multiprocessing.parent_process() is None:  # nobody would start another
            raise
        print(f"nightslide: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def exposed(address: str) -> str:
    """A warning where a scheduler's address is open to a network without encryption; else empty."""
    protocol, _, place = address.partition("://")
    if protocol in ("tls", "wss", "inproc") or not place:
        return ""
    try:
        here = ipaddress.ip_address(place.rsplit(":", 1)[0].strip("[]")).is_loopback
    except ValueError:  # a name
        here = place.startswith("localhost:")
    if here:
        return ""
    return (
        f"the scheduler at {address} is reached without TLS: whoever can reach its port, or a worker's, can run code "
        f"there as you. Keep it to a network that you trust, or use TLS, with files of `nightslide certificates`"
    )
