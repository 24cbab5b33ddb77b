"""What a run carries from step to step, and all that a checkpoint holds of it."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from mlcm_jax.types import Params, Pool


@flax.struct.dataclass
class TrainState:
    """step: number of finished updates. params: the trainable tree (all weights, or LoRA factors), float32.

    ema: moving average of params, or None where the run keeps none. pool: live trajectories, or None where the states
    come from elsewhere.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    ema: Params | None = None
    pool: Pool | None = None

    @property
    def trained(self) -> Params:
        """What is sampled and exported: the moving average where one is kept, else the parameters."""
        return self.params if self.ema is None else self.ema


def create(
    params: Params, optimizer: optax.GradientTransformation, *, with_ema: bool = False, pool: Pool | None = None
) -> TrainState:
    """A state at step 0; the moving average starts as a copy of the parameters."""
    ema = jax.tree.map(jnp.copy, params) if with_ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema, pool)
