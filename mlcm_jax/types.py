"""Array aliases and the few records that travel between the packages.

Inside the project every image-like array is channels-last: latents [N, h, w, c], images [N, H, W, 3].
Channels-first appears only at the edge to diffusers (npy files, PyTorch comparisons).
"""

from typing import Any

import flax.struct
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

Params = dict[str, Any]
Latents = Float[Array, "n h w c"]
HostLatents = Float[np.ndarray, "n h w c"]  # fetched
Timesteps = Int[Array, " n"]  # 0..999, the index into alphas_cumprod


@flax.struct.dataclass
class TextConditioning:
    """What the denoiser is told beside the latents and the time (SDXL's micro-conditioning).

    hidden_states: token states of all text encoders side by side.
    pooled: projected state of the last encoder's end-of-text token.
    time_ids: original height, width, crop top, left, target height, width, in pixels.
    """

    hidden_states: Float[Array, "n tokens d"]
    pooled: Float[Array, "n p"]
    time_ids: Float[Array, "n 6"]


@flax.struct.dataclass
class Batch:
    """What a training step takes.

    jumps: the teacher's jumps from pure noise to each row's state. num_segments: M of this step. guidance_scale: of
    the teacher. seed: the run's (rng.seed_words), so that one compiled program serves all seeds. latents: clean ones,
    scaled, where states are made of data. judge_tokens: the prompts for the judges of the preference term, by the
    judge's role.
    """

    conditioning: TextConditioning
    jumps: Int[Array, " n"]
    num_segments: Int[Array, ""]
    guidance_scale: Float[Array, " n"]
    seed: UInt32[Array, "2"]
    latents: Latents | None = None
    judge_tokens: dict[str, Int[Array, "n t"]] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class Pool:
    """A live trajectory for each row of the batch: the next state z at t, and the x0 that was predicted at t_prev."""

    z: Latents
    t: Timesteps
    x0_prev: Latents
    t_prev: Timesteps
