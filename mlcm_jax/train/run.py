"""One distillation run from its configuration: plan, weights, loop, pictures, figures, export."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mlcm_jax import sharding
from mlcm_jax.checkpoint import Checkpoints, latest_step
from mlcm_jax.config import base, validate
from mlcm_jax.data.latents import LatentFile
from mlcm_jax.data.prompts import open_prompts, read_prompts
from mlcm_jax.errors import UserError
from mlcm_jax.export import export
from mlcm_jax.hub.fetch import resolve_lora
from mlcm_jax.hub.load import read_json
from mlcm_jax.hub.lora import FILE_NAME as LORA_FILE
from mlcm_jax.hub.lora import load_lora
from mlcm_jax.hub.pipeline import Pipeline, load_part, load_pipeline, read_architecture
from mlcm_jax.hub.save import write_json
from mlcm_jax.models import lora
from mlcm_jax.pictures import plot_loss
from mlcm_jax.train import loop
from mlcm_jax.train.compile import Executables, compile_steps
from mlcm_jax.train.feed import Feed
from mlcm_jax.train.guard import stop_rule
from mlcm_jax.train.metrics import read_metrics
from mlcm_jax.train.program import Program, attention_backend, build_program
from mlcm_jax.train.stages import read_stages
from mlcm_jax.train.step import Frozen
from mlcm_jax.train.texts import Texts, open_states, read_texts
from mlcm_jax.train.viewer import Viewer
from mlcm_jax.types import Params

# Settings that may change when a run goes on: they say how long, how often and on what, not what is trained.
MAY_CHANGE = (
    "num_steps",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "sample_every",
    "sample",
    "mesh",
    "attention",
    "unroll",
)
CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"


def distill(config: ConfigDict, workdir: str | Path, *, plan_only: bool = False, compile_only: bool = False) -> None:
    """Run the whole job: print the plan, compile, train, and leave samples/, figures and export/ in ``workdir``.

    plan_only: stop after the plan. compile_only: stop when the steps are compiled, for jax's compilation cache; the
    teacher's weights are not needed. Raises UserError, before anything is compiled, for input that cannot work.
    """
    workdir = Path(workdir)
    _check_resume(config, workdir)
    for stage in read_stages(config):
        validate(stage.config)
    prompts, sample_prompts = open_prompts(config.prompts, config.prompts_column), read_prompts(config.sample.prompts)
    program = build_program(config, describe_teacher(config, weights_needed=not (plan_only or compile_only)))
    latents = None
    if config.latents:
        latents = LatentFile(config.latents, n=len(prompts), latent_shape=program.latent_shape)
    states = open_states(program, prompts, sample_prompts)
    print(program.plan, flush=True)
    if plan_only:
        return
    executables = compile_steps(program, latest_step(workdir / CHECKPOINTS) or 0)
    if compile_only:
        return
    pipeline = load_teacher(program, jnp.dtype(config.frozen_dtype), with_text=states is None)
    texts = read_texts(program, pipeline, sample_prompts, states)
    with closing(Feed(program, pipeline, prompts, latents, states)) as feed:
        trained = train(program, executables, pipeline, feed, texts, workdir)
    del pipeline
    export(load_teacher(program, None), trained, config, workdir / "export", format="diffusers")
    print(f"The student is in {workdir / 'export'}, its pictures are in {workdir / 'samples'}.")


def describe_teacher(config: ConfigDict, *, weights_needed: bool) -> Pipeline:
    """The teacher by its config.json files. Where no weights are needed and it is not in a folder here, the files in
    ``config.architecture`` stand in for it, so that nothing is downloaded to plan or to compile."""
    dtype = jnp.dtype(config.compute_dtype)
    if config.architecture and not weights_needed and not Path(config.teacher).is_dir():
        return read_architecture(config.architecture, dtype)
    return read_architecture(config.teacher, dtype, **_files(config))


def _files(config: ConfigDict) -> dict[str, str | None]:
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
    pipeline: Pipeline,
    feed: Feed,
    texts: Texts,
    workdir: Path,
) -> Params:
    """Train to the last step; returns the trained parameters (their moving average where one is kept)."""
    config = program.config
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(json.loads(config.to_json()), workdir / CONFIG_FILE)
    frozen = Frozen(
        pipeline.unet.params,
        texts.unconditional,
        program.auxiliary.placed(program.frozen.auxiliary, pipeline.vae),
    )
    viewer = Viewer(program, pipeline, texts)

    state = loop.run(
        program.init_state(starting_weights(program, pipeline)),
        lambda state, fed: executables[fed.stage.step](state, frozen, fed.batch),
        feed,
        config,
        workdir,
        sample_fn=viewer.progress,
        stop_fn=stop_rule(config, workdir / "metrics.jsonl"),
    )
    viewer.finish(state, workdir)
    plot_loss(read_metrics(workdir / "metrics.jsonl"), workdir / "samples" / "loss.png")
    return state.trained


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
    file = resolve_lora(settings.start, LORA_FILE)
    in_file = load_lora(file, unet, dtype=jnp.float32)
    found = lora.scaled(in_file, alpha=settings.rank, rank=settings.alpha)  # undo what ``up`` has in a file
    wanted = jax.tree.map(jnp.shape, program.state.params)
    if jax.tree.map(jnp.shape, found) != wanted:
        raise UserError(
            f"{settings.start} is a LoRA of another rank or with other layers: set config.lora.rank and "
            "config.lora.targets to what it was trained with."
        )
    return found


def restore(workdir: str | Path) -> tuple[ConfigDict, Pipeline, Params]:
    """The configuration, the teacher and the newest trained parameters of a run.

    Raises UserError when ``workdir`` holds no run or no checkpoint.
    """
    workdir = Path(workdir)
    if not (workdir / CONFIG_FILE).is_file():
        raise UserError(f"{workdir} holds no run: name the --workdir that launch/train.py was given.")
    config = ConfigDict({**base().to_dict(), **read_json(workdir / CONFIG_FILE)})  # an older run lacks newer settings
    program = build_program(config, describe_teacher(config, weights_needed=True))
    state = Checkpoints(workdir / "checkpoints").restore(program.state)
    if state is None:
        raise UserError(f"{workdir} holds no checkpoint yet: let launch/train.py run to its first one.")
    return config, load_teacher(program, None), state.trained


def _check_resume(config: ConfigDict, workdir: Path) -> None:
    """Raise UserError when ``workdir`` holds a run with other settings."""
    if not (workdir / CONFIG_FILE).is_file():
        return
    before, now = read_json(workdir / CONFIG_FILE), json.loads(config.to_json())
    changed = [k for k in now if k not in MAY_CHANGE and before.get(k) != now[k]]
    if changed:
        raise UserError(
            f"{workdir} holds a run with other settings ({', '.join(changed)}): use another --workdir, or the settings "
            f"in {workdir / CONFIG_FILE}."
        )
