"""The metrics on the emoji teacher's own pictures with the shipped judges: each gets worse when they are spoilt."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFilter

from mlcm_jax.data.prompts import read_prompts
from mlcm_jax.evaluation.diversity import diversity
from mlcm_jax.evaluation.extractors import Extractor
from mlcm_jax.evaluation.measure import Figure, Judges, Reference, Seen, figures, look, mean_figure
from mlcm_jax.evaluation.perceptual import perceptual_distance
from mlcm_jax.evaluation.sampling import Artist
from mlcm_jax.hub.pipeline import load_pipeline
from mlcm_jax.rewards.clip_features import image_features, load_scorer_once
from mlcm_jax.rewards.pick_score import load_similarity
from mlcm_jax.rewards.registry import load_clip_score
from mlcm_jax.sampling.decode import decode, encode
from mlcm_jax.sampling.sample import latent_distance

EMOJI = Path(__file__).parents[2] / "examples" / "emoji"
N = 48
NUM_EXPLOITED = 24


@pytest.fixture(scope="module")
def prompts():
    return read_prompts(EMOJI / "prompts" / "eval.txt")[:N]


@pytest.fixture(scope="module")
def drawn(prompts):
    """Pictures and latents by name: from the same noise with 4 and 6 steps, and from other noise with 4."""
    artist = Artist(load_pipeline(EMOJI / "teacher"), prompts, name="model", guidance_scale=1.5, batch_size=N)
    runs = {"few": (4, 0), "more": (6, 0), "other seed": (4, 1)}
    return {name: next(artist.draw(steps, seeds=[seed], n=N)) for name, (steps, seed) in runs.items()}


@pytest.fixture(scope="module")
def scorer():
    return load_scorer_once(EMOJI / "scorer")


def blurred(images, radius):
    return np.stack([np.asarray(Image.fromarray(one).filter(ImageFilter.GaussianBlur(radius))) for one in images])


def all_equal(images):
    return np.repeat(images[:1], len(images), axis=0)


def shuffled(array):
    """No row stays in its place."""
    return np.roll(array, 7, axis=0)


@pytest.mark.parametrize("judge", ["scorer", "guard"])
def test_clip_score(judge, drawn, prompts):
    score, images = load_clip_score(EMOJI / judge), drawn["few"].images
    right = score(images, prompts)
    for spoilt in (blurred(images, 2), shuffled(images), all_equal(images)):
        assert mean_figure(score(spoilt, prompts) - right).interval[1] < 0


def test_sets(drawn, prompts, scorer):
    """Against pictures of the same prompts from other noise, as a model is measured against real ones."""
    judges = Judges(scorer, {}, {"clip": Extractor.read("clip", str(EMOJI / "scorer"))})
    real, images = judges.measure([drawn["other seed"].images]), drawn["few"].images

    def of(pictures):
        batch = [dataclasses.replace(drawn["few"], images=pictures)]
        seen = look(batch, prompts, judges, None, num_examples=1)
        found = figures(seen, real, None, judges.extractors, data_matches_prompts=True, num_resamples=50)
        return {name.partition("/")[0]: figure for name, figure in found.items()}

    clean, soft, equal = of(images), of(blurred(images, 4)), of(all_equal(images))
    for distance in ("frechet_distance", "kernel_distance"):
        for spoilt in (soft, equal):
            worse = Figure(
                spoilt[distance].value - clean[distance].value, spoilt[distance].replicates - clean[distance].replicates
            )
            assert worse.interval[0] > 0
    blob = of(blurred(images, 12))  # among so few pictures the neighbours are far: precision forgives much
    assert clean["precision"].value > blob["precision"].value
    assert clean["recall"].value > soft["recall"].value > equal["recall"].value == 0
    low, high = clean["frechet_distance"].interval
    assert low < clean["frechet_distance"].value < high


def test_a_scorer_that_is_exploited(drawn, prompts, efficientnet_folder):
    """Images whose latents follow the score of the shipped scorer, beside their way through the autoencoder alone.

    After two small steps both CLIPs like them better, and independent features see that they are worse; after more,
    pixel figures see the noise, too."""
    real, prompts = drawn["more"].images[:NUM_EXPLOITED], prompts[:NUM_EXPLOITED]
    vae, judge = load_pipeline(EMOJI / "teacher").vae, load_similarity(EMOJI / "scorer")
    tokens, start = judge.tokenize(prompts), encode(vae, real)

    @jax.jit
    @jax.grad
    def gradient(latents):
        scaled = latents / vae.config["scaling_factor"]
        images = vae.module.apply({"params": vae.params}, scaled, method="decode")
        return judge.reward(judge.params, images, tokens).sum()

    def follow(latents, steps, size):
        for _ in range(steps):
            latents = latents + size * jnp.sign(gradient(latents))
        return latents

    little = follow(jnp.asarray(start), steps=2, size=0.02)
    clean, exploited, spoilt = (decode(vae, z) for z in (jnp.asarray(start), little, follow(little, 3, 0.08)))
    for name in ("scorer", "guard"):
        score = load_clip_score(EMOJI / name)
        assert mean_figure(score(exploited, prompts) - score(clean, prompts)).interval[0] > 0, name

    extractors = {"efficientnet": Extractor.read("efficientnet", str(efficientnet_folder))}
    judges = Judges(load_scorer_once(EMOJI / "scorer"), {}, extractors)
    reference = judges.measure([real])

    def of(images):
        seen = Seen(judges.measure([images]), {}, images[:1])
        return figures(seen, reference, None, extractors, data_matches_prompts=True, num_resamples=50)

    good, worse, worst = of(clean), of(exploited), of(spoilt)
    seen_by = {"frechet_distance/efficientnet/data": worse, "noise_level/pixels/data": worst}
    for name, bad in (seen_by | {"background_noise/pixels/data": worst}).items():
        difference = Figure(bad[name].value - good[name].value, bad[name].replicates - good[name].replicates)
        assert difference.interval[0] > 0, name


def test_distances_picture_by_picture(drawn, scorer):
    few, reference = drawn["few"], Reference.of([drawn["more"]])
    near = latent_distance(few.latents, reference.latents)
    assert near.mean() < 0.3 * latent_distance(shuffled(few.latents), reference.latents).mean()
    near = perceptual_distance(scorer, few.images, reference.images)
    assert near.mean() < 0.5 * perceptual_distance(scorer, shuffled(few.images), reference.images).mean()
    assert near.mean() < perceptual_distance(scorer, all_equal(few.images), reference.images).mean()
    softness = [perceptual_distance(scorer, blurred(few.images, r), few.images).mean() for r in (0.5, 1, 2)]
    assert 0 < softness[0] < softness[1] < softness[2]


def test_diversity(drawn, scorer):
    features = [image_features(scorer, drawn[name].images) for name in ("few", "other seed")]
    across = diversity(np.stack(features)).mean()
    np.testing.assert_allclose(diversity(np.stack([features[0], features[0]])), 0, atol=1e-6)
    # The teacher has its training images by heart: other seeds change little, other captions much.
    mixed = diversity(np.stack([features[0], shuffled(features[1])])).mean()
    assert 0 < 5 * across < mixed
    soft = [image_features(scorer, blurred(drawn[name].images, 4)) for name in ("few", "other seed")]
    assert diversity(np.stack([soft[0], shuffled(soft[1])])).mean() < mixed
