"""What a score of the decoded latents becomes as a loss: one number an example."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

Scores = Float[Array, " n"]
REFL_SCALE = 1e-3


def margin(scores: Scores, negative: Scores | None, target: float) -> Scores:
    """relu(target - score) + relu(negative): the score is to reach the target, and the score of the same picture for a
    negative prompt is to fall to 0 (arXiv 2406.05768, sixth version, with a target of 16 for MPS)."""
    if negative is None:
        raise ValueError("the margin form needs scores for the negative prompt")
    return jax.nn.relu(target - scores) + jax.nn.relu(negative)


def refl(scores: Scores, negative: Scores | None, target: float) -> Scores:
    """1e-3 relu(target - score), with a target of 2 for ImageReward (arXiv 2304.05977, sec. 3.2)."""
    return REFL_SCALE * jax.nn.relu(target - scores)


Form = Callable[[Scores, Scores | None, float], Scores]
FORMS: dict[str, Form] = {"margin": margin, "refl": refl}
