"""Which activations are kept for the backward pass, and which are computed again."""

import flax.linen as nn
import jax

# names in jax.checkpoint_policies: dots are matrix products, and those without batch dimensions are the dense layers'
REMAT_POLICIES = ("nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable")


def rematerialised(block: type[nn.Module], policy: str | None, **options) -> type[nn.Module]:
    """The block with its activations recomputed but for what ``policy`` keeps; None: the block as it is."""
    if policy is None:
        return block
    return nn.remat(block, policy=getattr(jax.checkpoint_policies, policy), **options)
