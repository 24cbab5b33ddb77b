"""Latent consistency distillation (LCM, arXiv 2310.04378) of the emoji teacher: the baseline.

    python launch/encode.py --model=examples/emoji/teacher --prompts=examples/emoji/prompts/train.txt \
        --guidance_scale=5 --out=runs/emoji_latents.safetensors
    python launch/train.py --config=configs/emoji_lcm.py --workdir=runs/emoji_lcm

One segment, noised latents instead of trajectories, an x0 target by the moving average, pseudo-Huber distance.
The latents are the teacher's own images; --images=... encodes others. Budget and optimizer are configs/emoji.py's.
The guidance scale is drawn from 3 to 15 (2 to 14 in the paper's convention, w of eps_c + w (eps_c - eps_u)). The
student is conditioned on it, so launch/sample.py and diffusers take guidance_scale. Not measured with this range;
docs/results.md has LCM at one scale, from configs/emoji_ablation.py:lcm.
"""

from ml_collections import ConfigDict

from configs.emoji import get_config as emoji_config


def get_config() -> ConfigDict:
    config = emoji_config()
    config.latents = "runs/emoji_latents.safetensors"
    config.states = "data"
    config.num_segments = 1
    config.timesteps = "uniform"
    config.skip = 20
    config.solver_steps = 1
    config.target = "x0"
    config.target_network = "ema"
    config.ema_decay = 0.95
    config.distance = "pseudo_huber"
    config.sampler = "lcm"
    config.guidance_scale, config.guidance_scale_max = 3.0, 15.0
    config.guidance_embedding_dim = 256
    return config
