"""One distillation run from its configuration: plan, weights, loop, images, figures, export."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from mlcm_jax.data.latents import LatentFile
from mlcm_jax.data.prompts import open_prompts, read_prompts
from mlcm_jax.distillation.state import Frozen
from mlcm_jax.errors import UserError
from mlcm_jax.hub.fetch import resolve_lora
from mlcm_jax.hub.lora_reader import load_lora
from mlcm_jax.hub.pipeline import Pipeline, load_part, load_pipeline, read_architecture
from mlcm_jax.hub.save import write_json
from mlcm_jax.models import lora
from mlcm_jax.outputs import check_folder
from mlcm_jax.parallel import sharding
from mlcm_jax.parallel.distributed import is_first, meet, say
from mlcm_jax.plots import plot_loss
from mlcm_jax.training import loop
from mlcm_jax.training.checkpoint import Checkpoints, latest_step, read_trained
from mlcm_jax.training.checks import validate
from mlcm_jax.training.compile_steps import Executables, compile_steps
from mlcm_jax.training.export import export, exported_parts
from mlcm_jax.training.input_pipeline import InputPipeline
from mlcm_jax.training.metrics import read_metrics
from mlcm_jax.training.optimizer import stage_learning_rate
from mlcm_jax.training.profiling import Profile, parse_steps
from mlcm_jax.training.program import Program, attention_backend, build_program, program_at, stages_of
from mlcm_jax.training.report import Known
from mlcm_jax.training.resume import CONFIG_FILE, changed_prompts, changed_schedule, check_resume, read_settings
from mlcm_jax.training.reward_monitor import stop_rule
from mlcm_jax.training.sample_grids import SampleGrids
from mlcm_jax.training.stages import read_stages, settings_after
from mlcm_jax.training.text_conditioning import Texts, open_states, read_texts
from mlcm_jax.training.wandb_run import check_wandb
from mlcm_jax.types import Params

CHECKPOINTS = "checkpoints"


def distill(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    plan_only: bool = False,
    compile_only: bool = False,
    new_learning_rate: bool = False,
    profile_steps: str | None = None,
) -> None:
    """Run the whole job: print the plan, compile, train, and leave samples/, figures and export/ in ``workdir``.

    plan_only: stop after the plan. compile_only: stop when the steps are compiled, for jax's compilation cache; the
    teacher's weights are not needed. new_learning_rate: a run that goes on may have other learning rates than before.
    profile_steps: FIRST:STOP, of a trace in workdir/profile.
    Of several processes all must call; the first prints and writes. Raises UserError, before anything is compiled, for
    input that cannot work.
    """
    if not (plan_only or compile_only):
        check_folder("workdir", workdir, remote=True)
    workdir = epath.Path(workdir)
    check_resume(config, workdir, new_learning_rate=new_learning_rate)
    check_wandb(config)
    profile = Profile(*parse_steps(profile_steps), workdir / "profile") if profile_steps else None
    for stage in read_stages(config):
        validate(stage.config)
    prompts, sample_prompts = open_prompts(config.prompts, config.prompts_column), read_prompts(config.sample.prompts)
    program = build_program(config, describe_teacher(config, weights_needed=not (plan_only or compile_only)))
    latents = None
    if config.latents and not plan_only:  # a plan reads no data, and the file may not be made yet
        latents = LatentFile(config.latents, n=len(prompts), latent_shape=program.latent_shape)
    states = open_states(program, prompts, sample_prompts)
    say(program.plan)
    if plan_only:
        return
    start = latest_step(workdir / CHECKPOINTS, set_aside=not compile_only) or 0
    if start:
        say(f"{'going on':>10}  after step {start}{changed_schedule(config, workdir, start)}")
    if compile_only:
        compile_steps(program, start)
        return
    if changed := changed_prompts(prompts, workdir, start):
        say(f"{'prompts':>10}  {config.prompts} {changed}")
    pipeline = load_teacher(program, jnp.dtype(config.frozen_dtype), with_text=states is None)
    starting = None if start else starting_weights(program, pipeline)
    executables = compile_steps(program, start)  # what cannot be read has been refused by now
    meet("loaded")
    texts = read_texts(program, pipeline, sample_prompts, states)
    with closing(InputPipeline(program, pipeline, prompts, latents, states)) as batches:
        trained, steps = train(program, executables, starting, pipeline, batches, texts, workdir, profile)
    del pipeline, batches
    last = settings_after(config, steps)
    export(load_teacher(program, None), trained, last, workdir / "export", format="diffusers")
    say(f"The student is in {workdir / 'export'}, its images are in {workdir / 'samples'}.")


def describe_teacher(config: ConfigDict, *, weights_needed: bool) -> Pipeline:
    """The teacher by its config.json files. Where no weights are needed and it is not in a folder here, the files in
    ``config.architecture`` stand in for it, so that nothing is downloaded to plan or to compile."""
    dtype = jnp.dtype(config.compute_dtype)
    if config.architecture and not weights_needed and not Path(config.teacher).is_dir():
        return read_architecture(config.architecture, dtype)
    return read_architecture(config.teacher, dtype, **_files(config))


def _files(config: ConfigDict) -> dict[str, Any]:
    """Which of the teacher's files are read, as ``load_pipeline`` takes it."""
    keys = {"architecture": "architecture", "variant": "teacher_variant", "revision": "teacher_revision"}
    return {name: config[key] or None for name, key in keys.items()}


def load_teacher(program: Program, param_dtype: Any, *, with_text: bool = True) -> Pipeline:
    """The teacher's pipeline on the program's mesh.

    param_dtype: None keeps the files' dtypes, as an export should. with_text: whether the text encoders' weights are
    read.
    """
    config = program.config

    def shardings(_part, shapes):
        return sharding.param_shardings(shapes, program.mesh, config.sharding_rules)

    pipeline = load_pipeline(
        config.teacher,
        **_files(config),
        dtype=jnp.dtype(config.compute_dtype),
        param_dtype=param_dtype,
        shardings=shardings,
        parts=None if with_text else ("unet", "vae"),
    )
    return pipeline.with_attention(attention_backend(config, program.mesh))


def train(
    program: Program,
    executables: Executables,
    starting: Params | None,
    pipeline: Pipeline,
    batches: InputPipeline,
    texts: Texts,
    workdir: epath.Path,
    profile: Profile | None = None,
) -> tuple[Params, int]:
    """Train to the last step; returns the trained parameters (their moving average where one is kept) and the number
    of steps, which is smaller where the run stopped early.

    starting: as ``Program.init_state`` takes it, for a run that has no checkpoint.
    """
    config = program.config
    if is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(json.loads(config.to_json()), workdir / CONFIG_FILE)
    frozen = Frozen(
        pipeline.unet.params,
        texts.unconditional,
        program.networks.placed(program.frozen.networks, pipeline.vae),
    )
    grids = SampleGrids(program, pipeline, texts)

    # An error, in an image say, must not cut short a checkpoint that is still being written.
    with closing(Checkpoints(workdir / CHECKPOINTS, keep=config.keep_checkpoints)) as checkpoints:
        state = checkpoints.restore(program.state)
        if state is None:
            state = program.init_state(starting)
        state = loop.run(
            state,
            lambda state, given: executables[given.stage.step](state, frozen, given.batch),
            batches,
            config,
            workdir,
            checkpoints,
            known=_known(program),
            sample_fn=grids.progress,
            stop_fn=stop_rule(config, workdir / "metrics.jsonl"),
            profile=profile,
        )
    grids.finish(state, workdir)
    if is_first():
        plot_loss(read_metrics(workdir / "metrics.jsonl"), workdir / "samples" / "loss.png")
    return state.trained, int(state.step)


def _known(program: Program) -> Known:
    schedule, devices = jax.jit(stage_learning_rate(stages_of(program.stages))), program.mesh.size
    return Known(
        learning_rate=lambda step: schedule(step - 1),
        flops=lambda step: program_at(program.stages, step - 1).flops / devices,
    )


def starting_weights(program: Program, pipeline: Pipeline) -> Params | None:
    """What ``Program.init_state`` takes, float32: the teacher's UNet where all weights are trained, for a LoRA the
    one that ``lora.start`` names, if any.

    Raises UserError for a LoRA that is absent or corrupt, and for one of another rank or with other layers.
    """
    config = program.config
    if config.trainable == "lora":
        return _starting_lora(program, pipeline.unet.params) if config.lora.start else None
    mesh, rules = program.mesh, config.sharding_rules
    assert pipeline.source is not None  # it was read by load_teacher
    unet = load_part(
        pipeline.source,
        "unet",
        pipeline.model_index,
        param_dtype=jnp.float32,
        shardings=lambda _part, shapes: sharding.param_shardings(shapes, mesh, rules),
    )
    return unet.params


def _starting_lora(program: Program, unet: Params) -> Params:
    settings = program.config.lora
    file = resolve_lora(settings.start)
    in_file = load_lora(file, unet, dtype=jnp.float32)
    found = lora.scaled(in_file, alpha=settings.rank, rank=settings.alpha)  # undo what ``up`` has in a file
    wanted = jax.tree.map(jnp.shape, program.state.params)
    if jax.tree.map(jnp.shape, found) != wanted:
        raise UserError(
            f"{settings.start} is a LoRA of another rank or with other layers: set config.lora.rank and "
            "config.lora.targets to what it was trained with."
        )
    return found


def read_student(workdir: epath.PathLike, format: str) -> tuple[ConfigDict, Pipeline, Params]:
    """What ``export`` takes for a format: the last settings, the teacher and the newest trained parameters of a run.

    All is put on one device, whatever the run was trained on; nothing is read that the export does not hold.
    Raises UserError when ``workdir`` holds no run or no checkpoint.
    """
    workdir = epath.Path(workdir)
    config = read_settings(workdir)
    if config is None:
        raise UserError(f"{workdir} holds no run: name the --workdir that launch/train.py was given.")
    newest = read_trained(workdir / CHECKPOINTS, SingleDeviceSharding(jax.devices()[0]))
    if newest is None:
        raise UserError(f"{workdir} holds no checkpoint yet: let launch/train.py run to its first one.")
    parts = exported_parts(read_architecture(config.teacher, **_files(config)), config, format)
    pipeline = load_pipeline(config.teacher, parts=parts, **_files(config))
    steps, trained = newest
    return settings_after(config, steps), pipeline, trained
