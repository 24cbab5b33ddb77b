"""Sampling in a few steps, with decoding, against the same in PyTorch and diffusers: python benchmarks/sample.py.

A distilled model's sampler: TCDScheduler's steps without guidance, from noise to uint8 images on the host, decoded
one at a time (ours within one program). Text encoders are left out. Random weights, made on the device; ratios as in
train_step.py.
"""

import functools
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import timing
import workload
from absl import app, flags
from options import DTYPE, MODEL, OUT, REPEATS, TIME_LIMIT

from mlcm_jax.diffusion.samplers import step_table
from mlcm_jax.hub.pipeline import Network, Pipeline, conditioning_shapes
from mlcm_jax.sampling.decode import decode, decoding_program
from mlcm_jax.sampling.sample import draw_noise, sample_latents, sampling_program
from mlcm_jax.training.export import student_scheduler_config
from mlcm_jax.training.flops import count_flops

STEPS = flags.DEFINE_list("steps", ["1", "2", "4", "8"], "Numbers of sampling steps.")
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "8"], "Images at once.")

# Largest difference of the images, 0..255: the rounding to whole numbers may fall to either side.
TOLERANCE = 1


def in_dtype(network: Network, dtype: Any) -> Any:
    """Shapes of a network's parameters in ``dtype``."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), network.params)


def random_network(network: Network, dtype: Any) -> Network:
    return Network(network.module, workload.random_params(in_dtype(network, dtype)), network.config)


def compile_programs(pipeline: Pipeline, batch_size: int, dtype: str) -> dict[str, float]:
    """Compile what ``draw`` runs, without weights, into the compilation cache; seconds by program."""
    table = step_table(student_scheduler_config(pipeline.scheduler_config), 4)
    latents = jax.ShapeDtypeStruct((batch_size, *latent_shape(pipeline)), jnp.float32)
    told = conditioning_shapes(pipeline, batch_size)
    variables, decoder = {"params": in_dtype(pipeline.unet, dtype)}, in_dtype(pipeline.vae, dtype)
    unet, vae = pipeline.unet.module, pipeline.vae.module
    with timing.same_precision(dtype):
        static = (unet, table.prediction_type, None)
        args = (*static, table.arrays, variables, latents, told, told, None, None)
        _, sampling = timing.compile_timed(sampling_program, *args)
        _, decoding = timing.compile_timed(decoding_program, vae, decoder, latents, None)
    return {name: sampling[name] + decoding[name] for name in sampling}


def draw(unet: Network, vae: Network, scheduler_config: dict[str, Any], noise, conditioning, num_steps: int):
    """uint8 images, as launch/sample.py draws them."""
    settings = {"guidance_scale": 1.0, "num_steps": num_steps}
    with timing.same_precision(jnp.dtype(unet.module.dtype).name):
        latents = sample_latents(unet, scheduler_config, noise, conditioning, conditioning, **settings)
        return decode(vae, latents)


def latent_shape(pipeline: Pipeline) -> tuple[int, int, int]:
    config = pipeline.unet.config
    return config["sample_size"], config["sample_size"], config["in_channels"]


class Flops(NamedTuple):
    """Of matrix products and convolutions, for a whole batch."""

    step: float
    decoding: float


def flops_of(pipeline: Pipeline, batch_size: int) -> Flops:
    """Of one call of the UNet, and of the decoder."""
    latents = jax.ShapeDtypeStruct((batch_size, *latent_shape(pipeline)), jnp.float32)
    t = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    unet, vae = pipeline.unet, pipeline.vae
    conditioning = conditioning_shapes(pipeline, batch_size)
    one = count_flops(unet.module.apply, {"params": unet.params}, latents, t, conditioning)
    decoding = functools.partial(vae.module.apply, method="decode")
    return Flops(one, count_flops(decoding, {"params": vae.params}, latents))


def inputs(pipeline: Pipeline, batch_size: int):
    """Noise and conditioning, on the device."""
    conditioning = jax.device_put(workload.random_inputs(conditioning_shapes(pipeline, batch_size)))
    return draw_noise(0, batch_size, latent_shape(pipeline)), conditioning


def torch_inputs(noise: Any, conditioning: Any, device: str):
    """The same for torch, channels-first."""
    import torch_reference as reference

    z = reference.to_torch(noise, device).permute(0, 3, 1, 2).contiguous()
    return z, reference.to_conditioning(conditioning, device, reference.DTYPES[DTYPE.value])


def make_sampler(folder: Path, scheduler_config: dict[str, Any], *, compiled: bool = False):
    """torch's sampler on random weights of its own."""
    import torch_reference as reference

    sampler = reference.Sampler(folder, scheduler_config, timing.torch_device(), reference.DTYPES[DTYPE.value])
    return sampler.compiled() if compiled else sampler


def torch_samplers(folder: Path, pipeline: Pipeline, sides: dict[str, bool]) -> dict[str, Any]:
    """What makes torch's sampler, once, for each of ``timing.torch_sides``."""
    scheduler_config = student_scheduler_config(pipeline.scheduler_config)
    make = functools.partial(make_sampler, folder, scheduler_config)
    return {name: functools.cache(functools.partial(make, compiled=compiled)) for name, compiled in sides.items()}


def image_difference(folder: Path, pipeline: Pipeline, num_steps: int = 4) -> int:
    """Largest difference of two images, ours and torch's, from equal weights and noise, float32."""
    import torch_reference as reference

    unet, vae = (random_network(n, jnp.float32) for n in (pipeline.unet, pipeline.vae))
    scheduler_config = student_scheduler_config(pipeline.scheduler_config)
    noise, conditioning = inputs(pipeline, 2)
    ours = draw(unet, vae, scheduler_config, noise, conditioning, num_steps)
    device = timing.torch_device()
    sampler = reference.Sampler(folder, scheduler_config, device, reference.DTYPES["float32"])
    reference.copy_params(sampler.unet, unet.params)
    reference.copy_params(sampler.vae, vae.params)
    theirs = sampler(
        reference.to_torch(noise, device).permute(0, 3, 1, 2),
        reference.to_conditioning(conditioning, device, reference.DTYPES["float32"]),
        num_steps,
    )
    return int(np.abs(ours.astype(int) - theirs.astype(int)).max())


def check(model: str, dtype: str, scratch: Path) -> int:
    """``image_difference`` of the model, or, where that is large or not float32, of SDXL's architecture in small."""
    model = model if model != "sdxl" and dtype == "float32" else "small"
    pipeline = workload.describe(model, scratch, "float32")
    return image_difference(workload.architecture_folder(model, scratch), pipeline)


def our_run(pipeline: Pipeline, networks: Any, batch_size: int, num_steps: int):
    """A function that draws from noise that it is not timed to make."""
    noise, conditioning = inputs(pipeline, batch_size)
    scheduler_config = student_scheduler_config(pipeline.scheduler_config)
    return functools.partial(draw, *networks, scheduler_config, noise, conditioning, num_steps)


def measure(pipeline: Pipeline, networks, batch_size: int, num_steps: int, flops: Flops, theirs, deadline: float):
    """One row of the table, as far as it has got. theirs: {name: () -> torch's sampler}."""
    noise, conditioning = inputs(pipeline, batch_size)
    run = our_run(pipeline, networks, batch_size, num_steps)

    def torch_side(make):
        sampler = make()
        z, c = torch_inputs(noise, conditioning, sampler.device)
        return timing.torch_side(functools.partial(sampler, z, c, num_steps), sampler.device)

    row = {
        "work": f"{MODEL.value}, {num_steps} steps, batch {batch_size}, {noise.shape[1] * pipeline.downscale} px, "
        f"{DTYPE.value}",
        "images": batch_size,
        "flops": num_steps * flops.step + flops.decoding,
        "peak_flops": timing.measured_peak(),
    }
    builders = {name: functools.partial(torch_side, make) for name, make in theirs.items()}
    for figures in timing.compare(timing.Side(run, timing.device_memory), builders, REPEATS.value, deadline):
        yield row | figures


def main(argv):
    del argv
    deadline = time.monotonic() + TIME_LIMIT.value
    missing = timing.torch_missing()
    report = timing.Report(Path(OUT.value), "sample", timing.notes("sample.py", missing))
    difference = 0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        architecture = workload.architecture_folder(MODEL.value, scratch)
        pipeline = workload.describe(MODEL.value, scratch, DTYPE.value)
        theirs = torch_samplers(architecture, pipeline, timing.torch_sides(compiled=True))
        networks = tuple(random_network(n, jnp.dtype(DTYPE.value)) for n in (pipeline.unet, pipeline.vae))
        flops = functools.cache(functools.partial(flops_of, pipeline))
        for batch_size, num_steps in itertools.product(map(int, BATCH_SIZES.value), map(int, STEPS.value)):
            if time.monotonic() > deadline:
                report.notes["left out"] = f"from {num_steps} steps at batch {batch_size} on: out of time"
                break
            report.add_row(measure(pipeline, networks, batch_size, num_steps, flops(batch_size), theirs, deadline))
        if not missing:
            difference = check(MODEL.value, DTYPE.value, scratch)
            report.notes["largest difference of the images, of 255"] = difference
    print(report.write())
    if difference > TOLERANCE:
        raise SystemExit(f"The images differ by {difference} of 255: the two sides did not do the same work.")


if __name__ == "__main__":
    app.run(main)
