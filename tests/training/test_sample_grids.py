"""The images of a run on its way."""

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
from small_runs import settings
from tiny_models import randomise

from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import load_pipeline
from mlcm_jax.hub.vae import load_vae
from mlcm_jax.images import image_grid
from mlcm_jax.sampling.conditioning import encode_prompts, unconditional
from mlcm_jax.sampling.decode import decode
from mlcm_jax.training.sample_grids import SampleGrids
from mlcm_jax.training.text_conditioning import Texts

LATENTS = np.random.default_rng(0).standard_normal((3, 1, 16, 16, 4), np.float32)


@pytest.fixture(scope="module")
def pipeline(sdxl_folder):
    return load_pipeline(sdxl_folder)


def viewer(pipeline, preview_vae, monkeypatch):
    """Of a run whose teacher and student draw LATENTS."""
    config = settings()
    config.sample.update({"preview_vae": str(preview_vae), "steps": (1, 2)})
    monkeypatch.setattr(SampleGrids, "reference", lambda self: LATENTS[0])
    monkeypatch.setattr(SampleGrids, "student", lambda self, state, num_steps: LATENTS[num_steps])
    program = SimpleNamespace(config=config, latent_shape=(16, 16, 4), image_size=(32, 32))
    texts = Texts(unconditional(pipeline, 1, 32), encode_prompts(pipeline, ["red heart"], 32))
    return SampleGrids(program, pipeline, texts)


def test_grids_on_the_way_come_from_the_preview_autoencoder(pipeline, tmp_path, monkeypatch):
    blocks = {f"num_{half}_blocks": (1, 1) for half in ("encoder", "decoder")}
    widths = {f"{half}_block_out_channels": (8, 8) for half in ("encoder", "decoder")}
    randomise(diffusers.AutoencoderTiny(**blocks, **widths), 5).save_pretrained(tmp_path)
    own = viewer(pipeline, "", monkeypatch).progress(None)
    preview = viewer(pipeline, tmp_path, monkeypatch).progress(None)
    tiny = load_vae(tmp_path, pipeline)
    for vae, grid in ((pipeline.vae, own), (tiny, preview)):
        expected = image_grid(np.concatenate([decode(vae, z) for z in LATENTS]), columns=1)
        assert np.abs(grid.astype(int) - expected).max() <= 2  # the preview computes in the run's dtype
    assert (own != preview).any()


def test_a_preview_that_is_no_autoencoder_is_refused_before_the_run(pipeline, monkeypatch):
    with pytest.raises(UserError, match="is a UNet2DConditionModel, no autoencoder"):
        viewer(pipeline, pipeline.folder / "unet", monkeypatch)
