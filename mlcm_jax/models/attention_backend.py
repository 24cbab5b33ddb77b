"""Scaled dot-product attention, one function over three implementations, chosen for the device that it runs on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from mlcm_jax.errors import UserError
from mlcm_jax.models import cudnn_attention
from mlcm_jax.parallel.sharding import BATCH_AXES

# implementation: the platform that it needs
PLATFORMS = {"xla": None, "cudnn": "gpu", "flash": "tpu"}
BACKENDS = ("auto", *PLATFORMS)

FLASH_MIN_TOKENS = 1024  # below, and for the 77 tokens of a prompt, the scores are small and padding costs more
LANES = 128  # of a TPU's vector registers: keys, queries and wide heads are padded to multiples of it
FLASH_BLOCKS = (512, 256, 128)  # rows of queries and of keys that the kernel holds at a time, the largest that divides


@dataclasses.dataclass(frozen=True)
class AttentionBackend:
    """name: one of ``BACKENDS``; "auto" takes for each call what the device does best.

    platform: "cpu", "gpu" or "tpu"; None: jax's default. mesh: of a program for several devices, which the TPU kernel
    has to be given; arrays are split as mlcm_jax.parallel.sharding splits them.
    Raises UserError for an unknown name, and for one that needs another platform.
    """

    name: str = "auto"
    platform: str | None = None
    mesh: Mesh | None = None

    def __post_init__(self):
        if self.name not in BACKENDS:
            raise UserError(f"attention={self.name} is unknown: use one of {', '.join(BACKENDS)}.")
        needed = PLATFORMS.get(self.name)
        if needed is not None and needed != self._platform():
            raise UserError(f"attention={self.name} needs a {needed}, and this is a {self._platform()}: use auto.")

    def _platform(self) -> str:
        return self.platform or jax.default_backend()

    def choose(self, tokens: int, keys: int, head_dim: int, dtype) -> str:
        """The implementation for a call of these sizes, one that has a gradient.

        Raises UserError where the one that is asked for has none.
        """
        cudnn_can = cudnn_attention.supports(head_dim, dtype)
        if self.name == "cudnn" and not cudnn_can:
            raise UserError(
                f"attention=cudnn cannot compute heads of {head_dim} channels in {jnp.dtype(dtype).name}: it needs "
                f"bfloat16 or float16 and a multiple of {cudnn_attention.HEAD_DIM_MULTIPLE} up to "
                f"{cudnn_attention.MAX_HEAD_DIM}; use auto."
            )
        if self.name != "auto":
            return self.name
        if self._platform() == "gpu" and cudnn_can:
            return "cudnn"
        if self._platform() == "tpu" and min(tokens, keys) >= FLASH_MIN_TOKENS:
            return "flash"
        return "xla"


AUTO, XLA = AttentionBackend(), AttentionBackend("xla")


def dot_product_attention(
    q: Float[Array, "n t d"],
    k: Float[Array, "n s d"],
    v: Float[Array, "n s d"],
    heads: int,
    mask: Bool[Array, "#n 1 #t s"] | None = None,
    backend: AttentionBackend = XLA,
) -> Float[Array, "n t d"]:
    """Multi-head attention on merged heads, scaled by 1 / sqrt(channels of a head); the softmax runs in float32.

    mask: true where attention may go; for "xla" alone.
    Raises UserError for sizes that the backend does not have.
    """
    q_heads, k_heads, v_heads = (a.reshape(*a.shape[:2], heads, -1) for a in (q, k, v))
    chosen = backend.choose(q.shape[1], k.shape[1], q_heads.shape[-1], q.dtype)
    if chosen != "xla" and mask is not None:
        raise ValueError(f"attention={chosen} takes no mask")
    if chosen == "flash":
        out = _flash_on_mesh(q_heads, k_heads, v_heads, backend.mesh)
    elif chosen == "cudnn":
        out = cudnn_attention.cudnn_attention(q_heads, k_heads, v_heads)
    else:
        out = jax.nn.dot_product_attention(q_heads, k_heads, v_heads, mask=mask, implementation="xla")
    return out.reshape(q.shape)


def _flash_on_mesh(q, k, v, mesh: Mesh | None):
    """The compiler cannot split the kernel by itself, so that each device is given its examples and heads."""
    if mesh is None or mesh.size == 1:
        return flash_attention(q, k, v)
    examples, heads = q.shape[0], q.shape[2]
    ways = mesh.shape[BATCH_AXES[0]] * mesh.shape[BATCH_AXES[1]]
    spec = PartitionSpec(
        BATCH_AXES if examples % ways == 0 else None, None, None if heads % mesh.shape["tensor"] else "tensor", None
    )
    # vma: the kernel's outputs do not say along which mesh axes they differ
    split = jax.shard_map(flash_attention, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return split(q, k, v)


def flash_attention(
    q: Float[Array, "n t h d"], k: Float[Array, "n s h d"], v: Float[Array, "n s h d"]
) -> Float[Array, "n t h d"]:
    """Attention on a TPU without its scores in memory (arXiv 2205.14135), by jax's own Pallas kernel.

    Any number of queries and keys: both are padded, and padded keys belong to another segment than the queries.
    """
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel

    (n, tokens, _, head_dim), keys = q.shape, k.shape[1]
    width = head_dim if head_dim <= LANES else _padded(head_dim)
    q, k, v = (_pad(a.transpose(0, 2, 1, 3), width) for a in (q, k, v))
    segments = None
    if k.shape[2] > keys:
        real = jnp.arange(k.shape[2]) < keys
        segments = kernel.SegmentIds(
            q=jnp.ones((n, q.shape[2]), jnp.int32), kv=jnp.broadcast_to(real.astype(jnp.int32), (n, k.shape[2]))
        )
    blocks = _block_sizes(q.shape[2], k.shape[2])
    out = kernel.flash_attention(q, k, v, segment_ids=segments, sm_scale=head_dim**-0.5, block_sizes=blocks)
    return out[:, :, :tokens, :head_dim].transpose(0, 2, 1, 3)


def _padded(size: int) -> int:
    return -(-size // LANES) * LANES


def _pad(a: Float[Array, "n h t d"], width: int) -> Float[Array, "n h t2 d2"]:
    return jnp.pad(a, ((0, 0), (0, 0), (0, _padded(a.shape[2]) - a.shape[2]), (0, width - a.shape[3])))


@functools.cache
def _block_sizes(queries: int, keys: int):
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes

    rows, columns = (next(b for b in FLASH_BLOCKS if size % b == 0) for size in (queries, keys))
    return BlockSizes(
        block_b=1,
        block_q=rows,
        block_k_major=columns,
        block_k=columns,
        block_q_major_dkv=rows,
        block_q_dkv=rows,
        block_k_major_dkv=columns,
        block_k_dkv=columns,
        block_q_dq=rows,
        block_k_major_dq=columns,
        block_k_dq=columns,
    )
