"""Image features against transformers' own image processor and CLIPModel."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_weights import assert_close, randomise
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from mlcm_jax.errors import UserError
from mlcm_jax.hub.preprocess import Preprocessor
from mlcm_jax.rewards import clip_features
from mlcm_jax.rewards.clip_features import image_features, load_clip_encoder

TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = TOWER | {"vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
CONFIG = {"text_config": TEXT, "vision_config": TOWER | {"image_size": 32, "patch_size": 8}, "projection_dim": 12}
SQUARE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


def images(n=5, height=48, width=48):
    """Smooth colours with noise on top, so that filters and crops show."""
    y, x = np.mgrid[0:height, 0:width]
    rng = np.random.default_rng(0)
    base = np.stack([np.sin(y / 9), np.cos(x / 7), np.sin((x + y) / 5)], axis=-1) * 90 + 128
    return np.clip(base + rng.normal(size=(n, height, width, 3)) * 30, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def torch_model():
    return randomise(CLIPModel(CLIPConfig(**CONFIG)), 0)


@pytest.fixture
def clip_folder(torch_model, tmp_path):
    torch_model.save_pretrained(tmp_path)
    CLIPImageProcessorPil(**SQUARE).save_pretrained(tmp_path)
    return tmp_path


PREPROCESSORS = {
    "square": SQUARE,
    "bilinear": SQUARE | {"resample": 2},
    "other statistics": SQUARE | {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]},
    "crop of a larger": {"size": {"shortest_edge": 45}, "crop_size": {"height": 32, "width": 32}},
    "enlarged": {"size": {"shortest_edge": 71}, "crop_size": {"height": 64, "width": 50}},
    "squeezed": {"size": {"height": 32, "width": 24}, "do_center_crop": False},
    "cropped only": {"do_resize": False, "crop_size": {"height": 31, "width": 20}},
}


@pytest.mark.parametrize("shape", [(48, 48), (40, 61), (61, 40)])
@pytest.mark.parametrize("case", PREPROCESSORS)
def test_preprocessor(case, shape, tmp_path):
    processor = CLIPImageProcessorPil(**PREPROCESSORS[case])
    processor.save_pretrained(tmp_path)
    x = images(2, *shape)
    want = processor(list(x), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    got = Preprocessor.from_folder(tmp_path)(x)
    assert got.dtype == np.float32 and got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("shape", [(48, 48), (40, 61), (61, 40)])
@pytest.mark.parametrize("case", PREPROCESSORS)
def test_differentiable_preprocessor(case, shape, tmp_path):
    """Within the rounding to 8 bits that PIL does after each direction."""
    CLIPImageProcessorPil(**PREPROCESSORS[case]).save_pretrained(tmp_path)
    preprocessor, x = Preprocessor.from_folder(tmp_path), images(2, *shape)
    got = preprocessor.differentiable(jnp.asarray(x / 127.5 - 1))
    assert got.shape == preprocessor(x).shape
    assert (np.abs(got - preprocessor(x)) * np.asarray(preprocessor.std)).max() <= 2 / 255


def test_filters_that_jax_lacks(tmp_path):
    CLIPImageProcessorPil(**SQUARE | {"resample": 4}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="resample=4: use"):
        Preprocessor.from_folder(tmp_path).differentiable(jnp.zeros((1, 48, 48, 3)))


def test_sizes_as_old_files_write_them(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32}))
    old = Preprocessor.from_folder(tmp_path)
    path.write_text(json.dumps(SQUARE))
    assert old == Preprocessor.from_folder(tmp_path)


@pytest.mark.parametrize("n", [3, 4, 9])
def test_features(n, torch_model, clip_folder, monkeypatch):
    """Fewer, as many and more images than are encoded at a time."""
    monkeypatch.setattr(clip_features, "CHUNK", 4)
    x = images(n)
    inputs = CLIPImageProcessorPil(**SQUARE)(list(x), return_tensors="pt")
    with torch.no_grad():
        want = torch_model.get_image_features(**inputs).pooler_output.numpy()
    got = image_features(load_clip_encoder(clip_folder), x)
    assert got.shape == (n, 12) and got.dtype == np.float32
    assert_close(got, want)
    assert np.abs(got[0] - got[1]).max() > 1e-3 * np.abs(want).max()


def edit(folder, **entries):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


UNFIT = {
    "key": ({"patch_crop": 1}, "CLIPImageProcessor's preprocessor_config.json has keys .* patch_crop"),
    "value": ({"do_normalize": False}, "preprocessor_config.json has do_normalize=False, which is not supported"),
    "size": ({"size": {"longest_edge": 32}}, "size=.* which is not supported"),
    "other size": ({"size": {"shortest_edge": 24}, "do_center_crop": False}, "24 x 24 pixels, but the CLIP takes 32"),
    "crop": (
        {"do_resize": False, "crop_size": 64},
        "48 x 48 pixels are smaller than the .* crop of 64 x 64",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_unfit_preprocessors(case, clip_folder):
    entries, message = UNFIT[case]
    edit(clip_folder, **entries)
    with pytest.raises(UserError, match=message):
        image_features(load_clip_encoder(clip_folder), images(2))


def test_no_preprocessor(clip_folder):
    (clip_folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json does not exist"):
        load_clip_encoder(clip_folder)
