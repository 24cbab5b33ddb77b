"""One run in several processes: how they find each other, which one writes, and how all of them end together.

jax's coordination service, which process 0 holds, carries the heartbeats. By default jax aborts a process that loses
the others, with a stack trace; in its recoverable mode that is left to us.
"""

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from mlcm_jax.errors import UserError
from mlcm_jax.outputs import disk_error

HEARTBEAT_TIMEOUT = 40.0  # seconds
BEATS_IN_TIMEOUT = 10
MEET_TIMEOUT_MS = 3_600_000  # one that is gone is noticed sooner
EXIT_STATUS = 3  # of a process that ends because another one has
GOODBYE = 1.0  # seconds that process 0 leaves the others to be gone at the end

BEATS, ENDED = "mlcm_jax/beats/", "mlcm_jax/ended/"  # folders in the coordination service
# What a collective says when another process is gone: gloo, NCCL, the TPU runtime, gRPC.
LOST_PEER = re.compile(r"gloo|nccl|connection (closed|reset|refused)|unavailable|deadline.exceeded|heartbeat", re.I)


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def say(text: object) -> None:
    """Print in the first process."""
    if is_first():
        print(text, flush=True)


def host_array(array: Any) -> np.ndarray:
    """The whole array on this host; an array that is spread over several processes is gathered by all of them."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def meet(name: str) -> None:
    """Wait until all processes are here. Collectives wait less long for the slowest one."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(f"mlcm_jax/{name}", MEET_TIMEOUT_MS)


@contextlib.contextmanager
def joined(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
) -> Iterator[None]:
    """Join the processes of this run, and end with them. To be entered before the first use of a device.

    coordinator_address: host:port of process 0. It, num_processes and process_id are given all or none; without them
    jax looks for a TPU pod, Slurm, Kubernetes or MPI. Prints what was found; one process alone joins nothing.
    heartbeat_timeout: seconds of silence after which a process counts as dead.

    A process that dies or ends with an error makes the others end after at most ``heartbeat_timeout`` and half of it,
    with one sentence and exit status 3. Raises UserError for arguments that cannot be.
    """
    found, several = _start(coordinator_address, num_processes, process_id)
    if not several:
        print(f"{'processes':>10}  1: {found}", flush=True)
        yield
        return
    number, count = jax.process_index(), jax.process_count()
    print(f"{'processes':>10}  {count}: {found}; this is number {number}", flush=True)
    watch, status = Watch(number, count, heartbeat_timeout), 0
    try:
        yield
    except SystemExit as stop:  # all of them have agreed to stop
        print(stop, file=sys.stderr)
        status = 1
    except BaseException as error:
        watch.fail(error)
    watch.finish(status)


def _start(address: str | None, count: int | None, number: int | None) -> tuple[str, bool]:
    """Initialise jax.distributed where there are several processes. Returns what was found, and whether there are."""
    if address is None and count is None and number is None:
        cluster = _cluster()
        if cluster is None:
            return "no cluster detected", False
        several = cluster.get_process_count() > 1
        if several:
            _initialize()
        return f"{cluster.__name__} detected", several
    if address is None or count is None or number is None:
        raise UserError("Give all of --coordinator_address, --num_processes and --process_id, or none of them.")
    if not re.fullmatch(r".+:\d+", address) or not 0 <= number < count:
        raise UserError(
            f"--coordinator_address={address} --num_processes={count} --process_id={number} cannot be: give host:port "
            "of process 0, the number of processes, and a different id from 0 on to each."
        )
    if count > 1:
        _initialize(coordinator_address=address, num_processes=count, process_id=number)
    return f"coordinator {address}", count > 1


def _cluster() -> Any:
    """What jax detects; it has no public function that says so without joining."""
    from jax._src.clusters import ClusterEnv

    kinds = (kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method)
    return next((kind for kind in kinds if kind.is_env_present()), None)


def _client() -> Any:
    from jax._src.distributed import global_state  # jax has no public name for it

    return global_state.client


def _initialize(**arguments: Any) -> None:
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # counts where the devices are CPUs
    try:
        jax.distributed.initialize(**arguments)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise UserError(f"The processes of this run do not find each other ({str(error)[:200]}).") from None


class Watch:
    """Tells the other processes that this one lives, and ends it when one of them does not.

    Two threads: one talks to the service, which may never answer; the other looks at the clock. reason: why to end, ""
    so far.
    """

    def __init__(self, number: int, count: int, timeout: float):
        self._client = _client()
        self._number, self._timeout, self._interval = number, timeout, timeout / BEATS_IN_TIMEOUT
        self._done, self.reason = threading.Event(), ""
        self._heard = time.monotonic()  # last answer of the service
        self._beats = {other: ("", time.monotonic()) for other in range(count)}  # the newest, and since when
        for loop in (self._talk, self._look):
            threading.Thread(target=loop, daemon=True).start()

    def finish(self, status: int) -> None:
        """Wait until all processes are here, and leave."""
        meet("finish")
        self._done.set()
        self._linger(GOODBYE)  # a process that has not left when the service ends is aborted
        if self._number or status:
            # At an ordinary exit jax says goodbye to its service, and aborts where process 0 has gone with it.
            _exit(status)

    def fail(self, error: BaseException) -> NoReturn:
        """End this process, and tell the others why. Where its error only shows that another one is gone, wait to
        hear which."""
        if LOST_PEER.search(str(error)) and not isinstance(error, UserError):
            time.sleep(2 * self._timeout)  # _look ends the process before that
        self._done.set()
        error = disk_error(error) or error
        if isinstance(error, UserError):
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
        else:
            traceback.print_exception(error)
        self._tell(self._number, f"ended with {type(error).__name__} ({' '.join(str(error).split())[:200]})")
        self._linger(2 * self._interval)
        _exit(2 if isinstance(error, UserError) else 1)

    def _talk(self) -> None:
        beat = 0
        while not self._done.wait(self._interval):
            beat += 1
            self.talk_once(beat)

    def talk_once(self, beat: int) -> None:
        """Tell the service that this process lives, and ask whether another one has ended."""
        try:
            self._client.key_value_set(f"{BEATS}{self._number}", str(beat), True)
            if self._number == 0:
                self._find_silent(dict(self._client.key_value_dir_get(BEATS)))
            ended = self._client.key_value_dir_get(ENDED)
        except (jax.errors.JaxRuntimeError, RuntimeError, ValueError):
            return  # check_service decides when that has been too long
        self._heard = time.monotonic()
        self.reason = ended[0][1] if ended else ""

    def _find_silent(self, beats: dict[str, str]) -> None:
        for other, (before, since) in self._beats.items():
            beat = beats.get(f"{BEATS}{other}", "")
            if beat != before:
                self._beats[other] = beat, time.monotonic()
            elif time.monotonic() - since > self._timeout:
                self._tell(other, f"has been silent for {self._timeout:.0f} s")

    def _tell(self, number: int, what: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError, RuntimeError, ValueError):  # process 0 may be gone
            self._client.key_value_set(f"{ENDED}{number}", f"Process {number} {what}", True)

    def check_service(self) -> None:
        if time.monotonic() - self._heard > self._timeout:
            self.reason = f"Process 0 has not answered for {self._timeout:.0f} s"

    def _look(self) -> None:
        while not self._done.wait(self._interval / 2):
            self.check_service()
            if self.reason:
                print(
                    f"\nerror: {self.reason}, so this process ends too: see that one's log, then run the same command "
                    "in all processes again to go on from the last checkpoint.",
                    file=sys.stderr,
                )
                self._linger(2 * self._interval)
                _exit(EXIT_STATUS)

    def _linger(self, seconds: float) -> None:
        """The service ends with process 0: leave the others time to ask it, or to be gone."""
        if self._number == 0:
            time.sleep(seconds)


def _exit(status: int) -> NoReturn:
    """Leave without Python's exit handlers, some of which wait for the other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
