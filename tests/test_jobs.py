"""The job scripts of launch/: what they run, with stand-ins on PATH for the programs that they call."""

import os
import shlex
import shutil
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(ROOT.glob("launch/*/*.sh"))
TRAIN = ["--config=configs/sdxl.py:lora", "--config.prompts=my prompts.txt"]
TPU = ["--name=sdxl", "--zone=us-west4-a", "--type=v5litepod-16", "--workdir=gs://b/sdxl", "--spot"]
SLURM = ["--name=sdxl", "--nodes=2", "--gpus_per_node=8", "--time=24:00:00"]
GKE = ["--name=sdxl", "--image=i", "--workdir=gs://b/sdxl", "--hosts=2"]
GKE_TPU = [*GKE, "--tpu=tpu-v5-lite-podslice", "--topology=4x4", "--chips_per_host=4"]
GKE_GPU = [*GKE, "--gpu=nvidia-h100-80gb", "--gpus_per_host=8"]

# Records its call and its input; answers with the first line that is left of its answers: "STATUS TEXT".
STAND_IN = """#!/usr/bin/env bash
printf '%q ' "${0##*/}" "$@" >>"$CALLS"
echo >>"$CALLS"
if [[ ${0##*/} == kubectl ]]; then cat >>"$CALLS"; fi
for pattern in "$ANSWERS"/*; do
    if [[ " $* " == *" ${pattern##*/}"* && -s $pattern ]]; then
        read -r status text <"$pattern"
        sed -i 1d "$pattern"
        echo "$text"
        exit "$status"
    fi
done
"""


TAIL = "--worker=0 --command=cd mlcm_jax && tail"  # a call that follows the log, and has the run's exit status
PROGRAMS = ("gcloud", "sbatch", "scontrol", "kubectl", "git")


def commands_in(text):
    return [shlex.split(line) for line in text.splitlines() if line.startswith(PROGRAMS)]


@pytest.fixture
def cluster(tmp_path):
    """run(script, *arguments, answers={words of the call: [(status, text) in turns]}) -> (process, calls)."""
    programs, answers_dir, calls = tmp_path / "bin", tmp_path / "answers", tmp_path / "calls"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    env = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls), "ANSWERS": str(answers_dir)}
    env["TMPDIR"] = str(tmp_path)

    def run(script, *arguments, answers=None):
        shutil.rmtree(answers_dir, ignore_errors=True)
        answers_dir.mkdir()
        for words, turns in (answers or {}).items():
            (answers_dir / words).write_text("".join(f"{status} {text}\n" for status, text in turns))
        calls.write_text("")
        command = [ROOT / "launch" / script, *arguments]
        process = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        return process, commands_in(calls.read_text())

    run.env, run.programs, run.calls = env, programs, calls
    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: "/".join(path.parts[-2:]))
def test_shellcheck_finds_nothing(script):
    command = [Path(sysconfig.get_path("scripts")) / "shellcheck", script]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("tpu/run.sh", [*TPU, "--what=1", "--", *TRAIN], "--what=1 is no flag of this script"),
        ("tpu/run.sh", [*TPU[1:], "--", *TRAIN], "--name is missing"),
        ("tpu/run.sh", TPU, "Nothing to run"),
        ("slurm/run.sh", [*SLURM, "--", *TRAIN], "--workdir is missing"),
        ("gke/run.sh", [*GKE, "--", *TRAIN], "--tpu is missing"),
        ("gke/run.sh", [*GKE, "--gpu=x", "--", *TRAIN], "--gpus_per_host is missing"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_runs(cluster, script, arguments, message):
    process, calls = cluster(script, *arguments)
    assert process.returncode == 2 and calls == []
    assert process.stderr.startswith("error: ") and message in process.stderr and process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("tpu/run.sh", TPU), ("slurm/run.sh", [*SLURM, "--workdir=w"]), ("gke/run.sh", GKE_GPU)],
)
def test_a_dry_run_runs_nothing_and_prints_what_would(cluster, script, arguments):
    dry, calls = cluster(script, *arguments, "--dry_run", "--", *TRAIN)
    assert dry.returncode == 0 and calls == []
    answers = {"queued-resources describe": [(1, ""), (0, "ACTIVE")], "--worker=0 --command=kill": [(1, "")]}
    _, ran = cluster(script, *arguments, "--", *TRAIN, answers=answers)
    looked = [call for call in ran if "describe" in call or any("kill -0" in word for word in call)]
    assert ran and commands_in(dry.stdout) == [call for call in ran if call not in looked]


DONE = {"kill -0": "kill", "archive": "archive", "tar xzf": "install", "setsid": "start", "tail -n": "tail"}
ONCE = ["kill", "archive", "scp", "install", "start", "tail"]  # whether a job runs already, and a new one


def words(calls):
    """The TPU script's calls in a word each: what ssh does on the workers, or gcloud's action."""
    return [next((word for text, word in DONE.items() if text in " ".join(call)), call[4]) for call in calls]


def test_a_tpu_slice_is_queued_installed_started_and_followed(cluster):
    states = [(1, ""), (0, "WAITING_FOR_RESOURCES"), (0, "ACTIVE")]
    answers = {"queued-resources describe": states, "--worker=0 --command=kill -0": [(1, "")]}
    process, calls = cluster("tpu/run.sh", *TPU, "--poll=0", "--delete", "--", *TRAIN, answers=answers)
    assert process.returncode == 0, process.stderr
    assert words(calls) == ["describe", "create", "describe", "describe", *ONCE, "delete"]
    assert {"--accelerator-type=v5litepod-16", "--spot", "--zone=us-west4-a"} <= set(calls[1])
    (command,) = [word for word in calls[8] if word.startswith("--command=")]
    assert "--worker=all" in calls[8]
    inner = shlex.split(command.split("bash -c ")[1])[0]
    assert shlex.split(inner.split(";")[0]) == [".venv/bin/python", "launch/train.py", *TRAIN, "--workdir=gs://b/sdxl"]


def test_a_slice_that_is_taken_away_is_queued_again_and_training_goes_on(cluster):
    states = [(0, "ACTIVE"), (0, "SUSPENDED"), (0, "SUSPENDED"), (1, ""), (0, "ACTIVE")]
    answers = {
        "queued-resources describe": states,
        "--worker=0 --command=kill -0": [(1, ""), (1, "")],
        TAIL: [(255, ""), (0, "")],
    }
    process, calls = cluster("tpu/run.sh", *TPU, "--poll=0", "--", *TRAIN, answers=answers)
    assert process.returncode == 0 and "waiting for another one" in process.stderr
    between = ["describe", "describe", "delete", "describe", "create", "describe"]
    assert words(calls) == ["describe", *ONCE, *between, *ONCE]
    started = [call for call, word in zip(calls, words(calls), strict=True) if word == "start"]
    assert started[0] == started[1]


@pytest.mark.parametrize("status", [1, 2])
def test_a_run_that_fails_on_a_healthy_slice_is_not_repeated(cluster, status):
    answers = {
        "queued-resources describe": [(0, "ACTIVE")] * 2,
        "--worker=0 --command=cd mlcm_jax && tail": [(status, "")],
    }
    process, calls = cluster("tpu/run.sh", *TPU, "--poll=0", "--", *TRAIN, answers=answers)
    assert process.returncode == status
    assert words(calls)[:3] == ["describe", "kill", "tail"], "the job of an earlier call is followed, not started anew"


def test_slurm_gets_one_task_a_gpu_and_the_flags_of_training(cluster, tmp_path):
    process, (call,) = cluster("slurm/run.sh", *SLURM, f"--workdir={tmp_path}/run", "--", *TRAIN)
    assert process.returncode == 0 and (tmp_path / "run").is_dir()
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--requeue", "--signal=B:TERM@300"} <= set(call)
    assert call[call.index("launch/slurm/job.sh") + 1 :] == [*TRAIN, f"--workdir={tmp_path}/run"]


@pytest.mark.parametrize(("status", "requeued"), [(1, True), (0, False)], ids=["saved", "finished"])
def test_a_slurm_job_that_is_stopped_queues_itself_again(cluster, tmp_path, status, requeued):
    """srun's stand-in says that it runs, and ends with ``status`` when it is told to stop."""
    cluster("slurm/run.sh", *SLURM, f"--workdir={tmp_path}", "--", *TRAIN)
    srun = ["#!/usr/bin/env bash", f"trap 'exit {status}' TERM", f"echo yes >{tmp_path}/running"]
    (cluster.programs / "srun").write_text("\n".join([*srun, "while :; do sleep 0.05; done", ""]))
    (cluster.programs / "srun").chmod(0o755)
    cluster.calls.write_text("")
    job = subprocess.Popen([ROOT / "launch" / "slurm" / "job.sh", *TRAIN], env=cluster.env | {"SLURM_JOB_ID": "7"})
    while not (tmp_path / "running").exists() or not (tmp_path / "running").read_text():
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == status
    assert cluster.calls.read_text().split() == (["scontrol", "requeue", "7"] if requeued else [])


@pytest.mark.parametrize(("arguments", "resource"), [(GKE_TPU, "google.com/tpu: 4"), (GKE_GPU, "nvidia.com/gpu: 8")])
def test_kubernetes_gets_a_jobset_of_all_hosts(cluster, arguments, resource):
    process, calls = cluster("gke/run.sh", *arguments, "--", *TRAIN)
    assert process.returncode == 0 and calls[0] == ["kubectl", "apply", "-f", "-"]
    job = yaml.safe_load(cluster.calls.read_text().split("\n", 1)[1])
    assert job["kind"] == "JobSet" and job["spec"]["failurePolicy"]["maxRestarts"] > 0
    hosts = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert hosts["completions"] == hosts["parallelism"] == 2 and hosts["completionMode"] == "Indexed"
    (container,) = hosts["template"]["spec"]["containers"]
    name, number = resource.split(": ")
    assert container["resources"] == {"limits": {name: int(number)}}
    command = shlex.split(container["args"][0])
    assert command[:5] == ["exec", "python", "launch/train.py", *TRAIN]
    told = ["--coordinator_address=sdxl-hosts-0-0.sdxl:8476", "--num_processes=2", "--process_id=$JOB_COMPLETION_INDEX"]
    assert command[6:] == (told if "gpu" in resource else [])
