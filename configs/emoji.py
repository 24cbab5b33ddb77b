"""Distil the shipped emoji teacher on a CPU.

    python launch/train.py --config=configs/emoji.py --workdir=runs/emoji

Hardware and time: 2 CPU cores, under 10 minutes. Expected figures: docs/results.md, "The default student".
Method: MLCM stage 1, arXiv 2406.05768.
"""

from ml_collections import ConfigDict

from mlcm_jax.config import base


def get_config(variant: str = "full") -> ConfigDict:
    config = base()
    config.trainable = variant
    config.teacher = "examples/emoji/teacher"
    config.prompts = "examples/emoji/prompts/train.txt"
    config.num_segments = 4
    # A short run. The teacher integrates to the segment boundary, so the target does not depend on the student. States
    # lie where 4 sampling steps start, which lowered the 4-step latent distance on grid.txt by 8 % (guidance scale 5,
    # 500 steps, the teacher before the shipped one).
    config.timesteps = "milestones"
    config.skip = 1000
    config.solver_steps = 2
    config.guidance_scale = 7.5  # near the paper's 8; the teacher's own best is about 1.5 (its model card)
    config.num_steps = 700
    config.batch_size = 16
    config.ema_decay = 0.98
    config.optim.learning_rate = 1e-4  # 6e-4 ended further from the teacher after 1.5 times as many steps
    config.optim.b2 = 0.99
    config.optim.clip_norm = 0.01  # the noisiest segment's gradients are ten times the others'
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 20
    # Used when preference.weight is set: one reward model in the loss, another one held out.
    config.preference.reward_model = "clip=examples/emoji/scorer"
    config.preference.held_out_reward_model = "clip=examples/emoji/guard"
    config.preference.target = 1.0  # the largest cosine, so the loss never stops
    config.compute_dtype = "float32"
    config.frozen_dtype = "float32"
    config.remat = False
    config.log_every = 10
    config.checkpoint_every = 100
    config.sample_every = 200
    config.sample.prompts = "examples/emoji/prompts/grid.txt"
    return config
