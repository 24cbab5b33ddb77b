"""Every setting of a distillation run, once, with its default, unit and meaning; files in configs/ override them.

A configuration is locked: a misspelt key is an error that names the nearest real one.
"""

from ml_collections import ConfigDict

from mlcm_jax.errors import UserError
from mlcm_jax.models.lora import UNET_TARGETS
from mlcm_jax.sharding import RULES


def base() -> ConfigDict:
    """The defaults: MLCM's stage 1 (arXiv 2406.05768) with the paper's settings."""
    config = ConfigDict()

    # Teacher and prompts
    config.teacher = ""  # diffusers folder or hub id of the model to distil
    config.architecture = ""  # folder of config.json files that stands in for an absent teacher in plans; "": none
    config.prompts = ""  # text file, one prompt a line
    config.image_size = 0  # height and width in pixels; 0: what the teacher's config.json says

    # Method
    config.num_segments = 8  # M: the student learns to jump to the end of its segment
    config.skip = 20  # timesteps that the teacher moves a state by, to make the target
    config.guidance_scale = 8.0  # w of the teacher that is distilled into the student
    config.distance = "l2"  # between the two jumps: l2 or pseudo_huber
    config.trainable = "full"  # full: all weights of the UNet; lora: low-rank factors beside the frozen teacher
    config.lora = ConfigDict()
    config.lora.rank = 64
    config.lora.alpha = 64.0  # the factors' product is multiplied by alpha / rank
    config.lora.targets = UNET_TARGETS  # regular expressions on module paths
    config.ema_decay = 0.0  # moving average of the trained weights, used for samples and export; 0: none

    # Length and optimizer
    config.seed = 0
    config.num_steps = 12_000
    config.batch_size = 16  # prompts a step, over all devices
    config.optim = ConfigDict()
    config.optim.learning_rate = 1e-4
    config.optim.schedule = "constant"  # after the warm-up: constant, cosine or linear (both end at 0)
    config.optim.warmup_steps = 100
    config.optim.clip_norm = 1.0  # global norm of the gradient
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.0

    # Precision and memory
    config.compute_dtype = "bfloat16"  # of activations and matrix products
    config.frozen_dtype = "bfloat16"  # of weights that are not trained; trained ones are float32
    config.remat = True  # recompute the blocks' activations in the backward pass

    # Devices
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # devices along each axis; -1: those left
    config.sharding_rules = RULES  # (regular expression on the parameter's path, axis of each dimension)

    # Looking at it
    config.log_every = 10  # steps; to metrics.jsonl, TensorBoard and the progress bar
    config.checkpoint_every = 500  # steps
    config.keep_checkpoints = 2
    config.sample_every = 500  # steps
    config.sample = ConfigDict()
    config.sample.prompts = ""  # text file for the sample grids, one prompt a line
    config.sample.steps = (1, 2, 4, 8)  # student
    config.sample.teacher_steps = 25  # the reference
    config.sample.teacher_few_steps = 4  # the teacher where the student works
    return config.lock()


def validate(config: ConfigDict) -> None:
    """Raise UserError for a value that cannot work; what depends on devices and files is checked where it is read."""
    for key, (accept, meaning) in _RULES.items():
        value = config
        for part in key.split("."):
            value = value[part]
        if not accept(value):
            raise UserError(f"config.{key}={value!r} cannot work: it must be {meaning}.")


def _one_of(*values):
    return (lambda v: v in values), "one of " + ", ".join(values)


_POSITIVE = (lambda v: v > 0), "above 0"
_NOT_NEGATIVE = (lambda v: v >= 0), "0 or more"
_GIVEN = bool, "given"
_SEGMENTS = (lambda v: 1 <= v <= 100), "from 1 to 100"
_STEP_COUNTS = (lambda v: len(v) > 0 and all(1 <= n <= 1000 for n in v)), "a list of numbers from 1 to 1000"

_RULES = {
    "teacher": _GIVEN,
    "prompts": _GIVEN,
    "sample.prompts": _GIVEN,
    "image_size": _NOT_NEGATIVE,
    "num_segments": _SEGMENTS,
    "skip": _POSITIVE,
    "guidance_scale": _POSITIVE,
    "distance": _one_of("l2", "pseudo_huber"),
    "trainable": _one_of("full", "lora"),
    "lora.rank": _POSITIVE,
    "lora.alpha": _POSITIVE,
    "ema_decay": ((lambda v: 0 <= v < 1), "0 or more and less than 1"),
    "num_steps": _POSITIVE,
    "batch_size": _POSITIVE,
    "optim.learning_rate": _POSITIVE,
    "optim.warmup_steps": _NOT_NEGATIVE,
    "optim.schedule": _one_of("constant", "cosine", "linear"),
    "optim.clip_norm": _POSITIVE,
    "compute_dtype": _one_of("float32", "bfloat16"),
    "frozen_dtype": _one_of("float32", "bfloat16"),
    "log_every": _POSITIVE,
    "checkpoint_every": _POSITIVE,
    "keep_checkpoints": _POSITIVE,
    "sample_every": _POSITIVE,
    "sample.steps": _STEP_COUNTS,
    "sample.teacher_steps": _POSITIVE,
    "sample.teacher_few_steps": _POSITIVE,
}
