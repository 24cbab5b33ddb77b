"""Teachers in closed form: data with a known density, so that scores and solution maps are known exactly."""

import jax
import jax.numpy as jnp

from mlcm_jax.diffusion.schedule import Schedule, alpha_sigma


class GaussianTeacher:
    """Data ~ N(mean, std^2) in each latent coordinate. mean, std: numbers, or arrays [1, h, w, c].

    Timesteps are integers [n]; z is [n, h, w, c].
    """

    def __init__(self, schedule: Schedule, mean=0.0, std=1.0):
        self.schedule = schedule
        self.mean, self.std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)

    def _moments(self, t):
        """Mean and standard deviation of z_t."""
        alpha, sigma = alpha_sigma(self.schedule, t)
        return alpha * self.mean, jnp.sqrt(jnp.square(alpha * self.std) + jnp.square(sigma))

    def eps(self, z, t):
        """E[eps | z_t = z], the noise prediction of a perfect network."""
        _, sigma = alpha_sigma(self.schedule, t)
        mean, std = self._moments(t)
        return sigma * (z - mean) / jnp.square(std)

    def x0(self, z, t):
        """E[x0 | z_t = z]."""
        alpha, _ = alpha_sigma(self.schedule, t)
        mean, std = self._moments(t)
        return self.mean + alpha * jnp.square(self.std) * (z - mean) / jnp.square(std)

    def flow(self, z, t, s):
        """Exact probability flow map from t to s: it keeps the number of standard deviations."""
        mean_t, std_t = self._moments(t)
        mean_s, std_s = self._moments(s)
        return mean_s + std_s * ((z - mean_t) / std_t)

    def output(self, z, t):
        """What a perfect network of the schedule's prediction_type returns."""
        alpha, sigma = alpha_sigma(self.schedule, t)
        x0, eps = self.x0(z, t), self.eps(z, t)
        return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[self.schedule.prediction_type]


class MixtureTeacher:
    """Data ~ equal mixture of N(means[k], std^2 I) over the whole latent; means: [k, h, w, c]. No closed flow map."""

    def __init__(self, schedule: Schedule, means, std):
        self.schedule, self.std = schedule, std
        self.means = jnp.asarray(means, jnp.float32)

    def x0(self, z, t):
        """E[x0 | z_t = z]: the components' posterior means, weighted by their responsibilities."""
        alpha, sigma = (a[:, None] for a in alpha_sigma(self.schedule, t))
        variance = jnp.square(alpha * self.std) + jnp.square(sigma)
        offset = z[:, None] - alpha * self.means[None]
        log_weights = -0.5 * jnp.sum(jnp.square(offset) / variance, axis=(2, 3, 4), keepdims=True)
        weights = jax.nn.softmax(log_weights, axis=1)
        return jnp.sum(weights * (self.means[None] + alpha * self.std**2 * offset / variance), axis=1)

    def eps(self, z, t):
        """E[eps | z_t = z]."""
        alpha, sigma = alpha_sigma(self.schedule, t)
        return (z - alpha * self.x0(z, t)) / sigma


def segment_of(t, num_segments):
    """The segment with lower < t <= upper; t = 0, which only ends a segment, counts to the last one."""
    return (num_segments * (1000 - t) - 1) // 1000
