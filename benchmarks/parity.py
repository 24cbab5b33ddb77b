"""Our networks against diffusers' and transformers' on the same weights: python benchmarks/parity.py [--full].

Prints a Markdown table: largest difference as a part of the output's largest value, parameters, seconds and memory of
either. Each network runs in two processes, one after the other, so that only one copy is in memory: torch fills the
weights with noise (or reads the embedded teacher's), writes them as safetensors and keeps its output; we read the
files. All is float32. --full adds SDXL's own sizes; its UNet's weights are 10.3 GB, in memory and on disk.
"""

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from parity_cases import cases, make_inputs, read_config

FULL = flags.DEFINE_bool("full", False, "SDXL's networks at their own sizes, too.")
ONLY = flags.DEFINE_string("only", "", "Run only the rows whose name contains this.")
THREADS = flags.DEFINE_integer("threads", 1, "Threads of torch; bind the process to as many cores for ours.")
OUT = flags.DEFINE_string("out", "", "File for the table; empty: only print it.")
SCRATCH = flags.DEFINE_string("scratch", "", "Folder for the weights; empty: the system's temporary folder.")
WORKER = flags.DEFINE_enum("worker", None, ["torch", "jax"], "Used by the program itself.")
CASE = flags.DEFINE_string("case", "", "Used by the program itself.")


def timed(call):
    """(output, seconds of the second of two calls)."""
    call()
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def run_torch(class_name, source, trained, folder: Path) -> dict[str, Any]:
    import diffusers
    import torch
    import transformers

    torch.set_num_threads(THREADS.value)
    cls: Any = getattr(diffusers, class_name, None) or getattr(transformers, class_name)
    if trained:
        model = cls.from_pretrained(source, torch_dtype=torch.float32)
    else:
        model = _noise(cls, read_config(source), torch)
    model.eval().save_pretrained(folder)
    inputs = {k: torch.from_numpy(v) for k, v in make_inputs(class_name, read_config(source)).items()}
    with torch.no_grad():
        outputs, seconds = timed(lambda: TORCH_CALLS[class_name](model, **inputs))
    np.savez(folder / "torch.npz", *[o.numpy() for o in outputs])
    return {"seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())}


def _noise(cls, config, torch):
    """A network whose layers keep the size of what goes through them; nothing is left at zero or one."""
    if hasattr(cls, "from_config"):  # diffusers' have no buffers, and are made without their own slow start
        with torch.device("meta"):
            model = cls.from_config(config)
        model = model.to_empty(device="cpu")
    else:
        model = cls(cls.config_class(**config))
    torch.manual_seed(0)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            is_norm = isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm)
            width = math.sqrt(3 / parameter[0].numel()) if parameter.ndim > 1 else 0.5
            parameter.data.uniform_(-width, width)
            if is_norm and parameter is module.weight:
                parameter.data += 1
    return model


def _torch_unet(model, sample, timesteps, hidden_states, pooled, time_ids, guidance=None):
    added = {"text_embeds": pooled, "time_ids": time_ids}
    x = sample.permute(0, 3, 1, 2)
    out = model(x, timesteps, hidden_states, timestep_cond=guidance, added_cond_kwargs=added).sample
    return [out.permute(0, 2, 3, 1)]


def _torch_controlnet(model, sample, timesteps, hidden_states, pooled, time_ids, image):
    added = {"text_embeds": pooled, "time_ids": time_ids}
    x, condition = (array.permute(0, 3, 1, 2) for array in (sample, image))
    out = model(x, timesteps, hidden_states, controlnet_cond=condition, added_cond_kwargs=added)
    return [r.permute(0, 2, 3, 1) for r in (*out.down_block_res_samples, out.mid_block_res_sample)]


def _torch_vae(model, images, latents):
    mean = model.encode(images.permute(0, 3, 1, 2)).latent_dist.mean
    return [mean.permute(0, 2, 3, 1), model.decode(latents.permute(0, 3, 1, 2)).sample.permute(0, 2, 3, 1)]


def _torch_text(model, ids):
    out = model(input_ids=ids, output_hidden_states=True)
    pooled = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
    return [out.hidden_states[-2], out.last_hidden_state, pooled]


def _torch_adapter(model, images):
    return [feature.permute(0, 2, 3, 1) for feature in model(images.permute(0, 3, 1, 2))]


TORCH_CALLS = {
    "UNet2DConditionModel": _torch_unet,
    "ControlNetModel": _torch_controlnet,
    "AutoencoderKL": _torch_vae,
    "T2IAdapter": _torch_adapter,
    "CLIPTextModel": _torch_text,
    "CLIPTextModelWithProjection": _torch_text,
}


def run_jax(class_name, source, folder: Path) -> dict[str, Any]:
    import jax

    from mlcm_jax.hub.pipeline import load_network

    network = load_network(folder, class_name)
    inputs = make_inputs(class_name, read_config(source))
    call = jax.jit(JAX_CALLS[class_name], static_argnums=0)
    outputs, seconds = timed(lambda: jax.block_until_ready(call(network.module, network.params, **inputs)))
    np.savez(folder / "jax.npz", *[np.asarray(o) for o in outputs])
    return {"seconds": seconds}


def _jax_unet(module, params, sample, timesteps, hidden_states, pooled, time_ids, guidance=None):
    from mlcm_jax.types import TextConditioning

    conditioning = TextConditioning(hidden_states, pooled, time_ids)
    return [module.apply({"params": params}, sample, timesteps, conditioning, guidance)]


def _jax_controlnet(module, params, sample, timesteps, hidden_states, pooled, time_ids, image):
    from mlcm_jax.types import TextConditioning

    conditioning = TextConditioning(hidden_states, pooled, time_ids)
    residuals = module.apply({"params": params}, sample, timesteps, conditioning, image)
    return [*residuals.down, residuals.mid]


def _jax_vae(module, params, images, latents):
    mean, _ = module.apply({"params": params}, images, method="encode")
    return [mean, module.apply({"params": params}, latents, method="decode")]


def _jax_text(module, params, ids):
    out = module.apply({"params": params}, ids)
    return [out.penultimate, out.last_hidden_state, out.pooled]


def _jax_adapter(module, params, images):
    return list(module.apply({"params": params}, images))


JAX_CALLS = {
    "UNet2DConditionModel": _jax_unet,
    "ControlNetModel": _jax_controlnet,
    "AutoencoderKL": _jax_vae,
    "T2IAdapter": _jax_adapter,
    "CLIPTextModel": _jax_text,
    "CLIPTextModelWithProjection": _jax_text,
}


def run_worker() -> None:
    """One side of one row; prints a JSON object."""
    class_name, source, trained = cases(full=True)[CASE.value]
    folder = Path(SCRATCH.value)
    if WORKER.value == "torch":
        result = run_torch(class_name, source, trained, folder)
    else:
        result = run_jax(class_name, source, folder)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result | {"memory": memory}))


def start_worker(side: str, case: str, folder: str) -> dict[str, Any]:
    command = [sys.executable, __file__, f"--worker={side}", f"--case={case}", f"--scratch={folder}"]
    done = subprocess.run([*command, f"--threads={THREADS.value}"], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def largest_error(folder: Path) -> float:
    """Over a row's outputs, the largest difference as a part of the largest value."""
    with np.load(folder / "torch.npz") as theirs, np.load(folder / "jax.npz") as ours:
        errors = [np.abs(ours[k] - theirs[k]).max() / np.abs(theirs[k]).max() for k in theirs.files]
    return float(max(errors))


HEADER = [
    "| network | parameters | largest error | seconds, ours | torch | memory, ours | torch |",
    "|---|---|---|---|---|---|---|",
]


def main(argv):
    del argv
    if WORKER.value:
        return run_worker()
    lines = list(HEADER)
    print("\n".join(lines), flush=True)
    for case in (row for row in cases(FULL.value) if ONLY.value in row):
        with tempfile.TemporaryDirectory(dir=SCRATCH.value or None) as folder:
            theirs, ours = (start_worker(side, case, folder) for side in ("torch", "jax"))
            error = largest_error(Path(folder))
        gigabytes = [f"{side['memory'] / 1e9:.1f} GB" for side in (ours, theirs)]
        seconds = [f"{side['seconds']:.3g}" for side in (ours, theirs)]
        row = [case, f"{theirs['parameters'] / 1e6:.1f} M", f"{error:.1e}", *seconds, *gigabytes]
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
    if OUT.value:
        Path(OUT.value).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    app.run(main)
