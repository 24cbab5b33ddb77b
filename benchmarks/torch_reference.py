"""The same work in PyTorch and diffusers, to measure and check against: networks, LoRA, training step, sampling.

Written for the comparison as one would write it in PyTorch: diffusers' networks, PEFT's LoRA, AdamW, autocast.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import peft
import torch
from flax import traverse_util
from ml_collections import ConfigDict

from mlcm_jax.diffusion.scheduler_config import LAST_TIMESTEP
from mlcm_jax.distillation.segments import boundaries
from mlcm_jax.hub import names
from mlcm_jax.models.lora import target_modules
from mlcm_jax.types import Params

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def random_network(cls: Any, config: dict[str, Any], device: Any = "cpu", dtype=torch.float32):
    """A network whose layers keep the size of what goes through them; nothing is left at zero or one."""
    if hasattr(cls, "from_config"):  # diffusers' have no buffers, and are made without their own slow start
        with torch.device("meta"):
            model = cls.from_config(config)
        model = model.to(dtype).to_empty(device=device)
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


def read_network(folder: Path, device: Any, dtype: torch.dtype):
    """The random network of a folder's config.json, for the device."""
    config = json.loads((folder / "config.json").read_text())
    model = random_network(getattr(diffusers, config["_class_name"]), config, device, dtype)
    return model.requires_grad_(False).to(memory_format=torch.channels_last)


def copy_params(model: torch.nn.Module, params: Params) -> None:
    """Give a network the numbers of a Flax tree."""
    targets = dict(model.named_parameters())
    for path, leaf, torch_names in names.walk(params):
        layers = np.asarray(leaf, np.float32)
        for name, layer in zip(torch_names, layers if names.is_stacked(path) else layers[None], strict=True):
            targets.pop(name).data.copy_(torch.from_numpy(np.array(names.to_torch(path, layer))))
    if targets:
        raise ValueError(f"the tree lacks {', '.join(targets)}")


def add_lora(unet: Any, shapes: Params, config: ConfigDict) -> None:
    """PEFT's LoRA on the layers that ``config.lora.targets`` select; its factors are float32 and are trained."""
    chosen = target_modules(shapes, config.lora.targets)
    modules = [
        name.removesuffix(".weight")
        for path, leaf in chosen.items()
        for name in names.tensor_names((*path, "kernel"), leaf.shape[0])
    ]
    unet.add_adapter(peft.LoraConfig(r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=modules))
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def copy_lora(unet: torch.nn.Module, lora: Params) -> None:
    """Give PEFT's factors the numbers of a LoRA tree (models/lora.py), not scaled."""
    targets = {name: p for name, p in unet.named_parameters() if "lora_" in name}
    for (*module, factor), leaf in traverse_util.flatten_dict(lora).items():
        path = (*module, "kernel")
        peft_name = {"down": "lora_A", "up": "lora_B"}[factor]
        layers = np.asarray(leaf, np.float32)
        layers = layers if names.is_stacked(path) else layers[None]
        for name, layer in zip(names.tensor_names(path, len(layers)), layers, strict=True):
            parameter = targets.pop(f"{name.removesuffix('.weight')}.{peft_name}.default.weight")
            parameter.data.copy_(torch.from_numpy(np.array(names.to_torch(path, layer))))
    if targets:
        raise ValueError(f"the tree lacks {', '.join(targets)}")


class Conditioning(NamedTuple):
    """What diffusers' SDXL UNet is told beside latents and time."""

    hidden_states: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor


class StepInputs(NamedTuple):
    """Inputs of a step, channels-first: steps since noise, that noise, a timestep in the next state's segment."""

    conditioning: Conditioning
    trajectory_step: torch.Tensor
    guidance_scale: torch.Tensor
    noise: torch.Tensor
    next_timesteps: torch.Tensor


def to_torch(array: Any, device: Any) -> torch.Tensor:
    """A tensor of equal values; floating point becomes float32."""
    array = np.array(array)
    kind = np.int64 if np.issubdtype(array.dtype, np.integer) else np.float32
    return torch.from_numpy(array.astype(kind)).to(device)


def to_conditioning(conditioning: Any, device: Any, dtype: torch.dtype) -> Conditioning:
    """From a types.TextConditioning."""
    parts = (to_torch(getattr(conditioning, field), device) for field in Conditioning._fields)
    hidden_states, pooled, time_ids = parts
    return Conditioning(hidden_states.to(dtype), pooled.to(dtype), time_ids)


def make_rows(batch: Any, draws: dict[str, np.ndarray], device: Any, dtype: torch.dtype) -> StepInputs:
    """From a types.Batch and workload.draws_at."""
    noise = to_torch(draws["noise"], device).permute(0, 3, 1, 2).contiguous()
    numbers = (to_torch(a, device) for a in (batch.trajectory_step, batch.guidance_scale))
    trajectory_step, guidance_scale = numbers
    next_timesteps = to_torch(draws["next_timesteps"], device)
    return StepInputs(
        to_conditioning(batch.conditioning, device, dtype), trajectory_step, guidance_scale, noise, next_timesteps
    )


class TrainStep:
    """One update with streamed states (distillation/states/streaming.py): call it with a step's inputs, get the loss.

    The teacher's guided prediction gives the short step to t_n and the step to the example's next state; the student is
    compared with itself at t_n, at the end of the segment. ``evaluations`` counts what the UNets were called with.
    """

    def __init__(self, teacher, student, alphas_cumprod, unconditional: Conditioning, config: ConfigDict):
        self.teacher, self.student, self.config, self.unconditional = teacher, student, config, unconditional
        self.device = unconditional.pooled.device
        self.alphas_cumprod = to_torch(alphas_cumprod, self.device)
        self.boundaries = to_torch(boundaries(config.num_segments), self.device)
        self.trained = [p for p in student.parameters() if p.requires_grad]
        o = config.optim
        self.optimizer = torch.optim.AdamW(
            self.trained,
            o.learning_rate,
            betas=(o.b1, o.b2),
            eps=o.eps,
            weight_decay=o.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.trajectory_buffer, self.evaluations = None, 0

    def compiled(self) -> "TrainStep":
        """The same step with both networks compiled in place."""
        self.teacher.compile(dynamic=False)
        self.student.compile(dynamic=False)
        return self

    def _scales(self, t):
        a = self.alphas_cumprod[t][:, None, None, None]
        return a.sqrt(), (1 - a).sqrt()

    def _x0(self, output, z, t):
        alpha, sigma = self._scales(t)
        return (z - sigma * output.float()) / alpha

    def _ddim(self, z, x0, t, s):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self._scales(t), self._scales(s)
        return alpha_s * x0 + sigma_s / sigma_t * (z - alpha_t * x0)

    def _predict(self, unet, z, t, c: Conditioning):
        self.evaluations += len(z)
        dtype = DTYPES[self.config.compute_dtype]
        added = {"text_embeds": c.pooled, "time_ids": c.time_ids}
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return unet(z.to(dtype), t, c.hidden_states, added_cond_kwargs=added).sample

    def _teacher_x0(self, inputs: StepInputs, z, t):
        pairs = zip(self.unconditional, inputs.conditioning, strict=True)
        both = Conditioning(*(torch.cat([no.expand(len(z), *no.shape[1:]), yes]) for no, yes in pairs))
        uncond, cond = self._predict(self.teacher, torch.cat([z, z]), torch.cat([t, t]), both).float().chunk(2)
        return self._x0(uncond + inputs.guidance_scale[:, None, None, None] * (cond - uncond), z, t)

    def _answer(self, inputs: StepInputs, z, t, boundary):
        return self._ddim(z, self._x0(self._predict(self.student, z, t, inputs.conditioning), z, t), t, boundary)

    @torch.no_grad()
    def _states(self, inputs: StepInputs):
        z, t = self.trajectory_buffer or (inputs.noise, torch.full_like(inputs.trajectory_step, LAST_TIMESTEP))
        fresh = inputs.trajectory_step == 0
        t = torch.where(fresh, LAST_TIMESTEP, t)
        z = torch.where(fresh[:, None, None, None], inputs.noise, z)
        boundary = self.boundaries[(inputs.trajectory_step - 1).clamp(min=0) + 1]
        t_n = torch.maximum(t - self.config.skip, boundary)
        x0 = self._teacher_x0(inputs, z, t)
        t_next = torch.minimum(inputs.next_timesteps, t - 1)
        self.trajectory_buffer = (self._ddim(z, x0, t, t_next), t_next)
        z_n = self._ddim(z, x0, t, t_n)
        at_boundary = (t_n == boundary)[:, None, None, None]
        return z, t, boundary, torch.where(at_boundary, z_n, self._answer(inputs, z_n, t_n, boundary))

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        z, t, boundary, target = self._states(inputs)
        loss = (self._answer(inputs, z, t, boundary) - target).square().mean()  # t is never at the boundary
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.config.optim.clip_norm)
        self.optimizer.step()
        return loss.detach()


def make_train_step(program: Any, unconditional: Any, device: Any, teacher_params=None, lora=None) -> TrainStep:
    """The step of a mlcm_jax.training.program.Program, with its own random weights or with equal ones.

    teacher_params: also the weights that full training starts from. lora: factors to start from.
    """
    config, folder = program.config, Path(program.config.teacher) / "unet"
    frozen = DTYPES[config.frozen_dtype]
    teacher = read_network(folder, device, frozen)
    student = read_network(folder, device, torch.float32 if config.trainable == "full" else frozen)
    if teacher_params is not None:
        copy_params(teacher, teacher_params)
        copy_params(student, teacher_params)
    if config.trainable == "lora":
        add_lora(student, program.frozen.teacher, config)
        if lora is not None:
            copy_lora(student, lora)
    else:
        student.requires_grad_(True)
    if config.remat:
        student.enable_gradient_checkpointing()
    student.train(config.remat)  # diffusers recomputes in training mode only; there is no dropout
    conditioning = to_conditioning(unconditional, device, frozen)
    return TrainStep(teacher, student, program.schedule.alphas_cumprod, conditioning, config)


class Sampler:
    """A few TCD steps without guidance and the decoding of images one at a time: noise in, uint8 images out."""

    def __init__(self, folder: Path, scheduler_config: dict[str, Any], device: Any, dtype: torch.dtype):
        self.unet, self.vae = (read_network(folder / part, device, dtype).eval() for part in ("unet", "vae"))
        self.vae.enable_slicing()
        scheduler: Any = diffusers.TCDScheduler  # pyright: ignore[reportPrivateImportUsage]
        self.scheduler = scheduler.from_config(scheduler_config)
        self.device, self.dtype = device, dtype

    def compiled(self) -> "Sampler":
        """The same with the network and the decoder compiled in place."""
        self.unet.compile(dynamic=False)
        self.vae.decoder.compile(dynamic=False)
        return self

    @torch.no_grad()
    def __call__(self, noise: torch.Tensor, conditioning: Conditioning, num_steps: int) -> np.ndarray:
        added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids}
        self.scheduler.set_timesteps(num_steps, device=self.device)
        z = noise
        for t in self.scheduler.timesteps:
            out = self.unet(z.to(self.dtype), t, conditioning.hidden_states, added_cond_kwargs=added).sample
            z = self.scheduler.step(out.float(), t, z, eta=0.0).prev_sample
        images = self.vae.decode((z / self.vae.config.scaling_factor).to(self.dtype)).sample.float()
        return (images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
