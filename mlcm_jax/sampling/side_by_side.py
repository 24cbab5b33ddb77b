"""A student beside its teacher: the same prompt from the same noise, each image with the time that it took."""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mlcm_jax.diffusion.samplers import step_table
from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import Network, Pipeline
from mlcm_jax.image_size import ImageSize
from mlcm_jax.sampling.control import Control
from mlcm_jax.sampling.sample import takes_negative_prompt
from mlcm_jax.sampling.text_to_image import TextToImage


@dataclasses.dataclass(frozen=True)
class Request:
    """What an image is asked for with: arguments of ``TextToImage``.

    image_size: height and width in pixels. lora: PLACE or PLACE:SCALE, of the student alone; "": none.
    control_image: what the ControlNet follows; None: it adds nothing.
    """

    prompt: str
    image_size: ImageSize
    negative_prompt: str = ""
    num_steps: int = 4
    seed: int = 0
    lora: str = ""
    control_image: Image.Image | None = None
    control_scale: float = 1.0


class Sample(NamedTuple):
    """seconds: from the prompt to the image, without compilation."""

    image: UInt8[np.ndarray, "H W 3"]
    seconds: float


@dataclasses.dataclass(frozen=True)
class TimedSampler:
    """A model of the comparison. num_steps: None takes the request's. guidance_scale: None takes the usual one."""

    model: TextToImage
    num_steps: int | None = None
    guidance_scale: float | None = None
    controlnet: Network | None = None
    _compiled: set[Any] = dataclasses.field(default_factory=set)

    def with_lora(self, lora: str) -> "TimedSampler":
        """The same with a LoRA; it shares the programs. Raises UserError as ``TextToImage.with_loras`` does."""
        return dataclasses.replace(self, model=self.model.with_loras(lora)) if lora.strip() else self

    @property
    def takes_negative_prompt(self) -> bool:
        return takes_negative_prompt(self.model.pipeline, self.guidance_scale)

    def __call__(self, request: Request) -> Sample:
        """The image, made twice where the programs had to be compiled first; errors are ``TextToImage``'s."""
        num_steps, image = self.num_steps or request.num_steps, request.control_image
        controls = [Control(self.controlnet, image, request.control_scale)] if self.controlnet and image else []
        settings: dict[str, Any] = {"num_steps": num_steps, "guidance_scale": self.guidance_scale}
        settings |= {"seed": request.seed, "image_size": request.image_size, "controls": controls}
        settings |= {"negative_prompt": request.negative_prompt if self.takes_negative_prompt else ""}
        program = self._program(num_steps, request.image_size, bool(controls))
        if program not in self._compiled:
            self.model(request.prompt, **settings)
            self._compiled.add(program)
        begin = time.perf_counter()
        (image,) = self.model(request.prompt, **settings)
        return Sample(image, time.perf_counter() - begin)

    def _program(self, num_steps: int, image_size: ImageSize, controlled: bool) -> tuple:
        """What the compiled programs depend on, beside the model."""
        table = step_table(self.model.pipeline.scheduler_config, num_steps)
        shapes = tuple((name, array.shape, array.dtype.name) for name, array in table.arrays.items())
        adds_noise = bool(table.noise.any())
        return shapes, adds_noise, table.prediction_type, self.takes_negative_prompt, image_size, controlled


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """A function from requests to samples: the student's, and then the teacher's where there is one."""

    student: TimedSampler
    teacher: TimedSampler | None = None

    @property
    def size_multiple(self) -> int:
        """What divides height and width in pixels of all images that the models can take."""
        return int(np.lcm.reduce([sampler.model.pipeline.size_multiple for sampler in self._samplers()]))

    def __call__(self, request: Request) -> Iterator[Sample]:
        """The samples as they are made, from one noise.

        Raises UserError, before anything is compiled, for a request that cannot work.
        """
        if not request.prompt.strip():
            raise UserError("There is no prompt: write what the image is to show.")
        student = self.student.with_lora(request.lora)
        if request.negative_prompt.strip() and not student.takes_negative_prompt:
            raise UserError("The student takes no guidance, so a negative prompt does nothing: leave it empty.")
        for sampler in self._samplers():
            sampler.model.pipeline.latent_shape(request.image_size)  # answers a size that only one of them can take
        yield student(request)
        if self.teacher:
            yield self.teacher(request)

    def _samplers(self) -> list[TimedSampler]:
        return [self.student, self.teacher] if self.teacher else [self.student]


def check_shared_noise(pipelines: Mapping[str, Pipeline], image_size: ImageSize | None = None) -> None:
    """Raise UserError for two models, by what a message calls them, whose noise and images have other shapes.

    image_size: height and width in pixels; None: what each UNet was trained on.
    """
    sizes = {name: image_size or pipeline.image_size for name, pipeline in pipelines.items()}
    shapes = {name: (pipeline.latent_shape(sizes[name]), sizes[name]) for name, pipeline in pipelines.items()}
    if len(set(shapes.values())) > 1:
        (model, its), (other, others) = (
            (name, f"latents {list(shape)} and images of {h} x {w} px") for name, (shape, (h, w)) in shapes.items()
        )
        raise UserError(
            f"The {model} has {its}, the {other} {others}: name a {model} that was distilled from this {other}."
        )
