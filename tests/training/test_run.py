"""The programs in processes of their own: killed and resumed runs, and exports as stock diffusers draws them."""

import json
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from programs import PROMPT, Programs, losses, saved_steps, signal_after

from mlcm_jax.training.checkpoint import read_trained
from mlcm_jax.training.metrics import read_metrics
from mlcm_jax.training.program import build_program
from mlcm_jax.training.resume import read_settings
from mlcm_jax.training.run import describe_teacher, load_teacher, starting_weights

NUM_STEPS = 12
STEPS = [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3)), 4]
STEPS += [pytest.param(n, marks=pytest.mark.slow) for n in (5, 6, 7, 8)]


@pytest.fixture(scope="module")
def programs(smallest_folder, tmp_path_factory):
    return Programs(tmp_path_factory.mktemp("programs"), smallest_folder)


@pytest.fixture(scope="module")
def finished(programs):
    """(workdir, stdout, stderr) of an uninterrupted run."""
    workdir = programs.folder / "finished"
    return workdir, *programs.run("train", *programs.train_args(workdir))


@pytest.fixture(scope="module")
def latents(programs):
    path = programs.folder / "latents.npy"
    np.save(path, np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32))
    return path


def test_a_run_says_what_it_does_and_leaves_all_its_files(finished):
    workdir, out, err = finished
    lines = out.splitlines()
    assert lines[0].split() == ["processes", "1:", "no", "cluster", "detected"]
    plan = ["teacher", "training", "devices", "images", "stage", "memory"]
    assert [line.split()[0] for line in lines[1:7]] == plan
    assert "1 x cpu, mesh data 1 x fsdp 1 x tensor 1" in out and "32 x 32 px" in out
    assert lines[7].startswith("  compiled  stage 1 after ") and lines[7].endswith(" temporaries)")
    assert lines[8:] == [f"The student is in {workdir / 'export'}, its images are in {workdir / 'samples'}."]
    bar = err.replace("\r", "\n").strip().splitlines()
    bar = [line for line in bar if "Waiting for previous save" not in line]  # orbax, on a busy machine
    assert f"{NUM_STEPS}/{NUM_STEPS}" in bar[-1] and "loss=" in bar[-1] and "examples_per_s=" in bar[-1]
    assert all("step" in line for line in bar if line.strip()), "nothing but the progress bar is on stderr"
    assert [step for step, *_ in losses(workdir)] == list(range(1, NUM_STEPS + 1))
    assert len({loss for _, loss, _ in losses(workdir)}) == NUM_STEPS
    lines = read_metrics(workdir / "metrics.jsonl")
    assert all(line["param_norm"] > 0 and line["learning_rate"] >= 0 for line in lines)
    speeds = ("examples_per_second", "tflops_per_second", "data_wait_seconds")
    assert not set(speeds) & set(lines[0]), "the first step also sets things up"
    assert all(line[name] > 0 for line in lines[1:] for name in speeds)
    assert saved_steps(workdir) == [10, 12]
    images = {p.name for p in (workdir / "samples").iterdir()}
    assert images == {"final.png", "closeness.png", "loss.png", f"step_{NUM_STEPS:06d}.png"}
    (distances,) = json.loads((workdir / "results.json").read_text()).values()
    assert set(distances["student"]) == {"1", "4"} and all(v > 0 for v in distances["student"].values())
    assert any((workdir / "tb").iterdir())
    assert (workdir / "export" / "model_index.json").is_file()


def test_killed_and_preempted_runs_go_on_as_if_nothing_had_happened(programs, finished):
    workdir = programs.folder / "interrupted"
    args = programs.train_args(workdir)
    metrics = workdir / "metrics.jsonl"

    process = programs.start("train", *args)
    signal_after(process, metrics, 7, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    killed_at = losses(workdir)[-1][0]
    assert 7 <= killed_at < NUM_STEPS and saved_steps(workdir)[-1] < killed_at, "there are steps to repeat"

    process = programs.start("train", *args)
    signal_after(process, metrics, killed_at + 1, signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode not in (0, -signal.SIGTERM)
    stopped_at = saved_steps(workdir)[-1]
    assert f"Stopped by a signal at step {stopped_at}: run the same command to go on." in err
    assert stopped_at == losses(workdir)[-1][0] and "Traceback" not in err

    out, _ = programs.run("train", *args)
    assert "The student is in" in out
    assert losses(workdir) == losses(finished[0])  # every step once, and to the bit
    for name in ("unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
        assert (workdir / "export" / name).read_bytes() == (finished[0] / "export" / name).read_bytes()


def test_steps_are_compiled_without_weights_and_nothing_is_trained(programs):
    bare = programs.folder / "bare"
    shutil.copytree(programs.teacher, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    workdir = programs.folder / "not_started"
    settings = {"teacher": bare, "stages": '({"start": 6, "num_segments": 2},)'}
    out, _ = programs.run("train", *programs.train_args(workdir, **settings), "--compile_only")
    assert "compiled  stages 1, 2 after " in out.splitlines()[-1], "one program serves both"
    assert not workdir.exists()


def test_other_settings_in_the_same_workdir_are_refused(programs, finished):
    process = programs.start("train", *programs.train_args(finished[0], num_segments=2))
    out, err = process.communicate(timeout=600)
    assert process.returncode == 2 and out == " processes  1: no cluster detected\n"
    assert err.startswith(f"error: {finished[0]} holds a run with other settings (num_segments)")


def test_text_states_give_the_same_losses_without_text_encoders(programs, finished):
    states, workdir = programs.folder / "states", programs.folder / "from_states"
    texts = [f"--prompts={programs.folder / 'prompts.txt'}", f"--sample_prompts={programs.folder / 'grid.txt'}"]
    programs.run("encode", f"--model={programs.teacher}", *texts, "--text_only", f"--out={states}")
    programs.run("train", *programs.train_args(workdir, text_states=states))
    np.testing.assert_allclose(losses(workdir), losses(finished[0]), rtol=1e-3)  # states round otherwise


@pytest.fixture(scope="module")
def stock(finished):
    """Stock diffusers' pipeline of the export, in float32."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(finished[0] / "export", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, latents: Path, num_steps: int) -> np.ndarray:
    """Stock diffusers' image, uint8 [H, W, 3]."""
    import torch

    noise = torch.from_numpy(np.load(latents))
    images = pipe(PROMPT, latents=noise, guidance_scale=0, num_inference_steps=num_steps, output_type="np").images
    return np.round(images[0] * 255).astype(np.uint8)


def assert_same_image(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape == (32, 32, 3) and theirs.std() > 5
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 2


@pytest.mark.parametrize("num_steps", STEPS)
def test_stock_diffusers_draws_the_same_images(programs, finished, stock, latents, num_steps):
    ours = programs.sample(finished[0] / "export", latents, num_steps)
    assert_same_image(ours, draw(stock, latents, num_steps))


TARGETS = ("/to_(q|k|v|out_0)$", "/proj_(in|out)$", "/ff/net_2$", "/conv[12]$", "/time_emb_proj$")
LORA = {"trainable": "lora", "lora.rank": 4, "lora.alpha": 8.0, "lora.targets": TARGETS, "ema_decay": 0.0}
LORA |= {"optim.learning_rate": 0.05, "optim.schedule": "constant", "optim.warmup_steps": 0}


@pytest.fixture(scope="module")
def lora_run(programs):
    """A LoRA run of few steps: its workdir, with the merged student in export/."""
    workdir = programs.folder / "lora_run"
    programs.run("train", *programs.train_args(workdir, **LORA, num_steps=4), "--profile_steps=2:4")
    return workdir


def exported(programs, workdir: Path, form: str) -> Path:
    out = workdir / form
    programs.run("export", f"--workdir={workdir}", f"--format={form}", f"--out={out}", "--dtype=float32")
    return out


def test_steps_are_traced(lora_run):
    (trace,) = (lora_run / "profile").rglob("*.xplane.pb")
    assert trace.read_bytes().count(b"jit_train_step") > 0


# diffusers reads the same adapters from both namings: tests/hub/test_lora_file.py::test_kohya
@pytest.mark.parametrize("form", ["lora", pytest.param("kohya", marks=pytest.mark.slow)])
def test_diffusers_loads_the_lora_on_the_teacher(programs, lora_run, latents, form):
    import torch
    from diffusers import StableDiffusionXLPipeline, TCDScheduler

    lora = exported(programs, lora_run, form)
    pipe = StableDiffusionXLPipeline.from_pretrained(programs.teacher, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = TCDScheduler.from_config(json.loads((lora / "scheduler_config.json").read_text()))
    without = draw(pipe, latents, 4)
    pipe.load_lora_weights(lora)
    theirs = draw(pipe, latents, 4)
    assert np.abs(theirs.astype(int) - without).max() > 10, "the LoRA changes too little to be compared"
    assert_same_image(programs.sample(lora_run / "export", latents, 4), theirs)


def test_a_single_file_draws_the_same_images(programs, lora_run, latents):
    """The sampler beside it, with the teacher's settings and tokenizers."""
    file = exported(programs, lora_run, "single_file") / "model.safetensors"
    ours = programs.sample(file, latents, 4, f"--architecture={programs.teacher}")
    assert_same_image(ours, programs.sample(lora_run / "export", latents, 4))


def test_a_run_starts_from_a_lora_to_the_bit(programs, lora_run):
    """Its alpha is in what the file holds, and taken out again."""
    config = read_settings(lora_run)
    config.lora.start = str(exported(programs, lora_run, "lora"))
    program = build_program(config, describe_teacher(config, weights_needed=True), jax.devices()[:1])
    start = starting_weights(program, load_teacher(program, jnp.float32, with_text=False))
    newest = read_trained(lora_run / "checkpoints", SingleDeviceSharding(jax.devices()[0]))
    assert newest is not None
    _, kept = newest
    jax.tree.map(np.testing.assert_array_equal, start, kept)


@pytest.mark.slow  # the weights that it starts from are those of the test before
def test_a_run_goes_on_from_a_lora(programs, lora_run, latents):
    """A step of next to nothing leaves it what it was, its alpha included."""
    workdir, lora = programs.folder / "started", exported(programs, lora_run, "lora")
    settings = LORA | {"lora.start": lora, "num_steps": 1, "optim.learning_rate": 1e-9}
    programs.run("train", *programs.train_args(workdir, **settings))
    before, after = (programs.sample(run / "export", latents, 4) for run in (lora_run, workdir))
    assert_same_image(after, before)
