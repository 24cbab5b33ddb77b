"""What is measured without a network: high-frequency energy and a background that is not white."""

import numpy as np
import pytest

from mlcm_jax.evaluation.measure import Measurements, relative_figures
from mlcm_jax.evaluation.metrics.background_noise import BACKGROUND_NOISE, background_noise
from mlcm_jax.evaluation.metrics.high_frequency_energy import HIGH_FREQUENCY_ENERGY, high_frequency_energy
from mlcm_jax.evaluation.metrics.noise_level import noise_level


def on_white(n=1, side=32, colour=(200, 30, 30)):
    images = np.full((n, side, side, 3), 255, np.uint8)
    images[:, 8:24, 8:24] = colour
    return images


def noisy(images, sigma, seed=0):
    noise = np.random.default_rng(seed).normal(scale=sigma, size=images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def test_high_frequency_energy():
    grey = np.full((1, 200, 200, 3), 128, np.uint8)
    assert high_frequency_energy(grey) == [0]
    found = high_frequency_energy(noisy(grey, 10))
    np.testing.assert_allclose(found, 20 * (10 / 255) ** 2, rtol=0.03)
    clean, doubled = on_white(), on_white()
    doubled[:, 6, 6:26] = doubled[:, 25, 6:26] = doubled[:, 6:26, 6] = doubled[:, 6:26, 25] = 120
    assert high_frequency_energy(doubled) > 1.2 * high_frequency_energy(clean)


def test_noise_level():
    """Contours do not count, noise of a normal distribution does: its absolute median over colours."""
    assert noise_level(on_white()) == [0]
    draws = np.abs(np.random.default_rng(1).normal(scale=np.sqrt(20) * 10 / 255, size=(100_000, 3))).mean(axis=-1)
    grey = np.full((1, 200, 200, 3), 128, np.uint8)
    np.testing.assert_allclose(noise_level(noisy(grey, 10)), np.median(draws), rtol=0.03)


def test_background_noise():
    """A highlight inside the shape is no background; a slight tint around it is."""
    images = on_white(3)
    images[0, 14:18, 14:18] = 240
    images[1, :8] = 250
    images[2, :8] = 254
    outside = 32 * 32 - 16 * 16
    np.testing.assert_allclose(background_noise(images), [0, 8 * 32 / outside, 0])
    assert background_noise(np.zeros((1, 8, 8, 3), np.uint8)) == [0]


def test_background_noise_is_of_whole_images():
    """Half of Gaussian noise is beyond white; of the rest some 0.8 is further than 3 of 255 in a colour or another."""
    assert background_noise(noisy(on_white(side=64), 6))[0] == pytest.approx(0.7, abs=0.2)


def test_figures_against_real_images():
    metrics = (HIGH_FREQUENCY_ENERGY, BACKGROUND_NOISE)

    def compared(images, reference):
        measured = [Measurements({}, {m.name: m({"images": one}) for m in metrics}) for one in (images, reference)]
        return {column.key: figure for column, figure in relative_figures(metrics, *measured, paired=True).items()}

    real, samples = noisy(on_white(9), 5), noisy(on_white(9), 9, seed=1)
    found = compared(samples, real)
    assert found["high_frequency_energy/pixels/data"].value > 1
    assert found["background_noise/pixels/data"].value > 1
    same = compared(real, real)["high_frequency_energy/pixels/data"]
    np.testing.assert_allclose([same.value, *same.interval], 1)
    assert "background_noise/pixels/data" not in compared(samples, on_white(9))
