"""What a run carries from step to step, and all that a checkpoint holds of it."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from mlcm_jax.models import lora
from mlcm_jax.types import Params, Pool


@flax.struct.dataclass
class Rival:
    """A network that is trained against the student: its weights, float32, and its optimizer's state."""

    params: Params
    opt_state: optax.OptState


@flax.struct.dataclass
class TrainState:
    """step: number of finished updates. params: the trainable tree (all weights, or LoRA factors), float32.

    ema: moving average of params, or None where the run keeps none. pool: live trajectories, or None where the states
    come from elsewhere. rivals: networks that are trained against the student, by the name of their loss.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    ema: Params | None = None
    pool: Pool | None = None
    rivals: dict[str, Rival] = flax.struct.field(default_factory=dict)

    @property
    def trained(self) -> Params:
        """What is sampled and exported: the moving average where one is kept, else the parameters."""
        return self.params if self.ema is None else self.ema


def with_guidance_embedding(params: Params, dim: int) -> Params:
    """A teacher's weights for a student that is told its guidance scale by ``dim`` numbers (0: not told).

    The projection of the embedding is 0, so that the student starts as the teacher.
    """
    if not dim:
        return params
    time_embedding = params["time_embedding"]
    width = time_embedding["linear_1"]["kernel"].shape[0]
    projection = {"kernel": jnp.zeros((dim, width), jnp.float32)}
    return params | {"time_embedding": time_embedding | {"cond_proj": projection}}


def student_variables(params: Params, teacher: Params, config: ConfigDict) -> Params:
    """The student's variables: its own weights, or the teacher's with the trained low-rank factors beside them."""
    if config.trainable == "full":
        return {"params": params}
    return {"params": teacher, "lora": lora.scaled(params, config.lora.alpha, config.lora.rank)}


def create(
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    with_ema: bool = False,
    pool: Pool | None = None,
    rivals: dict[str, Rival] | None = None,
) -> TrainState:
    """A state at step 0; the moving average starts as a copy of the parameters."""
    ema = jax.tree.map(jnp.copy, params) if with_ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema, pool, rivals or {})
