"""A metric is one object: what it needs decides where it is measured, and the report takes its title from it."""

from typing import Any, cast

import numpy as np
import pytest

from mlcm_jax.evaluation import measure
from mlcm_jax.evaluation.measure import Networks, figures, real_inputs, sampled_inputs
from mlcm_jax.evaluation.metrics.base import ImageMetric
from mlcm_jax.evaluation.metrics.registry import METRICS
from mlcm_jax.evaluation.sampling import SampledBatch
from mlcm_jax.rewards.registry import REWARD_MODELS


def mean_brightness(images):
    return images.mean(axis=(1, 2, 3)) / 255


def mean_difference(images, baseline_images):
    return mean_brightness(images) - mean_brightness(baseline_images)


BRIGHTNESS = ImageMetric("brightness", "mean brightness", "near 1", 2, mean_brightness, relative_to_data=True)
DIFFERENCE = ImageMetric("difference", "difference", "lower", 2, mean_difference, needs=("images", "baseline_images"))


@pytest.mark.parametrize("with_baseline", [False, True])
def test_a_metric_is_measured_where_what_it_needs_is_there(with_baseline, monkeypatch):
    monkeypatch.setattr(measure, "IMAGE_METRICS", (BRIGHTNESS, DIFFERENCE))
    images = np.random.default_rng(0).integers(1, 120, (8, 4, 4, 3)).astype(np.uint8)
    latents = cast(Any, np.zeros((8, 2, 2, 4), np.float32))
    batches = [SampledBatch(slice(i, i + 4), latents[i : i + 4], 2 * images[i : i + 4], 0.1) for i in (0, 4)]
    networks = Networks(cast(Any, None), {}, {})
    reference = measure.Reference(latents, images) if with_baseline else None
    samples = networks.measure(sampled_inputs(batches, [""] * 8, reference))
    data = networks.measure(real_inputs([images[:3], images[3:]]))
    assert set(data.numbers) == {"brightness"}
    found = figures(samples, data, None, networks, data_matches_prompts=True, num_resamples=2)
    columns = {column.key: column for column in found}
    assert list(columns) == ["brightness/pixels/data", *(["difference"] if with_baseline else [])]
    shown = columns["brightness/pixels/data"]
    assert (shown.title, shown.better, shown.decimals, shown.against) == (
        "mean brightness, pixels",
        "near 1",
        2,
        "data",
    )
    np.testing.assert_allclose(found[shown].value, 2)
    if with_baseline:
        assert columns["difference"].against == "baseline"
        np.testing.assert_allclose(found[columns["difference"]].value, mean_brightness(images).mean())


def test_no_two_figures_have_one_name():
    names = [metric.name for metric in METRICS] + [f"{name}_score" for name in REWARD_MODELS]
    assert len(set(names)) == len(names)
    assert not any("/" in name or "-" in name for name in names), "they part the keys of results.json, and labels"
