"""Frechet distance between two sets of features (arXiv 1706.08500, eq. 6)."""

import numpy as np
from jaxtyping import Float

from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.metrics.base import FeaturePair, SetMetric
from mlcm_jax.evaluation.statistics.bootstrap import Figure, replicates
from mlcm_jax.evaluation.statistics.principal_components import PrincipalComponents


def frechet_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Squared Frechet distance between the Gaussians of the sets' means and (unbiased) covariances, in float64.

    d^2 = |mean_a - mean_b|^2 + tr(cov_a) + tr(cov_b) - 2 tr((cov_a cov_b)^(1/2)).

    Raises UserError for fewer than two examples, for different widths and for features that are not finite.
    """
    a, b = _checked(a), _checked(b)
    if a.shape[1] != b.shape[1]:
        raise UserError(f"The two sets have features of width {a.shape[1]} and {b.shape[1]}: use one network for both.")
    factor_a, factor_b = _factor(a), _factor(b)
    # With cov = R'R, the nonzero eigenvalues of cov_a cov_b are the squared singular values of R_a R_b'. No matrix
    # square root of a product is taken, and fewer examples than features do no harm.
    cross = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    mean_term = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    distance = mean_term + np.square(factor_a).sum() + np.square(factor_b).sum() - 2 * cross
    return max(float(distance), 0.0)  # rounding alone can take it below


def _checked(features: np.ndarray) -> Float[np.ndarray, "n d"]:
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise UserError(f"Features of shape {list(features.shape)} have no covariance: give two examples or more.")
    if not np.isfinite(features).all():
        raise UserError("The features hold values that are not finite: check the images and the network.")
    return features


def _factor(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "r d"]:
    """R with R'R = cov, r = min(n, d)."""
    centred = (features - features.mean(axis=0)) / np.sqrt(len(features) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r"))


def _figure(pair: FeaturePair) -> Figure:
    project = PrincipalComponents.of(pair.reference, pair.components) if pair.components else np.asarray
    samples, reference = project(pair.samples), project(pair.reference)

    def resampled(indices, reference_indices):
        return frechet_distance(samples[indices], reference[reference_indices])

    return Figure(frechet_distance(samples, reference), replicates(resampled, *pair.resamples))


FRECHET_DISTANCE = SetMetric("frechet_distance", "Frechet distance", "lower", 3, _figure)
