"""The recipe of the emoji teacher: every setting of its three trainings and the shapes of its networks, in one place.

Order: build_data.py, train_autoencoder.py, train_clip.py, train_unet.py; each resumes from its --workdir.
"""

from ml_collections import ConfigDict, config_flags

IMAGE_SIZE = 64  # pixels


def _training(**overrides) -> ConfigDict:
    config = ConfigDict(
        dict(
            seed=0,
            num_steps=1000,
            batch_size=32,
            ema_decay=0.999,
            log_every=20,
            sample_every=500,
            checkpoint_every=500,
            keep_checkpoints=2,
            optim=dict(
                learning_rate=1e-3,
                schedule="cosine",
                warmup_steps=100,
                clip_norm=1.0,
                b1=0.9,
                b2=0.99,
                eps=1e-8,
                weight_decay=0.01,
            ),
        )
    )
    for key, value in overrides.items():
        if key == "optim":
            config.optim.update(value)
        else:
            config[key] = value
    return config.lock()


AUTOENCODER = _training(num_steps=2400, batch_size=16, ema_decay=0.995, optim={"learning_rate": 2e-3})

VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [16, 32, 64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": IMAGE_SIZE,
    "force_upcast": False,
}


def config_flag(default: ConfigDict):
    """The --config.KEY=VALUE flags of one training."""
    return config_flags.DEFINE_config_dict("config", default)
