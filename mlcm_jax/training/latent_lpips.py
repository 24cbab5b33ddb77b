"""Learning a distance of latents from judgements of which of two is closer to a third (arXiv 1801.03924, sec. 3)."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, UInt8

from mlcm_jax.data.npy import read_npy
from mlcm_jax.data.real_images import RealImages
from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import Network
from mlcm_jax.images import to_float
from mlcm_jax.models.latent_lpips import LatentLPIPS
from mlcm_jax.rng import seed_key
from mlcm_jax.sampling.decode import decode, encode
from mlcm_jax.types import Latents, Params

LayoutFolders = ("ref", "p0", "p1", "judge")
EPS = 1e-6  # in the ratios of distances that the ranking head sees

# distances of pairs of images, uint8 [n, H, W, 3] each
ImageDistance = Callable[[UInt8[np.ndarray, "n H W 3"], UInt8[np.ndarray, "n H W 3"]], Float[np.ndarray, " n"]]


class Triplets(NamedTuple):
    """Scaled latents of a reference and of two others; judge: the share of judgements that p1 is closer than p0."""

    ref: Float[np.ndarray, "n h w c"]
    p0: Float[np.ndarray, "n h w c"]
    p1: Float[np.ndarray, "n h w c"]
    judge: Float[np.ndarray, " n"]

    def __getitem__(self, rows: Any) -> "Triplets":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Triplets(*(field[rows] for field in tuple(self)))


def _noise(z: Latents, other: Latents, strength, key: Key[Array, ""]) -> Latents:
    return z + strength * jax.random.normal(key, z.shape)


def _blur(z: Latents, other: Latents, strength, key: Key[Array, ""]) -> Latents:
    padded = jnp.pad(z, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    mean = nn.avg_pool(padded, (3, 3), (1, 1))
    return z + strength * (mean - z)


def _contrast(z: Latents, other: Latents, strength, key: Key[Array, ""]) -> Latents:
    sign = jax.random.rademacher(key, (len(z), 1, 1, 1), z.dtype)
    return z * (1 + 0.5 * sign * strength)


def _offset(z: Latents, other: Latents, strength, key: Key[Array, ""]) -> Latents:
    return z + 0.5 * strength * jax.random.normal(key, (len(z), 1, 1, z.shape[-1]))


def _blend(z: Latents, other: Latents, strength, key: Key[Array, ""]) -> Latents:
    return z + 0.5 * strength * (other - z)


def _patch(z: Latents, other: Latents, strength, key: Key[Array, ""]) -> Latents:
    """A square of another image, its side ``strength`` of the height."""
    n, height, width, _ = z.shape
    corner = jax.random.uniform(key, (n, 2)) * (1 - strength[:, 0, 0])
    rows, columns = jnp.arange(height) / height, jnp.arange(width) / width
    inside_rows = (rows >= corner[:, :1]) & (rows < corner[:, :1] + strength[:, 0, 0])
    inside_columns = (columns >= corner[:, 1:]) & (columns < corner[:, 1:] + strength[:, 0, 0])
    return jnp.where((inside_rows[:, :, None] & inside_columns[:, None])[..., None], other, z)


def _shift(z: Latents, other: Latents, strength, key: Key[Array, ""]) -> Latents:
    """Towards the image moved by one latent to the right: by ``strength`` of it, linearly interpolated."""
    return z + strength * (jnp.roll(z, 1, axis=2) - z)


DISTORTIONS = (_noise, _blur, _contrast, _offset, _blend, _patch, _shift)


@jax.jit
def distort(z: Latents, key: Key[Array, ""]) -> Latents:
    """Each row of z through a distortion of its own, of a strength drawn from 0.05 to 1."""
    kind_key, strength_key, other_key, key = jax.random.split(key, 4)
    kinds = jax.random.randint(kind_key, (len(z),), 0, len(DISTORTIONS))
    strength = jax.random.uniform(strength_key, (len(z), 1, 1, 1), minval=0.05)
    other = jnp.roll(z, jax.random.randint(other_key, (), 1, max(len(z), 2)), axis=0)
    candidates = jnp.stack([distortion(z, other, strength, key) for distortion in DISTORTIONS])
    return candidates[kinds, jnp.arange(len(z))]


def distorted_triplets(
    latents: Float[np.ndarray, "n h w c"], vae: Network, distance: ImageDistance, *, seed: int, repeats: int
) -> Triplets:
    """``repeats`` triplets of each latent: itself and two distortions; closer is whose decoded image is closer."""
    parts = []
    images = decode(vae, jnp.asarray(latents))
    for i in range(repeats):
        keys = jax.random.split(jax.random.fold_in(seed_key(seed), i))
        pair = [np.asarray(distort(jnp.asarray(latents), key)) for key in keys]
        d0, d1 = (distance(images, decode(vae, jnp.asarray(p))) for p in pair)
        parts.append(Triplets(latents, pair[0], pair[1], (d1 < d0).astype(np.float32)))
    return Triplets(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))


def image_mse(a: UInt8[np.ndarray, "n H W 3"], b: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, " n"]:
    """Mean squared difference of images in [-1, 1]."""
    return np.square(to_float(a) - to_float(b)).mean(axis=(1, 2, 3))


def bapps_triplets(root: str | Path, vae: Network, image_size: int, batch_size: int = 16) -> Triplets:
    """Judgements in the layout of BAPPS: folders ref, p0, p1 of images and judge of .npy files, at any depth.

    Images are encoded at ``image_size`` pixels. Raises UserError where the folders are not there or do not match.
    """
    groups = sorted(folder.parent for folder in Path(root).rglob("judge") if folder.is_dir())
    if not groups:
        raise UserError(f"{root} holds no judgements: it needs folders {', '.join(LayoutFolders)}, at any depth.")
    parts = []
    for group in groups:
        judge = np.asarray([_judgement(file) for file in sorted((group / "judge").glob("*.npy"))], np.float32)
        images = [RealImages(group / name, image_size) for name in LayoutFolders[:3]]
        if any(len(p) != len(judge) for p in images):
            raise UserError(f"{group} has {len(judge)} judgements for {', '.join(str(len(p)) for p in images)} images.")
        ref, p0, p1 = (np.concatenate(list(_encoded(vae, p, batch_size))) for p in images)
        parts.append(Triplets(ref, p0, p1, judge))
    return Triplets(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))


def _judgement(file: Path) -> float:
    values = read_npy(file).reshape(-1)
    if values.size != 1 or values.dtype.kind not in "fiub" or not 0 <= values[0] <= 1:
        raise UserError(f"{file} is no judgement: it must hold one number from 0 to 1.")
    return float(values[0])


def _encoded(vae: Network, images: RealImages, n: int) -> Iterator[np.ndarray]:
    for batch in images.batches(n, len(images)):
        padded = np.concatenate([batch, np.repeat(batch[-1:], n - len(batch), axis=0)])
        yield encode(vae, padded)[: len(batch)]


class RankingHead(nn.Module):
    """Two distances to the logit that the second is the smaller: what people say is no hard threshold."""

    @nn.compact
    def __call__(self, d0: Float[Array, " n"], d1: Float[Array, " n"]) -> Float[Array, " n"]:
        x = jnp.stack([d0, d1, d0 - d1, d0 / (d1 + EPS), d1 / (d0 + EPS)], axis=1)
        for _ in range(2):
            x = jax.nn.leaky_relu(nn.Dense(32)(x), 0.2)
        return nn.Dense(1)(x)[:, 0]


def _distances(module: LatentLPIPS, params: Params, triplets: Triplets) -> tuple[Array, Array]:
    ref = jnp.concatenate([triplets.ref, triplets.ref])
    both = cast(Array, module.apply({"params": params}, ref, jnp.concatenate([triplets.p0, triplets.p1])))
    return both[: len(triplets.judge)], both[len(triplets.judge) :]


def ranking_loss(module: LatentLPIPS, params: Params, triplets: Triplets) -> Float[Array, ""]:
    """Cross-entropy of the ranking head's answer with the judgements. params: {"network", "head"}."""
    logits = RankingHead().apply({"params": params["head"]}, *_distances(module, params["network"], triplets))
    return optax.sigmoid_binary_cross_entropy(logits, triplets.judge).mean()


def with_non_negative_heads(network: Params) -> Params:
    """The weights after an update, projected to where the distance is one."""
    return {k: jax.tree.map(jax.nn.relu, v) if k.startswith("head") else v for k, v in network.items()}


def two_afc(module: LatentLPIPS, params: Params, triplets: Triplets, chunk: int = 64) -> float:
    """Share of judgements that the distance agrees with; chance is 0.5 (arXiv 1801.03924, sec. 4.1)."""
    distances = jax.jit(partial(_distances, module))
    total, n = 0.0, len(triplets.judge)
    for start in range(0, n, chunk):
        rows = np.arange(start, start + chunk)
        d0, d1 = (np.asarray(d)[: n - start] for d in distances(params, triplets[rows % n]))
        judge = triplets.judge[rows[: n - start]]
        total += float(np.where(d1 < d0, judge, 1 - judge).sum())
    return total / n


def train_lpips(
    module: LatentLPIPS,
    triplets: Triplets,
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> Params:
    """Weights of the network, learnt from judgements by Adam with a cosine schedule; the ranking head is let go."""
    keys = jax.random.split(seed_key(seed))
    z, d = jnp.asarray(triplets.ref[:1]), jnp.zeros(1)
    params: Params = {
        "network": module.init(keys[0], z, z)["params"],
        "head": RankingHead().init(keys[1], d, d)["params"],
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))
    )
    opt_state = optimizer.init(params)

    @jax.jit
    def update(params, opt_state, batch):
        loss, grads = jax.value_and_grad(partial(ranking_loss, module))(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = cast(Params, optax.apply_updates(params, updates))
        return {**params, "network": with_non_negative_heads(params["network"])}, opt_state, loss

    rng = np.random.default_rng(seed)
    for step in range(1, num_steps + 1):
        batch = triplets[rng.integers(0, len(triplets.judge), batch_size)]
        params, opt_state, loss = update(params, opt_state, batch)
        report(step, float(loss))
    return params["network"]
