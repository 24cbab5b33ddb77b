"""How processes find each other, by what jax detects and by flags, and how each learns that another has ended."""

import sys
import types

import pytest

from mlcm_jax.errors import UserError
from mlcm_jax.parallel import distributed

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "2",
}


@pytest.fixture
def initialized(monkeypatch):
    """What jax.distributed.initialize is called with; nothing is joined."""
    calls = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr(distributed.jax.config, "update", lambda *_: None)
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)
    return calls


def test_one_process_joins_nothing(initialized, capsys):
    with distributed.joined():
        pass
    assert initialized == [] and capsys.readouterr().out == " processes  1: no cluster detected\n"


@pytest.mark.parametrize(("tasks", "several"), [("2", True), ("1", False)])
def test_slurm_is_found(initialized, monkeypatch, tasks, several):
    for name, value in (SLURM | {"SLURM_NTASKS": tasks}).items():
        monkeypatch.setenv(name, value)
    assert distributed._start(None, None, None) == ("SlurmCluster detected", several)
    assert initialized == [{}] * several


def test_kubernetes_is_found(initialized, monkeypatch):
    """By the client library, which asks the cluster for the job of this pod."""
    from jax._src.clusters import k8s_cluster

    kubernetes = types.SimpleNamespace(
        config=types.SimpleNamespace(load_incluster_config=lambda: None),
        client=types.SimpleNamespace(
            CoreV1Api=object, BatchV1Api=object, exceptions=types.SimpleNamespace(ApiException=OSError)
        ),
    )
    monkeypatch.setitem(sys.modules, "kubernetes", kubernetes)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    job = types.SimpleNamespace(spec=types.SimpleNamespace(parallelism=4))
    monkeypatch.setattr(k8s_cluster.K8sCluster, "_job", classmethod(lambda cls: job))
    assert distributed._start(None, None, None) == ("K8sCluster detected", True)
    assert initialized == [{}]


def test_a_tpu_pod_is_found(initialized, monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to ask
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "t0,t1,t2,t3")
    monkeypatch.delenv("TPU_PROCESS_ADDRESSES", raising=False)
    assert distributed._start(None, None, None) == ("GkeTpuCluster detected", True)


def test_flags_name_the_processes(initialized):
    assert distributed._start("host:1234", 2, 1) == ("coordinator host:1234", True)
    assert initialized == [{"coordinator_address": "host:1234", "num_processes": 2, "process_id": 1}]
    assert distributed._start("host:1234", 1, 0) == ("coordinator host:1234", False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1234", None, None), "Give all of --coordinator_address"),
        ((None, 2, 0), "Give all of --coordinator_address"),
        (("host", 2, 0), "--coordinator_address=host --num_processes=2 --process_id=0 cannot be"),
        (("host:1234", 2, 2), "--process_id=2 cannot be"),
        (("host:1234", 0, 0), "--num_processes=0"),
    ],
)
def test_flags_that_cannot_be_are_refused(initialized, given, message):
    with pytest.raises(UserError, match=message):
        distributed._start(*given)
    assert initialized == []


class Service:
    """The coordination service's folders, in this process; away: it does not answer."""

    def __init__(self):
        self.values, self.away = {}, False

    def key_value_set(self, key, value, allow_overwrite=False):
        self._answer()
        self.values[key] = value

    def key_value_dir_get(self, folder):
        self._answer()
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]

    def _answer(self):
        if self.away:
            raise RuntimeError("UNAVAILABLE")


@pytest.fixture
def watch(monkeypatch):
    """watch(number, count, timeout) -> a Watch whose threads do not run, on one service and one clock."""
    service, clock = Service(), [0.0]
    monkeypatch.setattr(distributed, "_client", lambda: service)
    monkeypatch.setattr(distributed.threading, "Thread", lambda **_: types.SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(distributed.time, "monotonic", lambda: clock[0])
    make = lambda number: distributed.Watch(number, 3, 40.0)  # noqa: E731
    return types.SimpleNamespace(make=make, service=service, clock=clock)


def test_a_silent_process_is_named_once_it_has_been_silent_for_the_timeout(watch):
    watches = [watch.make(i) for i in range(3)]
    for beat in range(1, 30):
        watch.clock[0] = 4.0 * beat
        for each in watches[: 3 if beat < 10 else 2]:  # the last one stops at 36 s
            each.talk_once(beat)
        reasons = {each.reason for each in watches[:2]}
        if watch.clock[0] <= 36 + 40:
            assert reasons == {""}
    assert reasons == {"Process 2 has been silent for 40 s"}


def test_a_service_that_does_not_answer_is_process_0_that_is_gone(watch):
    other = watch.make(1)
    other.talk_once(1)
    watch.service.away = True
    for now in (20.0, 39.0, 41.0):
        watch.clock[0] = now
        other.talk_once(2)
        other.check_service()
        assert other.reason == ("Process 0 has not answered for 40 s" if now > 40 else "")
