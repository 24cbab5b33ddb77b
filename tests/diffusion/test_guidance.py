import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scheduler_configs import SDXL

from mlcm_jax.diffusion.guidance import guide, guided_predict
from mlcm_jax.diffusion.parameterization import predict_x0_eps, training_target
from mlcm_jax.diffusion.schedule import Schedule

pytestmark = pytest.mark.usefixtures("strict_arrays")

Z = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
T = jnp.array([10, 500, 999])
COND, UNCOND = {"shift": jnp.array([1.0, 2.0, 3.0])}, {"shift": jnp.zeros(3)}


def predict(z, t, conditioning):
    return jnp.tanh(z) * t[:, None, None, None].astype(jnp.float32) + conditioning["shift"][:, None, None, None]


def test_one_doubled_call():
    batches = []

    def counted(z, t, conditioning):
        batches.append(z.shape[0])
        return predict(z, t, conditioning)

    guided_predict(counted, Z, T, COND, UNCOND, 3.0)
    assert batches == [6]


@pytest.mark.parametrize(("scale", "expected"), [(0.0, UNCOND), (1.0, COND)])
def test_scale_zero_and_one_are_the_two_branches(scale, expected):
    got = guided_predict(predict, Z, T, COND, UNCOND, scale)
    np.testing.assert_allclose(got, predict(Z, T, expected), rtol=1e-5, atol=1e-5)


def test_each_example_may_have_its_scale():
    scales = jnp.array([0.0, 1.0, 7.5])
    got = guided_predict(predict, Z, T, COND, UNCOND, scales)
    one_by_one = [guided_predict(predict, Z, T, COND, UNCOND, float(w))[i] for i, w in enumerate(scales)]
    np.testing.assert_allclose(got, jnp.stack(one_by_one), rtol=1e-6)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_guiding_the_raw_output_guides_eps(prediction_type):
    schedule = Schedule.from_config({**SDXL, "prediction_type": prediction_type})
    uncond, cond = jax.random.normal(jax.random.key(1), (2, *Z.shape))
    eps_uncond, eps_cond = (predict_x0_eps(schedule, o, Z, T).eps for o in (uncond, cond))
    got = predict_x0_eps(schedule, guide(uncond, cond, 8.0), Z, T).eps
    np.testing.assert_allclose(got, eps_uncond + 8.0 * (eps_cond - eps_uncond), atol=2e-3)


def test_perfect_targets_are_consistent_between_parameterizations():
    x0 = jnp.ones_like(Z)
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        schedule = Schedule.from_config({**SDXL, "prediction_type": prediction_type})
        target = training_target(schedule, x0, Z, T)
        np.testing.assert_allclose(guide(target, target, 5.0), target)
