"""What a run is going to do, said before it starts: parameters, mesh, FLOPs a step, memory."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from mlcm_jax.image_size import ImageSize
from mlcm_jax.parallel.sharding import bytes_per_device, sharded_fraction


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One stage: steps start <= step < end, the method's settings, and the work of a step on average."""

    start: int
    end: int
    states: str
    num_segments: int
    target: str
    flops_per_step: float
    batch_size: int

    def __str__(self) -> str:
        segments = f"{self.num_segments} segment{'s' * (self.num_segments > 1)}"
        return (
            f"steps {self.start + 1} to {self.end}: states {self.states}, {segments}, target {self.target}; "
            f"{self.flops_per_step / 1e12:.3g} TFLOP a step, {self.flops_per_step / self.batch_size / 1e12:.3g} an "
            "example"
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Numbers of a run. Bytes are for one device and hold the arguments of a step; activations come on top."""

    teacher: str
    trainable: str
    trained_parameters: int
    frozen_parameters: int
    mesh: dict[str, int]
    devices: str
    sharded_fraction: float
    image_sizes: tuple[ImageSize, ...]
    batch_size: int
    num_steps: int
    stages: tuple["StagePlan", ...]
    state_bytes: int
    frozen_bytes: int

    def __str__(self) -> str:
        sizes = ", ".join(f"{height} x {width}" for height, width in self.image_sizes)
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        rows = {
            "teacher": self.teacher,
            "training": f"{self.trainable}: {_count(self.trained_parameters)} parameters, "
            f"{_count(self.frozen_parameters)} frozen",
            "devices": f"{self.devices}, mesh {mesh}, {self.sharded_fraction:.1%} of the UNet sharded",
            "images": f"{sizes} px, {self.batch_size} prompts a step, {self.num_steps} steps",
            **{f"stage {i}": str(stage) for i, stage in enumerate(self.stages, 1)},
            "memory": f"{format_bytes(self.state_bytes)} of trained weights and optimizer, "
            f"{format_bytes(self.frozen_bytes)} frozen, on each device, before activations",
        }
        return "\n".join(f"{name:>10}  {text}" for name, text in rows.items())


def make_plan(stages: Sequence[Any], mesh: Mesh, *, image_sizes: tuple[ImageSize, ...], state, frozen) -> Plan:
    """Put the numbers together. stages: program.StageProgram; state, frozen: ShapeDtypeStructs with shardings."""
    config, each = stages[0].stage.config, len(image_sizes)
    by_stage = [stages[i : i + each] for i in range(0, len(stages), each)]
    return Plan(
        teacher=str(config.teacher),
        trainable=config.trainable,
        trained_parameters=_size(state.params),
        frozen_parameters=_size(frozen.teacher) + _size(frozen.networks),
        mesh=dict(mesh.shape),
        devices=f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        sharded_fraction=sharded_fraction(frozen.teacher),
        image_sizes=image_sizes,
        batch_size=config.batch_size,
        num_steps=config.num_steps,
        stages=tuple(_stage_plan(programs) for programs in by_stage if programs[0].stage.start < config.num_steps),
        state_bytes=bytes_per_device(state),
        frozen_bytes=bytes_per_device(frozen),
    )


def _stage_plan(programs: Sequence[Any]) -> StagePlan:
    """Of the programs of a stage, one for each size of images; FLOPs on average."""
    stage, flops = programs[0].stage, sum(program.flops for program in programs) / len(programs)
    config = stage.config
    end = min(stage.end, config.num_steps)  # a run can be shorter than its stages
    return StagePlan(stage.start, end, config.states, config.num_segments, config.target, flops, config.batch_size)


def _size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"


def format_bytes(n: int) -> str:
    """Bytes as a person reads them: 1.25 GB or 20.5 MB."""
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
