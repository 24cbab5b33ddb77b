"""Principal components against the covariance's eigenvectors, and the Frechet distance in them."""

from typing import Any, cast

import numpy as np
import pytest

from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.extractors.base import FeatureExtractor
from mlcm_jax.evaluation.extractors.registry import FEATURE_EXTRACTORS
from mlcm_jax.evaluation.measure import Networks, figures, set_figures
from mlcm_jax.evaluation.metrics.base import FeaturePair
from mlcm_jax.evaluation.statistics.principal_components import PrincipalComponents


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) * np.arange(1, shape[-1] + 1)


def test_against_eigenvectors():
    features = normal(40, 6) + 3
    values, vectors = np.linalg.eigh(np.cov(features.T))
    found = PrincipalComponents.of(features, 2)
    np.testing.assert_allclose(np.abs(found.axes.T @ vectors[:, ::-1][:, :2]), np.eye(2), atol=1e-9)
    projected = found(features)
    np.testing.assert_allclose(np.cov(projected.T), np.diag(values[::-1][:2]), atol=1e-9)
    np.testing.assert_allclose(projected.mean(axis=0), 0, atol=1e-9)


def test_no_more_than_there_are():
    """All n - 1 directions of a small set keep its distances."""
    features = normal(5, 9)
    projected = PrincipalComponents.of(features, 256)(features)
    assert projected.shape == (5, 4)
    np.testing.assert_allclose(np.linalg.norm(projected[0] - projected[1]), np.linalg.norm(features[0] - features[1]))
    with pytest.raises(UserError, match="give two or more"):
        PrincipalComponents.of(features[:1], 3)


def test_independent_features_are_reported_first():
    """Whatever the order that they were asked for in; and how many components were used is said."""

    def extractor(name):
        return FeatureExtractor(
            FEATURE_EXTRACTORS[name], "FOLDER", lambda images: normal(len(images), 6, seed=images.sum())
        )

    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    extractors = {"clip": extractor("clip"), "efficientnet": extractor("efficientnet")}
    networks = Networks(cast(Any, None), {"clip": lambda images, prompts: np.ones(len(images))}, extractors)
    measured = networks.measure({"images": part, "prompts": [""] * len(part)} for part in (images[:5], images[5:]))
    columns = figures(measured, measured, measured, networks, data_matches_prompts=True, num_resamples=3)
    found = [column.key for column in columns]
    kinds = dict.fromkeys(name.split("/")[1] if "/" in name else "" for name in found)
    assert list(kinds) == ["efficientnet", "pixels", "clip", ""]
    assert extractors["efficientnet"].describe({"data": 8, "baseline": 512}).endswith(": 7 of data, 256 of baseline")
    assert "components" not in extractors["clip"].describe({"data": 8})


def test_frechet_distance_in_the_reference_s_components():
    """A difference in a direction that the reference hardly has is not counted; other figures see all features."""
    reference, shift = normal(60, 8), np.eye(8)
    along, across = reference + 20 * shift[7], reference + 20 * shift[0]
    found = [set_figures(FeaturePair(x, reference, True, 5, components=3)) for x in (along, across)]
    assert found[0]["frechet_distance"].value == pytest.approx(400, rel=0.05)
    assert found[1]["frechet_distance"].value < 20
    assert found[1]["kernel_distance"].value > 0 and found[1]["precision"].value < 1
    for one in found:  # resamples are projected as the sets are: a paired shift stays what it is
        np.testing.assert_allclose(one["frechet_distance"].replicates, one["frechet_distance"].value, rtol=1e-6)
    whole = set_figures(FeaturePair(across, reference, paired=True, num_resamples=5))
    assert whole["frechet_distance"].value == pytest.approx(400)
