"""Looking at a run: the same prompts from the same noise, sampled by teacher and student again and again."""

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mlcm_jax import rng
from mlcm_jax.diffusion.scheduler_config import NUM_TRAIN_TIMESTEPS
from mlcm_jax.distillation.state import TrainState, student_variables
from mlcm_jax.hub.pipeline import Network, Pipeline
from mlcm_jax.hub.save import write_json
from mlcm_jax.hub.vae import load_vae
from mlcm_jax.images import image_grid, write_image
from mlcm_jax.parallel.distributed import host_array, is_first
from mlcm_jax.plots import labelled_grid, plot_closeness
from mlcm_jax.rules import POSITIVE, Rule, check_rules
from mlcm_jax.sampling.decode import decode
from mlcm_jax.sampling.sample import draw_noise, latent_distance, sample_latents
from mlcm_jax.training.export import ddim_scheduler_config, student_network, student_scheduler_config
from mlcm_jax.training.program import Program
from mlcm_jax.training.stages import settings_after
from mlcm_jax.training.text_conditioning import Texts
from mlcm_jax.types import HostLatents


def check(config: ConfigDict) -> None:
    """Raise UserError for settings of the sample grids that cannot work."""
    most = NUM_TRAIN_TIMESTEPS
    counts = Rule(lambda v: len(v) > 0 and all(1 <= n <= most for n in v), f"a list of numbers from 1 to {most}")
    check_rules(
        config,
        {"sample.steps": counts, "sample.teacher_steps": POSITIVE, "sample.teacher_few_steps": POSITIVE},
    )


class SampleGrids:
    """Samples the same images again and again: fixed prompts, fixed noise. Of several processes all must call."""

    def __init__(self, program: Program, pipeline: Pipeline, texts: Texts):
        config, n = program.config, len(texts.sample.pooled)
        self._program, self._pipeline, self._sample = program, pipeline, config.sample
        self._noise = draw_noise(config.seed, n, program.latent_shape)
        self._fresh_noise = rng.stream(config.seed, "sample_grids", 0)  # of samplers that add some
        self._conditioning = texts.sample
        self._unconditional = jax.tree.map(lambda row: jnp.broadcast_to(row, (n, *row.shape[1:])), texts.unconditional)
        self._reference, self._preview_vae = None, pipeline.vae
        if config.sample.preview_vae:
            self._preview_vae = load_vae(config.sample.preview_vae, pipeline, dtype=jnp.dtype(config.compute_dtype))

    def teacher(self, num_steps: int) -> HostLatents:
        """Latents of the teacher, by DDIM: the solver that the student was distilled from."""
        scheduler = ddim_scheduler_config(self._pipeline.scheduler_config)
        return self._latents(self._pipeline.unet, None, scheduler, self._program.config.guidance_scale, num_steps)

    def reference(self) -> HostLatents:
        if self._reference is None:
            self._reference = self.teacher(self._sample.teacher_steps)
        return self._reference

    def student(self, state: TrainState, num_steps: int) -> HostLatents:
        config = settings_after(self._program.config, int(state.step))
        scheduler = student_scheduler_config(
            self._pipeline.scheduler_config, config.sampler, config.student_prediction_type
        )
        variables = student_variables(state.trained, self._pipeline.unet.params, config)
        scale = config.guidance_scale if config.guidance_embedding_dim else 1.0
        return self._latents(student_network(self._pipeline.unet, config), variables, scheduler, scale, num_steps)

    def progress(self, state: TrainState) -> np.ndarray:
        """A row of the teacher's images above rows of the student's, one for each number of steps."""
        latents = [self.reference(), *(self.student(state, n) for n in self._sample.steps)]
        images = np.concatenate([decode(self._preview_vae, z) for z in latents])
        return image_grid(images, columns=len(self._noise))

    def finish(self, state: TrainState, workdir: epath.Path) -> None:
        """The grid and the plot of the finished run, and their numbers in results.json."""
        sample = self._sample
        student = {n: self.student(state, n) for n in sample.steps}
        few = self.teacher(sample.teacher_few_steps)
        reference_name = f"teacher's {sample.teacher_steps}-step sample"
        columns = {
            f"teacher {sample.teacher_steps} steps": self.reference(),
            **{f"student {n} step{'s' if n > 1 else ''}": z for n, z in student.items()},
            f"teacher {sample.teacher_few_steps} steps": few,
        }
        images = {name: decode(self._pipeline.vae, z) for name, z in columns.items()}
        distances = {
            "student": {n: float(latent_distance(z, self.reference()).mean()) for n, z in student.items()},
            "teacher": {n: float(latent_distance(self.teacher(n), self.reference()).mean()) for n in sample.steps},
        }
        if not is_first():
            return
        folder = workdir / "samples"
        folder.mkdir(exist_ok=True)
        write_image(labelled_grid(images, blocks=2), folder / "final.png")
        panel = f"mean squared latent distance\nto the {reference_name}"
        plot_closeness({panel: distances}, folder / "closeness.png")
        key = f"latent_mse_to_the_teacher's_{sample.teacher_steps}-step_result"
        write_json({key: distances}, workdir / "results.json")

    def _latents(
        self, unet: Network, variables, scheduler_config, guidance_scale: float, num_steps: int
    ) -> HostLatents:
        latents = sample_latents(
            unet,
            scheduler_config,
            self._noise,
            self._conditioning,
            self._unconditional,
            guidance_scale=guidance_scale,
            num_steps=num_steps,
            variables=variables,
            rng=self._fresh_noise,
        )
        return host_array(latents)
