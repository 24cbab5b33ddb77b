"""Distil SDXL 1.0 at 1024 px with the paper's lengths and rates (MLCM / TLCM, arXiv 2406.05768, section 5).

    python launch/train.py --config=configs/sdxl.py:lora --workdir=runs/sdxl --config.prompts=prompts.txt
    python launch/train.py --config=configs/sdxl.py:all --workdir=runs/sdxl --config.prompts=prompts.txt \
        --config.preference.reward_model=mps=DIR
    python launch/compile.py --config=configs/sdxl.py --topology=v5e:4x4

Variants: ":lora" (rank 64, as in the paper), ":full" (all 2.57 B weights, sharded over the fsdp axis; the default) or
":all" (the LoRA through all of the paper's stages; docs/evaluate.md says what DIR has to hold). ":vpred" is ":lora" for
a fine-tune with v-prediction and zero terminal SNR, NoobAI-XL unless --config.teacher names another. The methods of
configs/methods.py, such as ":lcm", train a LoRA with their papers' settings (docs/methods.md); states of "data" need
--config.latents=FILE of launch/encode.py.
Hardware: a TPU v5e 4x4 slice or larger; memory of a step: docs/scale.md. Not run at this size.
Stages: 12,000 steps with 8, 4 and 2 segments, then 2,000 of consistency across segments on the student's samples.
":all" adds 500 steps with a reward model (MPS), as in the paper, then 1,000 with distribution matching and a
discriminator. The paper does not give the weights of these losses: they are a first guess and were not tried.
A student can exploit its reward model. Give ":all" a held-out reward model of another kind and a limit, and compare the
images before and after that stage by independent features (docs/method.md, "Reward models"):
--config.preference.held_out_reward_model=efficientnet=DIR --config.preference.stop_when_held_out_falls=0.02
States are streamed (config.states="mds" is the paper's choice and costs 2.5 times the FLOPs at M = 8).
prompts: any text file, one prompt a line; the paper took LAION-Aesthetics 6+ captions.
"""

from ml_collections import ConfigDict

from configs.methods import METHODS, put, reads_latents
from mlcm_jax.config import base
from mlcm_jax.errors import UserError

VARIANTS = ("full", "lora", "all", "vpred", *METHODS)


def get_config(variant: str = "full") -> ConfigDict:
    if variant not in VARIANTS:
        raise UserError(f"configs/sdxl.py has no variant {variant!r}: use one of {', '.join(VARIANTS)}.")
    config = base()
    config.teacher = "stabilityai/stable-diffusion-xl-base-1.0"
    config.architecture = "configs/architectures/sdxl"
    config.prompts = "examples/prompts.txt"
    config.trainable = "full" if variant == "full" else "lora"
    config.num_segments = 8
    config.guidance_scale = 8.0
    config.num_steps = 14_000
    config.stages = (
        {"start": 6_000, "num_segments": 4},
        {"start": 9_000, "num_segments": 2},
        {
            "start": 12_000,
            "num_segments": 8,
            "states": "student",
            "timesteps": "milestones",
            "skip": 1000,  # a whole segment
            "solver_steps": 3,
            "target": "x0",
            "optim.learning_rate": 1e-5,
        },
    )
    if variant == "all":
        config.num_steps = 15_500
        config.stages += (
            {"start": 14_000, "preference.weight": 0.01},
            {"start": 14_500, "preference.weight": 0.0, "distribution_matching.weight": 1.0, "adversarial.weight": 0.1},
        )
        config.preference.form, config.preference.target = "margin", 16.0  # of MPS
        config.preference.negative_prompt = "blurry, low quality, deformed"
    config.batch_size = 16
    config.optim.learning_rate = 1e-5 if variant == "full" else 1e-4
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.sample.prompts = "examples/prompts.txt"
    if variant == "vpred":
        config.teacher = "Laxhar/noobai-XL-Vpred-1.0"
        config.architecture = "configs/architectures/sdxl_vpred"
        config.guidance_scale = 5.0  # as its model card recommends 4 to 5
    if variant in METHODS and variant != "mlcm":
        put(config, METHODS[variant], METHODS[variant].sdxl_steps, METHODS[variant].sdxl)
    if reads_latents(config):
        config.latents = "latents.safetensors"
    return config
