"""Every setting of a distillation run, once, with its default, unit and meaning; files in configs/ override them.

A configuration is locked: a misspelt key is an error that names the nearest real one.
"""

from ml_collections import ConfigDict

from mlcm_jax.distillation.distances import DISTANCES
from mlcm_jax.distillation.losses.preference import FORMS
from mlcm_jax.distillation.segments import LAST_TIMESTEP, MAX_SEGMENTS
from mlcm_jax.distillation.states import SOURCES
from mlcm_jax.distillation.targets import JUMPS
from mlcm_jax.errors import UserError
from mlcm_jax.models.attention_backend import BACKENDS
from mlcm_jax.models.lora import UNET_TARGETS
from mlcm_jax.models.remat import REMAT_POLICIES
from mlcm_jax.parallel.sharding import RULES
from mlcm_jax.rng import MAX_SEED
from mlcm_jax.training.optimizer import OPTIMIZERS


def base() -> ConfigDict:
    """The defaults: MLCM's stage 1 (arXiv 2406.05768) with the paper's settings."""
    config = ConfigDict()

    # Teacher and prompts
    config.teacher = ""  # diffusers folder, hub id or single .safetensors file of the model to distil
    config.teacher_variant = ""  # of its weights files, such as fp16; "": full precision
    config.teacher_revision = ""  # of a hub id: branch, tag or commit; "": the newest
    config.architecture = ""  # folder of config.json files that stands in for an absent teacher in plans; "": none.
    # A teacher that is a single file takes its settings and tokenizers from there.
    config.prompts = ""  # text file, one prompt a line; .jsonl, .csv, .parquet; tfds:NAME[:SPLIT]; here or at gs://
    config.prompts_column = ""  # of a table or data set; "": the one named prompt, caption or text
    config.text_states = ""  # file of launch/encode.py --text_only, instead of text encoders; "": encode in training
    config.latents = ""  # file of launch/encode.py, one for each prompt, for states made of data
    config.image_size = 0  # height and width in pixels; 0: what the teacher's config.json says

    # Method
    config.num_segments = 8  # M: the student learns to jump to the end of its segment
    config.states = "streaming"  # where training states come from: streaming, mds, data or student
    config.trajectory_solver = "ddim"  # of the teacher's jumps between states: ddim or dpmpp_2m
    config.timesteps = "uniform"  # of states: uniform in their segment, or milestones (its upper edge)
    config.student_steps = 4  # steps that the student samples in for the states of "student"
    config.skip = 20  # timesteps that the teacher moves a state by, to make the target; at most to the segment's end
    config.solver_steps = 1  # guided DDIM steps that the teacher moves it in
    config.guidance_scale = 8.0  # w of the teacher that is distilled into the student
    config.guidance_scale_max = 0.0  # w is drawn between guidance_scale and this for each trajectory; 0: fixed
    config.guidance_embedding_dim = 0  # numbers that tell the student its w (LCM: 256); 0: it has one w in its weights
    config.negative_prompt = ""  # for the teacher's unconditional branch; "": what its pipeline does without one
    config.target = "edge"  # what is compared: the jumps to the segment's end (edge), or the clean latents (x0)
    config.target_network = "student"  # that jumps from the teacher's state: student, or ema (needs ema_decay)
    config.distance = "l2"  # between the two: l2, pseudo_huber or latent_lpips
    config.latent_lpips = ""  # folder of launch/train_lpips.py, for latent_lpips
    config.consistency_weight = 1.0  # of that distance in the loss
    config.trainable = "full"  # full: all weights of the UNet; lora: low-rank factors beside the frozen teacher
    config.lora = ConfigDict()
    config.lora.rank = 64
    config.lora.alpha = 64.0  # the factors' product is multiplied by alpha / rank
    config.lora.targets = UNET_TARGETS  # regular expressions on module paths
    config.lora.start = ""  # file, folder or hub id of a LoRA to start from; "": one that changes nothing
    config.ema_decay = 0.0  # moving average of the trained weights, used for samples and export; 0: none

    # Further losses (distillation/losses/base.py); weight 0: not used
    config.terms_min_timestep = 0  # they change the answers for states from this timestep on; 999: for pure noise alone
    config.distribution_matching = ConfigDict()
    config.distribution_matching.weight = 0.0
    config.distribution_matching.learning_rate = 1e-5  # of the fake score
    config.distribution_matching.updates = 1  # of the fake score, for each of the student
    config.adversarial = ConfigDict()
    config.adversarial.weight = 0.0
    config.adversarial.learning_rate = 1e-4  # of the discriminator's heads
    config.adversarial.updates = 1  # of the heads, for each of the student
    config.adversarial.width = 64  # channels of a head
    config.preference = ConfigDict()
    config.preference.weight = 0.0
    config.preference.scorer = ""  # NAME=FOLDER of a judge of docs/judging.md: clip=examples/emoji/scorer
    config.preference.guard = ""  # NAME=FOLDER of another judge, whose score is reported and never learnt from
    config.preference.stop_when_guard_falls = 0.0  # by how much the guard's score, a running mean of logged steps, may
    # fall below its best while the scorer's rises; then the run ends with the student before. 0: it is never stopped
    config.preference.form = "refl"  # 1e-3 relu(target - score), or margin: relu(target - score) + relu(negative score)
    config.preference.target = 2.0  # score from which on there is no loss
    config.preference.negative_prompt = ""  # of the margin form
    config.preference.decoder = ""  # folder of an AutoencoderTiny or another autoencoder; "": the teacher's own

    # Length and optimizer
    config.seed = 0  # to 2**64 - 1; all bits count
    config.num_steps = 12_000
    config.stages = ()  # changes in the course of the run, such as ({"start": 6000, "num_segments": 4},)
    config.batch_size = 16  # prompts a step, over all devices
    config.microbatches = 1  # parts that the batch's gradient is computed in, one after the other, to save memory
    config.optim = ConfigDict()
    config.optim.name = "adamw"  # or adafactor, whose second moments of matrices are a row and a column
    config.optim.learning_rate = 1e-4  # a stage with another one begins its own warm-up and schedule
    config.optim.schedule = "constant"  # after the warm-up: constant, cosine or linear (both end at 0)
    config.optim.warmup_steps = 100
    config.optim.clip_norm = 1.0  # global norm of the gradient
    config.optim.b1 = 0.9  # of adamw, as are b2, eps and moment_dtype
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.moment_dtype = "float32"  # of the first moments; bfloat16 takes half their memory
    config.optim.weight_decay = 0.0

    # Precision and memory
    config.compute_dtype = "bfloat16"  # of activations and matrix products
    config.frozen_dtype = "bfloat16"  # of weights that are not trained; trained ones are float32
    config.remat = True  # recompute the blocks' activations in the backward pass
    config.remat_policy = "nothing_saveable"  # what is kept all the same: a name in jax.checkpoint_policies
    config.attention = "auto"  # of the UNet: xla, cudnn (GPU), flash (TPU), or auto, what suits the devices best
    config.unroll = 1  # transformer blocks in a turn of their loop: more make a faster step, and longer compiling

    # Devices
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # devices along each axis; -1: those left
    config.sharding_rules = RULES  # (regular expression on the parameter's path, axis of each dimension)

    # Looking at it
    config.log_every = 10  # steps; to metrics.jsonl, TensorBoard and the progress bar
    config.wandb_project = ""  # of Weights & Biases, for the same metrics and grids (extra wandb); "": not there
    config.checkpoint_every = 500  # steps
    config.keep_checkpoints = 2
    config.sample_every = 500  # steps
    config.sample = ConfigDict()
    config.sample.prompts = ""  # text file for the sample grids, one prompt a line
    config.sample.steps = (1, 2, 4, 8)  # student
    config.sample.teacher_steps = 25  # the reference
    config.sample.teacher_few_steps = 4  # the teacher where the student works
    config.sample.preview_vae = ""  # folder of an AutoencoderTiny for the grids on the way; "": the teacher's own
    return config.lock()


def validate(config: ConfigDict) -> None:
    """Raise UserError for a value that cannot work; what depends on devices and files is checked where it is read.

    Settings that change in the course of a run are to be checked for each stage (training.stages).
    """
    for key, (accept, meaning) in _RULES.items():
        value = config
        for part in key.split("."):
            value = value[part]
        if not accept(value):
            raise UserError(f"config.{key}={value!r} cannot work: it must be {meaning}.")
    for (key, value), (needed, advice) in _NEEDS.items():
        if config[key] == value and not config[needed]:
            raise UserError(f"config.{key}={value!r} needs config.{needed}: {advice}.")
    if config.adversarial.weight > 0 and config.states not in ("data", "student"):
        raise UserError(
            f"config.adversarial needs clean latents to tell from, and states={config.states!r} has none: use student "
            "or data."
        )
    if config.guidance_embedding_dim and config.trainable == "lora":
        raise UserError("config.guidance_embedding_dim needs trainable='full': a LoRA has no place for the embedding.")
    if config.lora.start and config.trainable != "lora":
        raise UserError("config.lora.start needs trainable='lora': all weights start from a teacher.")
    if config.preference.weight > 0 and not config.preference.scorer:
        raise UserError("config.preference.weight needs config.preference.scorer: name a judge, such as clip=FOLDER.")
    if config.preference.stop_when_guard_falls > 0 and not config.preference.guard:
        raise UserError("config.preference.stop_when_guard_falls needs config.preference.guard: name a judge to watch.")
    if config.preference.form == "margin" and not config.preference.negative_prompt:
        raise UserError("config.preference.form='margin' needs config.preference.negative_prompt: give one.")


def _one_of(*values):
    return (lambda v: v in values), "one of " + ", ".join(values)


_POSITIVE = (lambda v: v > 0), "above 0"
_NOT_NEGATIVE = (lambda v: v >= 0), "0 or more"
_GIVEN = bool, "given"
_SEGMENTS = (lambda v: 1 <= v <= MAX_SEGMENTS), f"from 1 to {MAX_SEGMENTS}"
_SEED = (lambda v: 0 <= v <= MAX_SEED), f"from 0 to {MAX_SEED}"
_STEP_COUNTS = (lambda v: len(v) > 0 and all(1 <= n <= 1000 for n in v)), "a list of numbers from 1 to 1000"

_RULES = {
    "teacher": _GIVEN,
    "prompts": _GIVEN,
    "sample.prompts": _GIVEN,
    "image_size": _NOT_NEGATIVE,
    "num_segments": _SEGMENTS,
    "states": _one_of(*SOURCES),
    "trajectory_solver": _one_of("ddim", "dpmpp_2m"),
    "timesteps": _one_of("uniform", "milestones"),
    "student_steps": _SEGMENTS,
    "skip": _POSITIVE,
    "solver_steps": _POSITIVE,
    "guidance_scale_max": _NOT_NEGATIVE,
    "guidance_embedding_dim": ((lambda v: v >= 0 and v % 2 == 0 and v != 2), "0 or an even number from 4 on"),
    "consistency_weight": _NOT_NEGATIVE,
    "terms_min_timestep": ((lambda v: 0 <= v <= LAST_TIMESTEP), f"from 0 to {LAST_TIMESTEP}"),
    "distribution_matching.weight": _NOT_NEGATIVE,
    "distribution_matching.learning_rate": _POSITIVE,
    "distribution_matching.updates": _POSITIVE,
    "adversarial.weight": _NOT_NEGATIVE,
    "adversarial.learning_rate": _POSITIVE,
    "adversarial.updates": _POSITIVE,
    "adversarial.width": ((lambda v: v >= 2 and v % 2 == 0), "an even number above 0"),
    "preference.weight": _NOT_NEGATIVE,
    "preference.stop_when_guard_falls": _NOT_NEGATIVE,
    "preference.form": _one_of(*FORMS),
    "target": _one_of(*JUMPS),
    "target_network": _one_of("student", "ema"),
    "guidance_scale": _POSITIVE,
    "distance": _one_of(*DISTANCES),
    "trainable": _one_of("full", "lora"),
    "lora.rank": _POSITIVE,
    "lora.alpha": _POSITIVE,
    "ema_decay": ((lambda v: 0 <= v < 1), "0 or more and less than 1"),
    "seed": _SEED,
    "num_steps": _POSITIVE,
    "batch_size": _POSITIVE,
    "microbatches": _POSITIVE,
    "optim.name": _one_of(*OPTIMIZERS),
    "optim.moment_dtype": _one_of("float32", "bfloat16"),
    "remat_policy": _one_of(*REMAT_POLICIES),
    "optim.learning_rate": _POSITIVE,
    "optim.warmup_steps": _NOT_NEGATIVE,
    "optim.schedule": _one_of("constant", "cosine", "linear"),
    "optim.clip_norm": _POSITIVE,
    "compute_dtype": _one_of("float32", "bfloat16"),
    "frozen_dtype": _one_of("float32", "bfloat16"),
    "attention": _one_of(*BACKENDS),
    "unroll": _POSITIVE,
    "log_every": _POSITIVE,
    "checkpoint_every": _POSITIVE,
    "keep_checkpoints": _POSITIVE,
    "sample_every": _POSITIVE,
    "sample.steps": _STEP_COUNTS,
    "sample.teacher_steps": _POSITIVE,
    "sample.teacher_few_steps": _POSITIVE,
}

# setting and value: (what must be given then, what to do)
_NEEDS = {
    ("states", "data"): ("latents", "make a file of them with launch/encode.py"),
    ("distance", "latent_lpips"): ("latent_lpips", "name a folder that launch/train_lpips.py wrote"),
    ("target_network", "ema"): ("ema_decay", "set the decay of the moving average, such as 0.95"),
}
