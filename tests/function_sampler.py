"""Sampling with a function in the network's place, as mlcm_jax.sampling.sample does it with a network."""

from mlcm_jax.diffusion.denoise import denoise, noise_rng
from mlcm_jax.diffusion.guidance import guided_predict
from mlcm_jax.diffusion.samplers import step_table


def sample(predict, config, latents, conditioning, unconditional, guidance_scale, num_steps, rng=None, *, eta=0.0):
    """Clean latents from noise; predict: (latents, timesteps, conditioning) -> output."""
    table = step_table(config, num_steps, eta)

    def network(x, timesteps):
        if guidance_scale > 1:
            return guided_predict(predict, x, timesteps, conditioning, unconditional, guidance_scale)
        return predict(x, timesteps, conditioning)

    return denoise(network, table.prediction_type, table.arrays, latents, noise_rng(table, rng))
