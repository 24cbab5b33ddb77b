"""The programs that train the emoji teacher: each recipe's update, and all of them in turn on made-up images."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "emoji"
sys.path.insert(0, str(EXAMPLE))

import edges  # noqa: E402
import recipe  # noqa: E402
from emoji_dataset import dataset, names, sources  # noqa: E402
from training import run, start  # noqa: E402

from mlcm_jax.training.metrics import read_metrics  # noqa: E402

NUM_NAMES = 450  # enough for 64 held-out images, which the programs measure at a time


@pytest.mark.parametrize("training", ["AUTOENCODER", "CLIP", "CHINESE", "PEA", "UNET", "CONTROLNET"])
def test_each_recipe_lowers_a_loss(training: str, tmp_path: Path):
    config = getattr(recipe, training).copy_and_resolve_references().unlock()
    config.update(num_steps=5, log_every=1)
    state, step = start({"w": jnp.ones((2, 2))}, lambda params, batch, key: (jnp.square(params["w"]).sum(), {}), config)
    state = run(state, step, lambda number: None, config, tmp_path)
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(losses) == 5 and losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert state.ema is not None
    assert float(state.params["w"].max()) < float(state.ema["w"].max()) < 1.0


def test_curves(tmp_path: Path):
    command = [
        sys.executable,
        EXAMPLE / "curves.py",
        *(f"--{name}={tmp_path}" for name in ("autoencoder", "clip", "unet")),
    ]
    command += [f"--out={tmp_path / 'curves.png'}"]
    missing = subprocess.run(command, capture_output=True, text=True)
    assert missing.returncode == 2 and "metrics.jsonl does not exist" in missing.stderr

    rows = [{"step": 20 * i, "loss": 3.0 / i, "psnr": 10.0 * i} for i in (1, 2, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.asarray(Image.open(tmp_path / "curves.png").convert("L")).std() > 1


def made_up_packages(folder: Path) -> Path:
    """Packages as build_data.py unpacks them, of plain coloured squares."""
    entries = [
        {"name": f"thing {i}", "unified": f"{0xF0000 + i:X}", "category": "Any", "subcategory": "any"}
        for i in range(NUM_NAMES)
    ]
    for source in sources.SOURCES:
        images = folder / source.stem / "package" / source.images
        images.mkdir(parents=True)
        for i, entry in enumerate(entries):
            colour = tuple(int(v) for v in np.random.default_rng(i).integers(0, 256, 3))
            ending = ".webp" if source.style == "fluent" else ".png"
            Image.new("RGB", (64, 64), colour).save(images / f"{entry['unified'].lower()}{ending}")
    sources.names_file(folder).write_text(json.dumps(entries))
    return folder


def train(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLE / f"{program}.py", *arguments, "--config.batch_size=4"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_moved_images_and_how_well_edges_agree():
    image = np.full((1, 64, 64, 3), 255, np.uint8)
    image[:, 20:40, 10:50] = (0, 0, 200)
    moved = edges.moved(np.repeat(image, 20, axis=0), np.random.default_rng(0))
    sizes = (moved[..., 0] == 0).sum(axis=(1, 2))
    assert sizes.min() < 0.7 * 800 and sizes.max() <= 800, "as large or smaller"
    assert len({one.tobytes() for one in moved}) > 15
    own = edges.edges_of(image)
    for shift, expected in ((0, 1.0), (1, 1.0), (3, 0.4)):
        found = edges.agreement(np.roll(image, shift, axis=2), own)[0]
        assert found == 1.0 if expected == 1.0 else expected < found < 0.9
    assert edges.agreement(np.full_like(image, 255), own)[0] == 0.0


@pytest.mark.slow  # compiles four trainings and a sampler: five minutes on one core
def test_the_programs_in_turn_leave_a_pipeline(tmp_path: Path):
    import torch
    from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline, StableDiffusionXLPipeline

    dataset.build(tmp_path / "data", made_up_packages(tmp_path / "packages"))
    assert sum(names.is_held_out(f"thing {i}") for i in range(NUM_NAMES)) * 3 >= 64
    data, teacher = f"--data_dir={tmp_path}/data", tmp_path / "teacher"

    out = train("train_autoencoder", data, f"--workdir={tmp_path}/ae", f"--out={teacher}/vae", "--config.num_steps=2")
    assert json.loads(out.splitlines()[-1])["images"] >= 64
    train(
        "train_clip", data, f"--workdir={tmp_path}/clip", f"--out={teacher}", f"--scorer={tmp_path}/scorer",
        "--config.num_steps=2",
    )  # fmt: skip
    train(
        "train_unet", data, f"--workdir={tmp_path}/unet", f"--teacher={teacher}", f"--out={tmp_path}/finished",
        "--config.num_steps=2",
    )  # fmt: skip
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        tmp_path / "finished", torch_dtype=torch.float32, add_watermarker=False
    )
    image = np.asarray(pipeline("red heart", num_inference_steps=2, height=64, width=64).images[0])
    assert image.shape == (64, 64, 3) and image.std() > 0

    train(
        "train_controlnet", data, f"--teacher={tmp_path}/finished", f"--workdir={tmp_path}/control",
        f"--out={tmp_path}/controlnet", "--config.num_steps=2",
    )  # fmt: skip
    controlnet = ControlNetModel.from_pretrained(tmp_path / "controlnet", torch_dtype=torch.float32)
    controlled = StableDiffusionXLControlNetPipeline.from_pipe(pipeline, controlnet=controlnet)
    settings = {"num_inference_steps": 2, "height": 64, "width": 64}
    image = np.asarray(controlled("red heart", image=Image.new("RGB", (64, 64)), **settings).images[0])
    assert image.shape == (64, 64, 3) and image.std() > 0
