"""Seeds of 64 bits: all bits count, and small seeds give what they always gave."""

import jax
import numpy as np
import pytest

from mlcm_jax.errors import UserError
from mlcm_jax.rng import MAX_SEED, next_seed, seed_key, seed_words, stream
from mlcm_jax.sampling.sample import draw_noise


@pytest.mark.parametrize("seed", [0, 1, 5, 2**31 - 1, 2**31, 2**32 - 1])
def test_a_small_seed_is_the_key_that_jax_makes_of_it(seed):
    expected = jax.random.key_data(jax.random.key(seed))
    for given in (seed, jax.numpy.asarray(seed_words(seed))):
        np.testing.assert_array_equal(jax.random.key_data(seed_key(given)), expected)


def test_the_noise_of_small_seeds_stays():
    recorded = [0.41528263688087463, 1.1503866910934448, -1.379870057106018, -0.7414402365684509]
    np.testing.assert_allclose(draw_noise(5, 2, (1, 1, 2)).ravel(), recorded, rtol=1e-6)


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_other_seeds_are_refused(seed):
    with pytest.raises(UserError, match=f"The seed {seed} cannot work: give one from 0 to {MAX_SEED}"):
        draw_noise(seed, 1, (1, 1, 1))


def test_all_bits_count():
    seeds = [0, *(1 << bit for bit in range(64)), 5 + 2**32, MAX_SEED]
    assert len({draw_noise(seed, 1, (1, 1, 1)).item() for seed in seeds[::5]}) == len(seeds[::5])
    assert len({tuple(jax.random.key_data(stream(seed, "noise", 3)).tolist()) for seed in seeds}) == len(set(seeds))
    assert next_seed(MAX_SEED) == 0 and next_seed(2**32 - 1, by=2) == 2**32 + 1
