"""Every setting of a distillation run, once, with its default, unit and meaning; files in configs/ override them.

A configuration is locked: a misspelt key is an error that names the nearest real one. Who owns a setting checks it:
training/checks.py lists the owners.
"""

from collections.abc import Mapping
from typing import Any

from absl import logging
from ml_collections import ConfigDict

# Matched with re.search against the module's path, its parts joined by "/".
LORA_TARGETS = (
    r"/to_(q|k|v|out_0)$",
    r"/proj_(in|out)$",
    r"/ff/net_0/proj$",
    r"/ff/net_2$",
    r"/conv[12]$",
    r"/conv_shortcut$",
    r"/time_emb_proj$",
    r"/(down|up)samplers_\d+/conv$",
)

# The first rule whose regular expression is found in the "/"-joined path names the axes of the array's LAST
# dimensions, so that a kernel and the same kernel stacked by nn.scan share a rule, as do Dense and Conv kernels
# ([..., in, out]). Along ``tensor`` the first product of a pair splits its outputs and the second its inputs, so that
# what lies between stays on its device and one sum over the devices ends the pair.
SHARDING_RULES = (
    (r"(^|/)(to_out_0|out_proj|net_2|fc2|conv2|linear_2)/kernel$", ("tensor", "fsdp")),  # second of a pair
    (r"(^|/)kernel$", ("fsdp", "tensor")),
    (r"(^|/)embedding$", ("tensor", "fsdp")),
    (r"(^|/)(scale|bias)$", ("fsdp",)),
    (r"(^|/)down$", ("fsdp", None)),  # LoRA factors: never along the rank
    (r"(^|/)up$", (None, "fsdp")),
)

# Keys and values of runs and configurations that are older than a renaming.
RENAMED = {
    "terms_min_timestep": "losses_min_timestep",
    "consistency_weight": "consistency.weight",
    "preference.scorer": "preference.reward_model",
    "preference.guard": "preference.held_out_reward_model",
    "preference.stop_when_guard_falls": "preference.stop_when_held_out_falls",
}
RENAMED_VALUES = {"target": {"edge": "boundary"}}


def base() -> ConfigDict:
    """The defaults: MLCM's stage 1 (arXiv 2406.05768) with the paper's settings."""
    config = RunConfig()

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
    config.height = 0  # in pixels, with config.width, for images that are no squares; 0: image_size
    config.width = 0
    config.buckets = ()  # sizes (height, width) that the steps take in turn, a program each; (): one size

    # Method
    config.num_segments = 8  # M: the student learns to go to the end of its segment in one step
    config.states = "streaming"  # where training states come from: streaming, mds, data, student, simulation(_data)
    config.noise_offset = 0.0  # of noised latents: by how much the mean of the noise of each channel varies
    config.trajectory_solver = "ddim"  # of the teacher's steps from state to state: ddim, dpmpp_2m or addim
    config.timesteps = "uniform"  # of states: uniform in their segment, milestones (its upper boundary), or grid
    config.grid = 0  # segments whose boundaries are the timesteps of "grid", and that the teacher goes through one of
    config.pure_noise = False  # states of noised latents at t = 999 are the noise alone, as where sampling begins
    config.student_steps = 4  # steps that the student samples in for the states of "student"
    config.skip = 20  # timesteps that the teacher moves a state by, to make the target; at most to the segment's end
    config.skip_end = 0  # what skip falls to, exponentially over the first half of the run; 0: it stays
    config.solver_steps = 1  # guided steps that the teacher moves it in
    config.target_solver = "ddim"  # of these: ddim, addim, or of noised latents also addim_data, ddim_sde or er_sde
    config.target_noise = 1.0  # strength of the fresh noise of ddim_sde and er_sde, 0 (DDIM) to 1
    config.teacher_network = "teacher"  # that makes it: teacher, or previous, the student of the M before, unguided
    config.guidance_scale = 8.0  # w of the teacher that is distilled into the student
    config.guidance_scale_max = 0.0  # w is drawn between guidance_scale and this for each trajectory; 0: fixed
    config.guidance_embedding_dim = 0  # width of the student's embedding of w (LCM: 256); 0: it has one w within
    config.empty_prompts = 0.0  # fraction of prompts that the run replaces by none, so that the student can be guided
    config.negative_prompt = ""  # for the teacher's unconditional branch; "": what its pipeline does without one
    config.target = "boundary"  # where answers are compared: at the segment's lower boundary, at a time that is drawn
    # within_segment (Hyper-SD's), or x0
    config.target_network = "student"  # whose answer is the target: student, or ema (needs ema_decay)
    config.distance = "l2"  # between the two: l2, pseudo_huber, latent_lpips, x0_norm (MCM's) or x0_snr (TRACT's)
    config.latent_lpips = ""  # folder of launch/train_lpips.py, for latent_lpips
    config.student_prediction_type = ""  # of its output: epsilon, v_prediction or sample (x0); "": the teacher's
    config.trainable = "full"  # full: all weights of the UNet; lora: low-rank factors beside the frozen teacher
    config.lora = ConfigDict()
    config.lora.rank = 64
    config.lora.alpha = 64.0  # the factors' product is multiplied by alpha / rank
    config.lora.targets = LORA_TARGETS  # regular expressions on module paths
    config.lora.start = ""  # file, folder or hub id of a LoRA to start from; "": one that changes nothing
    config.ema_decay = 0.0  # moving average of the trained weights, used for samples and export; 0: none

    config.sampler = "tcd"  # that samples the student, and whose scheduler is exported: tcd, or lcm, which adds noise

    # Losses (distillation/losses); weight 0: not used
    config.consistency = ConfigDict()
    config.consistency.weight = 1.0  # of the distance above
    config.losses_min_timestep = 0  # the others change answers for states from this timestep on; 999: pure noise alone
    config.distribution_matching = ConfigDict()
    config.distribution_matching.weight = 0.0
    config.distribution_matching.learning_rate = 1e-5  # of the fake score
    config.distribution_matching.updates = 1  # of the fake score, for each of the student
    config.distribution_matching_gan = ConfigDict()  # the same with a discriminator on the fake score's middle block
    config.distribution_matching_gan.weight = 0.0
    config.distribution_matching_gan.learning_rate = 1e-5  # of the fake score and the discriminator
    config.distribution_matching_gan.updates = 1  # of both, for each of the student
    config.distribution_matching_gan.adversarial_weight = 5e-3  # of the student's side, beside the matching
    config.distribution_matching_gan.critic_adversarial_weight = 1e-2  # of the discriminator's, beside the fake score's
    config.distribution_matching_gan.width = 64  # channels of the discriminator's head
    config.adversarial = ConfigDict()
    config.adversarial.weight = 0.0
    config.adversarial.learning_rate = 1e-4  # of the discriminator's heads
    config.adversarial.updates = 1  # of the heads, for each of the student
    config.adversarial.width = 64  # channels of a head
    config.adversarial.features = "encoder"  # that the heads read: of the teacher's encoder, or its decoder (SCott's)
    config.adversarial_consistency = ConfigDict()  # PCM's, where answers are compared; needs target="boundary"
    config.adversarial_consistency.weight = 0.0
    config.adversarial_consistency.learning_rate = 1e-5  # of the discriminator's heads
    config.adversarial_consistency.updates = 1  # of the heads, for each of the student
    config.adversarial_consistency.width = 64  # channels of a head
    config.progressive_adversarial = ConfigDict()  # between student and teacher at the end of a segment
    config.progressive_adversarial.weight = 0.0
    config.progressive_adversarial.learning_rate = 1e-5  # of the discriminator, a copy of the teacher's encoder
    config.progressive_adversarial.updates = 1  # of the discriminator, for each of the student
    config.progressive_adversarial.width = 64  # channels of its head
    config.progressive_adversarial.relaxed = False  # whether it does not see the state that both began at
    config.preference = RunConfig()
    config.preference.weight = 0.0
    config.preference.reward_model = ""  # NAME=FOLDER, see docs/evaluate.md: clip=examples/emoji/scorer
    config.preference.held_out_reward_model = ""  # NAME=FOLDER of another one, whose score is only reported
    config.preference.stop_when_held_out_falls = 0.0  # by how much the held-out score, a running mean of logged
    # steps, may fall below its best while the reward model's rises; then the run ends with the student before. 0: never
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
    config.sharding_rules = SHARDING_RULES  # (regular expression on the parameter's path, axis of each dimension)

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
    config.sample.preview_vae = ""  # folder of an AutoencoderTiny for the grids during training; "": the teacher's own
    return config.lock()


def current_name(key: str) -> str:
    """The dotted name that a setting has now; for a former one, a warning names it."""
    if key in RENAMED:
        logging.warning("config.%s is now config.%s: please use the new name.", key, RENAMED[key])
    return RENAMED.get(key, key)


def current_value(key: str, value: Any) -> Any:
    """A setting's value by the present names: of values, and of the settings that ``stages`` change."""
    if key == "stages" and isinstance(value, tuple | list) and all(isinstance(change, Mapping) for change in value):
        return tuple({(name := current_name(k)): current_value(name, v) for k, v in change.items()} for change in value)
    return RENAMED_VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value


class RunConfig(ConfigDict):
    """A ConfigDict that also takes former keys and values, with a warning that names the new key."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self._here(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        *outer, last = str(self._here(key)).split(".")
        owner: Any = self if not outer else self[".".join(outer)]
        ConfigDict.__setitem__(owner, last, current_value(last, value))

    def _here(self, key: Any) -> Any:
        """The present name of a key of this node, whose own place in the configuration is not known here."""
        for old, new in RENAMED.items():
            section, _, name = old.rpartition(".")
            present = new.removeprefix(f"{section}.")
            if name == key and key not in self._fields and present.split(".")[0] in self._fields:
                current_name(old)
                return present
        return key
