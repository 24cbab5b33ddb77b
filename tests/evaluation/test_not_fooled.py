"""The metrics on the emoji teacher's own samples with the shipped networks: each gets worse when they are spoilt."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFilter

from mlcm_jax.data.prompts import read_prompts
from mlcm_jax.evaluation.extractors.registry import load_extractor
from mlcm_jax.evaluation.measure import Networks, Reference, figures, real_inputs, sampled_inputs
from mlcm_jax.evaluation.metrics.diversity import diversity
from mlcm_jax.evaluation.metrics.perceptual_distance import perceptual_distance
from mlcm_jax.evaluation.sampling import Sampler
from mlcm_jax.evaluation.statistics.bootstrap import Figure, mean_figure
from mlcm_jax.hub.pipeline import load_pipeline
from mlcm_jax.rewards.clip_features import image_features, load_clip_encoder
from mlcm_jax.rewards.clip_score import load_clip_score
from mlcm_jax.sampling.decode import decode, encode
from mlcm_jax.sampling.sample import latent_distance

EMOJI = Path(__file__).parents[2] / "examples" / "emoji"
pytestmark = pytest.mark.usefixtures("quick_programs")
N = 48
NUM_EXPLOITED = 16


@pytest.fixture(scope="module")
def prompts():
    return read_prompts(EMOJI / "prompts" / "eval.txt")[:N]


@pytest.fixture(scope="module")
def samples(prompts, quick_programs):
    """Images and latents by name: from the same noise with 4 and 6 steps, and from other noise with 4."""
    sampler = Sampler(load_pipeline(EMOJI / "teacher"), prompts, name="model", guidance_scale=1.5, batch_size=N)
    runs = {"few": (4, 0), "more": (6, 0), "other seed": (4, 1)}
    return {name: next(sampler.sample(steps, seeds=[seed], n=N)) for name, (steps, seed) in runs.items()}


@pytest.fixture(scope="module")
def clip():
    return load_clip_encoder(EMOJI / "scorer")


def blurred(images, radius):
    return np.stack([np.asarray(Image.fromarray(one).filter(ImageFilter.GaussianBlur(radius))) for one in images])


def all_equal(images):
    return np.repeat(images[:1], len(images), axis=0)


def shuffled(array):
    """No example stays in its place."""
    return np.roll(array, 7, axis=0)


@pytest.mark.parametrize("model", ["scorer", "guard"])
def test_clip_score(model, samples, prompts):
    score, images = load_clip_score(EMOJI / model), samples["few"].images
    right = score(images, prompts)
    for spoilt in (blurred(images, 2), shuffled(images), all_equal(images)):
        assert mean_figure(score(spoilt, prompts) - right).interval[1] < 0


def test_sets(samples, prompts, clip):
    """Against images of the same prompts from other noise, as a model is measured against real ones."""
    networks = Networks(clip, {}, {"clip": load_extractor("clip", str(EMOJI / "scorer"))})
    real = networks.measure(real_inputs([samples["other seed"].images]))
    images = samples["few"].images

    def of(changed):
        batch = [dataclasses.replace(samples["few"], images=changed)]
        measured = networks.measure(sampled_inputs(batch, prompts, None))
        found = figures(measured, real, None, networks, data_matches_prompts=True, num_resamples=50)
        return {column.key.partition("/")[0]: figure for column, figure in found.items()}

    clean, soft, equal = of(images), of(blurred(images, 4)), of(all_equal(images))
    for distance in ("frechet_distance", "kernel_distance"):
        for spoilt in (soft, equal):
            worse = Figure(
                spoilt[distance].value - clean[distance].value, spoilt[distance].replicates - clean[distance].replicates
            )
            assert worse.interval[0] > 0
    blob = of(blurred(images, 12))  # among so few images the neighbours are far: precision forgives much
    assert clean["precision"].value > blob["precision"].value
    assert clean["recall"].value > soft["recall"].value > equal["recall"].value == 0
    low, high = clean["frechet_distance"].interval
    assert low < clean["frechet_distance"].value < high


def test_a_reward_model_that_is_exploited(samples, prompts, efficientnet_folder):
    """Images whose latents follow the score of the shipped scorer, beside their way through the autoencoder alone.

    After two small steps both CLIPs like them better, and independent features see that they are worse; after more,
    pixel figures see the noise, too."""
    real, prompts = samples["more"].images[:NUM_EXPLOITED], prompts[:NUM_EXPLOITED]
    vae, model = load_pipeline(EMOJI / "teacher").vae, load_clip_score(EMOJI / "scorer")
    tokens, start = model.tokenize(prompts), encode(vae, real)

    @jax.jit
    @jax.grad
    def gradient(latents):
        scaled = latents / vae.config["scaling_factor"]
        images = vae.module.apply({"params": vae.params}, scaled, method="decode")
        return model.reward(model.params, images, tokens).sum()

    def follow(latents, steps, size):
        for _ in range(steps):
            latents = latents + size * jnp.sign(gradient(latents))
        return latents

    little = follow(jnp.asarray(start), steps=2, size=0.02)
    clean, exploited, spoilt = (decode(vae, z) for z in (jnp.asarray(start), little, follow(little, 3, 0.08)))
    for name in ("scorer", "guard"):
        score = load_clip_score(EMOJI / name)
        assert mean_figure(score(exploited, prompts) - score(clean, prompts)).interval[0] > 0, name

    extractors = {"efficientnet": load_extractor("efficientnet", str(efficientnet_folder))}
    networks = Networks(load_clip_encoder(EMOJI / "scorer"), {}, extractors)
    reference = networks.measure(real_inputs([real]))

    def of(images):
        measured = networks.measure(real_inputs([images]))
        found = figures(measured, reference, None, networks, data_matches_prompts=True, num_resamples=50)
        return {column.key: figure for column, figure in found.items()}

    good, worse, worst = of(clean), of(exploited), of(spoilt)
    worse_by = {"frechet_distance/efficientnet/data": worse, "noise_level/pixels/data": worst}
    for name, bad in (worse_by | {"background_noise/pixels/data": worst}).items():
        difference = Figure(bad[name].value - good[name].value, bad[name].replicates - good[name].replicates)
        assert difference.interval[0] > 0, name


def test_distances_image_by_image(samples, clip):
    few, reference = samples["few"], Reference.of([samples["more"]])
    near = latent_distance(few.latents, reference.latents)
    assert near.mean() < 0.3 * latent_distance(shuffled(few.latents), reference.latents).mean()
    near = perceptual_distance(clip, few.images, reference.images)
    assert near.mean() < 0.5 * perceptual_distance(clip, shuffled(few.images), reference.images).mean()
    assert near.mean() < perceptual_distance(clip, all_equal(few.images), reference.images).mean()
    softness = [perceptual_distance(clip, blurred(few.images, r), few.images).mean() for r in (0.5, 1, 2)]
    assert 0 < softness[0] < softness[1] < softness[2]


def test_diversity(samples, clip):
    features = [image_features(clip, samples[name].images) for name in ("few", "other seed")]
    across = diversity(np.stack(features)).mean()
    np.testing.assert_allclose(diversity(np.stack([features[0], features[0]])), 0, atol=1e-6)
    # The teacher has its training images by heart: other seeds change little, other captions much.
    mixed = diversity(np.stack([features[0], shuffled(features[1])])).mean()
    assert 0 < 5 * across < mixed
    soft = [image_features(clip, blurred(samples[name].images, 4)) for name in ("few", "other seed")]
    assert diversity(np.stack([soft[0], shuffled(soft[1])])).mean() < mixed
