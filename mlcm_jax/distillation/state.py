"""What a run carries from step to step, and all that a checkpoint holds of it."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from mlcm_jax.diffusion.parameterization import CONVERSIONS
from mlcm_jax.errors import UserError
from mlcm_jax.models import lora
from mlcm_jax.rules import POSITIVE, Rule, check_rules, one_of
from mlcm_jax.types import Params, TextConditioning, TrajectoryBuffer


def check(config: ConfigDict) -> None:
    """Raise UserError for settings of what is trained that cannot work."""
    check_rules(
        config,
        {
            "trainable": one_of("full", "lora"),
            "teacher_network": one_of("teacher", "previous"),
            "student_prediction_type": one_of("", *CONVERSIONS),
            "lora.rank": POSITIVE,
            "lora.alpha": POSITIVE,
            "ema_decay": Rule(lambda v: 0 <= v < 1, "0 or more and less than 1"),
            "guidance_embedding_dim": Rule(lambda v: v >= 0 and v % 2 == 0 and v != 2, "0 or an even number from 4 on"),
        },
    )
    if config.guidance_embedding_dim and config.trainable == "lora":
        raise UserError("config.guidance_embedding_dim needs trainable='full': a LoRA has no place for the embedding.")
    if config.lora.start and config.trainable != "lora":
        raise UserError("config.lora.start needs trainable='lora': all weights start from a teacher.")


@flax.struct.dataclass
class Frozen:
    """What is never trained: the teacher's weights, the conditioning of its unconditional branch (one example), and the
    weights of other networks by their role (distillation.frozen_networks)."""

    teacher: Params
    unconditional: TextConditioning
    networks: dict[str, Params] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class Critic:
    """A network that is trained beside the student for one of its losses, as a fake score or a discriminator is: its
    weights, float32, and its optimizer's state."""

    params: Params
    opt_state: optax.OptState


@flax.struct.dataclass
class TrainState:
    """step: number of finished updates. params: the trainable tree (all weights, or LoRA factors), float32.

    ema: moving average of params, or None where the run keeps none. trajectory_buffer: live trajectories, of each
    size of images where there are several; None where states come from elsewhere. critics: by the name of their loss.
    previous_student: what was trained when num_segments last changed, the teacher of stages with
    teacher_network="previous"; None where there are none.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    ema: Params | None = None
    trajectory_buffer: TrajectoryBuffer | tuple[TrajectoryBuffer, ...] | None = None
    critics: dict[str, Critic] = flax.struct.field(default_factory=dict)
    previous_student: Params | None = None

    @property
    def trained(self) -> Params:
        """What is sampled and exported: the moving average where one is kept, else the parameters."""
        return self.params if self.ema is None else self.ema


def with_guidance_embedding(params: Params, dim: int) -> Params:
    """A teacher's weights for a student that is conditioned on its guidance scale by ``dim`` numbers (0: it is not).

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
    trajectory_buffer: TrajectoryBuffer | tuple[TrajectoryBuffer, ...] | None = None,
    critics: dict[str, Critic] | None = None,
    with_previous: bool = False,
) -> TrainState:
    """A state at step 0; the moving average and the student before start as copies of the parameters."""
    ema = jax.tree.map(jnp.copy, params) if with_ema else None
    previous = jax.tree.map(jnp.copy, params) if with_previous else None
    step, opt_state = jnp.zeros((), jnp.int32), optimizer.init(params)
    return TrainState(step, params, opt_state, ema, trajectory_buffer, critics or {}, previous)


def update_ema(ema: Params, params: Params, decay: float) -> Params:
    """Exponential moving average; ``decay`` may be traced."""
    return jax.tree.map(lambda e, p: e + (1.0 - decay) * (p.astype(e.dtype) - e), ema, params)
