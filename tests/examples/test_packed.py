"""The denoiser's training from one packed file: its schedule, its batches, and the whole of it in small."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import load_network
from mlcm_jax.models.attention_backend import XLA

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "emoji"
sys.path.insert(0, str(EXAMPLE))

import denoiser  # noqa: E402
import packed_figures  # noqa: E402
import recipe  # noqa: E402
import train_packed  # noqa: E402
from batches import row_weights  # noqa: E402
from packed import MAX_BYTES, Packed, fingerprint, load_packed, save_packed  # noqa: E402


def made_up(num_rows: int = 12) -> Packed:
    """A packed file's content for the shipped teacher."""
    rng = np.random.default_rng(0)
    captions = [f"thing {i}, noto style" for i in range(num_rows)]
    latents = rng.normal(size=(num_rows, 16, 16, 4)).astype(np.float16)
    real = rng.integers(0, 256, (8, 64, 64, 3), np.uint8)
    weights = np.full(num_rows, 1 / num_rows, np.float32)
    vae = fingerprint(EXAMPLE / "teacher" / "vae")
    return Packed(latents, captions, weights, latents[:4], captions[:4], real, captions[:8], vae)


def test_a_packed_file_comes_back(tmp_path: Path):
    packed = made_up()
    size = save_packed(packed, tmp_path / "packed.safetensors")
    assert size == (tmp_path / "packed.safetensors").stat().st_size
    back = load_packed(tmp_path / "packed.safetensors")
    np.testing.assert_array_equal(back.latents, packed.latents)
    np.testing.assert_array_equal(back.real, packed.real)
    assert (back.captions, back.real_captions, back.vae) == (packed.captions, packed.real_captions, packed.vae)


def test_a_packed_file_has_a_size_limit(tmp_path: Path):
    rows = MAX_BYTES // (16 * 16 * 4 * 2) + 1
    packed = Packed(**{**vars(made_up()), "latents": np.zeros((rows, 16, 16, 4), np.float16)})
    with pytest.raises(UserError, match="lower --num_real"):
        save_packed(packed, tmp_path / "packed.safetensors")
    assert not list(tmp_path.iterdir())


def test_another_file_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"pack\.py"):
        load_packed(tmp_path / "missing")
    with pytest.raises(UserError, match="was not written by"):
        load_packed(EXAMPLE / "teacher" / "vae" / "diffusion_pytorch_model.safetensors")


def test_the_rate_goes_by_the_clock():
    config = recipe.UNET_PACKED
    late = 10 * config.warmup_steps

    def rate(step, fraction):
        return train_packed.learning_rate(config, step, fraction)

    warm = rate(np.arange(config.warmup_steps), 0.0)
    assert (np.diff(warm) > 0).all() and warm[-1] == np.float32(config.learning_rate)
    assert rate(late, 0.0) == rate(late, config.hold) == np.float32(config.learning_rate)
    half = (1 + config.hold) / 2
    assert rate(late, half) == pytest.approx(config.learning_rate / 2)
    assert rate(late, 1.0) == rate(late, 1.5) == 0.0
    assert rate(0, half) < rate(late, half)


def test_the_average_spans_examples_not_steps():
    config = recipe.UNET_PACKED
    late = int(config.ema_halflife / config.ema_rampup) // config.batch_size + 1  # past the ramp
    steps = config.ema_halflife / config.batch_size
    assert float(train_packed.ema_decay(config, late)) ** steps == pytest.approx(0.5, rel=1e-3)
    assert float(train_packed.ema_decay(config, 0)) < 0.01  # the first weights are forgotten at once


def test_rows_follow_their_weights():
    names = ["a", "a", "a", "b", "c"]
    weights = row_weights({"name": names, "style": ["noto"] * 5})
    cumulative = np.cumsum(weights).astype(np.float32)
    draw = jax.jit(lambda key: train_packed.draw_rows(cumulative, key, 64))
    rows = np.concatenate([draw(jax.random.key(i)) for i in range(100)])
    np.testing.assert_allclose(np.bincount(rows, minlength=5) / len(rows), weights, atol=0.02)
    np.testing.assert_array_equal(draw(jax.random.key(3)), draw(jax.random.key(3)))
    assert (np.asarray(draw(jax.random.key(3))) != draw(jax.random.key(4))).any()


@pytest.fixture
def small(monkeypatch):
    """The shipped teacher's parts around a UNet of one level, and a recipe for it."""
    unet = {
        **recipe.UNET_CONFIG,
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["UpBlock2D"],
        "block_out_channels": [16],
        "transformer_layers_per_block": [1],
        "attention_head_dim": [1],
        "projection_class_embeddings_input_dim": 320,
        "norm_num_groups": 4,
    }
    monkeypatch.setattr(denoiser, "UNET_CONFIG", unet)
    config = recipe.UNET_PACKED.copy_and_resolve_references()
    config.update(batch_size=4, steps_per_call=2)
    return denoiser.load_parts(EXAMPLE / "teacher", attention=XLA), config


def test_a_training_in_small(small, tmp_path: Path):
    pipeline, config = small
    params = train_packed.train_packed(pipeline, made_up(), config, tmp_path, 0.005)
    saved = load_network(tmp_path / "unet", "UNet2DConditionModel").params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), params, saved)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["examples"] == 4 * last["step"] > 0
    assert all(np.isfinite(last[name]) for name in ("train_loss", "train_probe", "heldout_probe", "tflops_per_second"))


def test_the_last_minutes_weights_are_kept(tmp_path: Path):
    progress = train_packed.Progress(tmp_path, recipe.UNET_PACKED, {"_class_name": "any"}, 1.0, lambda params: {})
    for minute in range(1, 5):
        weights = {"conv_in": {"bias": np.full(3, minute, np.float32)}}
        progress.save(SimpleNamespace(ema=weights), minute)  # pyright: ignore[reportArgumentType]
    files = sorted(tmp_path.glob("unet_minute_*.safetensors"))
    assert [file.name for file in files] == ["unet_minute_003.safetensors", "unet_minute_004.safetensors"]
    newest = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    for file, minute in zip((*files, newest), (3, 4, 4), strict=True):
        np.testing.assert_array_equal(load_file(file)["conv_in.bias"], np.full(3, minute, np.float16))


def test_a_signal_ends_it_with_weights(small, tmp_path: Path, monkeypatch):
    def finished(self, state, *_, last=False):
        os.kill(os.getpid(), signal.SIGTERM)
        if last:
            self.save(state, minute=None)

    monkeypatch.setattr(train_packed.Progress, "finished", finished)
    pipeline, config = small
    with pytest.raises(SystemExit, match="Stopped by a signal at step 4"):
        train_packed.train_packed(pipeline, made_up(), config, tmp_path, 60)
    assert load_network(tmp_path / "unet", "UNet2DConditionModel").params


def test_figures_of_samples(tmp_path: Path, monkeypatch):
    packed, asked = made_up(), []

    def draw(pipeline, prompts, guidance_scale):
        asked.append((len(prompts), guidance_scale))
        return np.concatenate([packed.real, np.zeros((len(prompts) - 8, 64, 64, 3), np.uint8)])

    monkeypatch.setattr(packed_figures, "draw", draw)
    scorer = str(EXAMPLE / "scorer")
    packed_figures.measure(
        None, packed, tmp_path, num_images=8, scorers={"clip-own": scorer}, features={"clip": scorer}
    )  # pyright: ignore[reportArgumentType]
    assert asked == [(8 + 16, 3.0), (8 + 16, 5.0)]
    row = json.loads((tmp_path / "figures.json").read_text())["figures"][0]
    assert -1 < row["clip-own_score"]["value"] < 1
    assert row["frechet_distance/clip"]["value"] == pytest.approx(0, abs=1e-6)  # the real images themselves
    assert Image.open(tmp_path / "grid.png").width == 8 * 66 - 2


SETTINGS = ("--batch_size=4", "--steps_per_call=1", "--dtype=float32", "--num_images=8")


@pytest.mark.slow  # compiles the whole UNet's training and sampling: two minutes on one core
def test_trains_from_a_packed_file(tmp_path: Path):
    save_packed(made_up(), tmp_path / "packed.safetensors")
    packed, out = f"--packed={tmp_path / 'packed.safetensors'}", tmp_path / "out"
    # What a GPU machine need not have.
    missing = ("tensorflow_datasets", "array_record", "emoji", "grain")
    run = f"import runpy, sys; sys.modules.update(dict.fromkeys({missing})); "
    run += f"sys.argv = sys.argv[1:]; sys.path.insert(0, {str(EXAMPLE)!r}); "
    run += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", run, str(EXAMPLE / "train_unet.py"), *SETTINGS]
    done = subprocess.run([*command, packed, "--minutes=0.02", f"--out={out}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    weights = out / "unet" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 16_000_000
    module = load_network(out / "unet", "UNet2DConditionModel")
    shipped = load_network(EXAMPLE / "teacher" / "unet", "UNet2DConditionModel")
    assert jax.tree.map(np.shape, module.params) == jax.tree.map(np.shape, shipped.params)
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["examples"] == 4 * last["step"] > 0
    assert all(np.isfinite(last[name]) for name in ("train_loss", "train_probe", "heldout_probe", "tflops_per_second"))
    figures = json.loads((out / "figures.json").read_text())["figures"]
    assert [row["guidance_scale"] for row in figures] == [3.0, 5.0]
    assert all({"clip_score", "clip-guard_score", "frechet_distance/clip"} <= row.keys() for row in figures)
    assert np.asarray(Image.open(out / "grid.png")).std() > 0


def test_mistakes_are_reported(launch, tmp_path: Path):
    def refused(*args: str) -> str:
        result = launch("../examples/emoji/train_unet", *SETTINGS, *args)
        assert result["status"] == 2
        return result["stderr"]

    assert "either --data_dir" in refused(f"--out={tmp_path}")
    save_packed(Packed(**{**vars(made_up()), "vae": "another"}), tmp_path / "packed.safetensors")
    other = refused(f"--packed={tmp_path / 'packed.safetensors'}", f"--out={tmp_path / 'out'}")
    assert "another autoencoder" in other
