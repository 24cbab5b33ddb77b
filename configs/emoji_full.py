"""All stages of the method on the emoji teacher, one LoRA through all of them (MLCM / TLCM, arXiv 2406.05768).

    python launch/train.py --config=configs/emoji_full.py --workdir=runs/emoji_full

8, 4, then 2 segments on streamed trajectories; consistency across segments on the student's own samples; at the end
distribution matching and a discriminator. Hardware and time: hours on 2 CPU cores, minutes on a GPU. It resumes inside
any stage. Its result has not been measured yet.
"""

from ml_collections import ConfigDict

from configs.emoji import get_config as emoji_config


def get_config() -> ConfigDict:
    config = emoji_config()
    config.trainable = "lora"
    config.lora.rank, config.lora.alpha = 16, 16.0
    config.num_segments = 8
    config.timesteps = "uniform"
    config.skip = 20
    config.solver_steps = 1
    config.num_steps = 8000
    config.optim.schedule = "constant"
    config.optim.warmup_steps = 100
    config.ema_decay = 0.995
    config.stages = (
        {"start": 3000, "num_segments": 4},
        {"start": 5000, "num_segments": 2},
        {
            "start": 6000,
            "num_segments": 4,
            "states": "student",
            "timesteps": "milestones",
            "skip": 1000,  # a whole segment
            "solver_steps": 3,
            "target": "x0",
            "optim.learning_rate": 1e-4,
        },
        {"start": 7500, "distribution_matching.weight": 0.05, "adversarial.weight": 0.02, "optim.learning_rate": 3e-5},
    )
    config.distribution_matching.learning_rate = 1e-4
    config.adversarial.learning_rate = 1e-3
    config.checkpoint_every = 500
    config.sample_every = 1000
    return config
