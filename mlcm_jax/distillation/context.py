"""What does not change from step to step: the denoisers, the noise schedule, the settings, the frozen networks."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mlcm_jax.diffusion.guidance import guided_predict
from mlcm_jax.diffusion.parameterization import predict_x0_eps
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.distillation.frozen_networks import FrozenNetworks
from mlcm_jax.distillation.state import Frozen, student_variables
from mlcm_jax.models.unet import guidance_embedding
from mlcm_jax.types import Condition, Latents, Params, Timesteps

# the denoiser's own prediction: (variables, latents, timesteps, conditioning, **flax's options)
Apply = Callable[..., Any]


def is_guided(config: ConfigDict) -> bool:
    """Whether a stage's teacher is guided. At w = 1 it is not: its conditional branch is all that counts."""
    return not config.guidance_scale == (config.guidance_scale_max or config.guidance_scale) == 1


@dataclasses.dataclass(frozen=True)
class DistillationContext:
    """What sources of states, targets, distances and losses may use.

    apply: the denoiser. config: of one stage. networks: what the weights in ``Frozen.networks`` belong to.
    student_apply: of a student that is conditioned on its guidance scale; it takes the scale's embedding as well.
    former_prediction_type: what the output of the former student is, which is the teacher with
    teacher_network="previous"; "": what the teacher's is.
    """

    apply: Apply
    schedule: Schedule
    config: ConfigDict
    networks: FrozenNetworks = FrozenNetworks()  # noqa: RUF009  (frozen)
    student_apply: Apply | None = None
    former_prediction_type: str = ""

    def teacher_x0(self, frozen: Frozen, condition: Condition, z: Latents, t: Timesteps) -> Latents:
        """The teacher's guided prediction of the clean latents, float32."""
        predict = partial(self.apply, {"params": frozen.teacher})
        if not is_guided(self.config):
            return predict_x0_eps(self.schedule, predict(z, t, condition.conditioning), z, t).x0
        unconditional = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(z), *a.shape[1:])), frozen.unconditional)
        if self.config.buckets:  # both branches know the size of the image
            unconditional = unconditional.replace(time_ids=condition.conditioning.time_ids)
        output = guided_predict(predict, z, t, condition.conditioning, unconditional, condition.guidance_scale)
        return predict_x0_eps(self.schedule, output, z, t).x0

    def student_x0(self, params: Params, frozen: Frozen, condition: Condition, z: Latents, t: Timesteps) -> Latents:
        """The prediction of the clean latents, float32, by a student with the trained parameters ``params``."""
        return self._student_x0(params, frozen, condition, z, t, self.config.student_prediction_type)

    def former_student_x0(self, params: Params, frozen: Frozen, condition: Condition, z: Latents, t: Timesteps):
        """The same by the student that is the teacher with teacher_network="previous"."""
        return self._student_x0(params, frozen, condition, z, t, self.former_prediction_type)

    def _student_x0(self, params, frozen, condition, z, t, prediction_type):
        variables = student_variables(params, frozen.teacher, self.config)
        output = self.student_output(variables, z, t, condition)
        return predict_x0_eps(self.schedule, output, z, t, prediction_type).x0

    def student_output(self, variables: Params, z: Latents, t: Timesteps, condition: Condition, **options: Any) -> Any:
        """The output of the student, or of a network like it, conditioned on its guidance scale or not. options:
        flax's."""
        if not self.config.guidance_embedding_dim:
            return self.apply(variables, z, t, condition.conditioning, **options)
        embedding = guidance_embedding(condition.guidance_scale, self.config.guidance_embedding_dim)
        return cast(Apply, self.student_apply)(variables, z, t, condition.conditioning, embedding, **options)
