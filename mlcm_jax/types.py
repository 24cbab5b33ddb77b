"""Array aliases and the few records that travel between the packages.

Inside the project every image-like array is channels-last: latents [N, h, w, c], images [N, H, W, 3].
Channels-first appears only at the edge to diffusers (npy files, PyTorch comparisons).
"""

from typing import Any, NamedTuple

import flax.struct
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

Params = dict[str, Any]
Latents = Float[Array, "n h w c"]
HostLatents = Float[np.ndarray, "n h w c"]  # fetched
AnyKey = Key[Array, ""] | UInt32[Array, "2"]
Timesteps = Int[Array, " n"]  # 0..999, the index into alphas_cumprod


@flax.struct.dataclass
class TextConditioning:
    """What the denoiser takes beside the latents and the time (SDXL's micro-conditioning).

    hidden_states: token states of all text encoders side by side.
    pooled: projected state of the last encoder's end-of-text token.
    time_ids: original height, width, crop top, left, target height, width, in pixels.
    """

    hidden_states: Float[Array, "n tokens d"]
    pooled: Float[Array, "n p"]
    time_ids: Float[Array, "n 6"]


class Condition(NamedTuple):
    """What the denoisers are conditioned on, an entry an example. guidance_scale: of the teacher."""

    conditioning: TextConditioning
    guidance_scale: Float[Array, " n"]


@flax.struct.dataclass
class Batch:
    """What a training step takes.

    trajectory_step: the teacher's solver steps from pure noise to each example's state. num_segments: M of this step.
    guidance_scale: of the teacher. seed: the run's (rng.seed_words), so that one compiled program serves all seeds.
    latents: clean ones, scaled, where states are made of data. prompt_tokens: the prompts as frozen networks beside
    the teacher read them, by the network's role. renews_teacher: whether the student as it is becomes the teacher,
    where a student is one. without_prompt: examples that have the conditioning of no prompt, where there are such.
    """

    conditioning: TextConditioning
    trajectory_step: Int[Array, " n"]
    num_segments: Int[Array, ""]
    guidance_scale: Float[Array, " n"]
    seed: UInt32[Array, "2"]
    latents: Latents | None = None
    prompt_tokens: dict[str, Int[Array, "n t"]] = flax.struct.field(default_factory=dict)
    renews_teacher: Bool[Array, ""] | None = None
    without_prompt: Bool[Array, " n"] | None = None

    @property
    def condition(self) -> Condition:
        return Condition(self.conditioning, self.guidance_scale)


@flax.struct.dataclass
class TrajectoryBuffer:
    """A live trajectory for each example of the batch: the next state z at t, and the x0 predicted at t_prev."""

    z: Latents
    t: Timesteps
    x0_prev: Latents
    t_prev: Timesteps
