"""The recipe of the emoji teacher: every setting of its trainings and the shapes of its networks, in one place.

Order: build_data.py, train_autoencoder.py, train_clip.py, train_unet.py; each resumes from its --workdir.
train_unet.py has a second recipe for a GPU, which needs pack.py first and does not resume.
train_chinese.py and train_pea.py need what train_clip.py leaves, train_controlnet.py the finished teacher.
"""

from ml_collections import ConfigDict, config_flags

from mlcm_jax.models.controlnet_config import config_for_unet

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
            wandb_project="",
            optim=dict(
                name="adamw",
                learning_rate=1e-3,
                schedule="cosine",
                warmup_steps=100,
                clip_norm=1.0,
                b1=0.9,
                b2=0.99,
                eps=1e-8,
                moment_dtype="float32",
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


AUTOENCODER = _training(num_steps=8000, batch_size=16, ema_decay=0.995, optim={"learning_rate": 2e-3})

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


CLIP = _training(
    num_steps=700,
    batch_size=96,
    ema_decay=0.99,
    checkpoint_every=250,
    optim={"weight_decay": 0.1, "b2": 0.98},
)

_TEXT = {
    "model_type": "clip_text_model",
    "vocab_size": 2048,
    "max_position_embeddings": 24,
    "layer_norm_eps": 1e-5,
    "projection_dim": 128,
    "bos_token_id": 2046,
    "eos_token_id": 2047,
    "pad_token_id": 2047,
}
# As SDXL's two: the first with quick_gelu and without a projection, the second wider, with gelu and a projection.
TEXT_CONFIG = {
    **_TEXT,
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
}
TEXT_2_CONFIG = {
    **_TEXT,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
}
SCORER_CONFIG = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": 128,
    "logit_scale_init_value": 2.6592,
    "text_config": {k: v for k, v in TEXT_2_CONFIG.items() if k != "architectures"},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_act": "gelu",
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "num_channels": 3,
        "layer_norm_eps": 1e-5,
        "projection_dim": 128,
    },
}
CLIP_PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": IMAGE_SIZE},
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "resample": 3,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}

# The Chinese encoders have the English ones' shapes, but for the vocabulary.
CHINESE = _training(
    num_steps=1200,
    batch_size=64,
    ema_decay=0.995,
    optim={"learning_rate": 2e-3, "b2": 0.98},
)

# The other form of Chinese text encoders, PEA-Diffusion's: a tower and an adapter for both.
PEA = _training(
    num_steps=1200,
    batch_size=64,
    ema_decay=0.99,
    checkpoint_every=250,
    optim={"learning_rate": 2e-3, "b2": 0.98},
)
# Beside the captions of the training names it learns captions of names that are put together from phrases of these
# (emoji_dataset/phrases.py): so many, and that part of each batch.
NUM_MADE_UP, MADE_UP = 16_000, 0.4
PEA_BLURRED = 0.05  # part of the characters that are unknown
PEA_TEXT_CONFIG = {
    "architectures": ["ChineseCLIPTextModel"],
    "model_type": "chinese_clip_text_model",
    "hidden_act": "gelu",
    "hidden_size": 192,
    "intermediate_size": 768,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 24,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "type_vocab_size": 2,
}
# The UNet takes what the English encoders give: a pooled state, and as many token states, of both encoders' widths.
PEA_ADAPTER_CONFIG = {"input_dim": 192, "hidden_dim": 384, "pooled_dim": 128, "states_dim": 320, "num_tokens": 24}

UNET = _training(
    num_steps=22_500,
    batch_size=32,
    ema_decay=0.999,
    sample_every=250,
    checkpoint_every=250,
    optim={"learning_rate": 8e-4, "warmup_steps": 200},
)

# The same network on a GPU, from the file that pack.py writes, from new weights: those of 0.7 M examples save seconds.
# Compared with UNET the batch is 32 times as large, but the rate only 2.5 times: Adam's steps do not shrink with the
# gradient's noise. The rate goes by the clock, since nobody knows beforehand how many steps fit into it.
UNET_PACKED = ConfigDict(
    dict(
        seed=0,
        batch_size=1024,
        learning_rate=2e-3,
        warmup_steps=200,
        hold=0.3,  # part of the time after which the rate falls to 0 along a cosine
        ema_halflife=500_000,  # examples
        ema_rampup=0.05,  # the half-life is at most this part of the examples seen so far (arXiv 2206.00364, app. F.2)
        steps_per_call=25,  # steps in one program: dispatch costs nothing then
        optim=dict(
            name="adamw",
            learning_rate=1.0,  # times the rate by the clock
            schedule="constant",
            warmup_steps=0,
            clip_norm=1.0,
            b1=0.9,
            b2=0.99,
            eps=1e-8,
            moment_dtype="float32",
            weight_decay=0.02,  # the data is seen some 1,000 times: the held-out loss tells whether it is too little
        ),
    )
).lock()

UNET_CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [64, 96, 128],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 3, 4],
    "cross_attention_dim": 320,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 320,
    "norm_num_groups": 16,
    "act_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
}

# A caption alone tells the teacher what its images look like, edges and all. Without it, or with the image moved, only
# the edges tell: half of the captions are dropped (arXiv 2302.05543, 3.3) and the images are moved (edges.py).
CONTROLNET = _training(
    num_steps=1500,
    batch_size=32,
    ema_decay=0.998,
    sample_every=250,
    checkpoint_every=250,
    optim={"learning_rate": 5e-4},
)
CONTROLNET_CAPTION_DROPOUT = 0.5

# The UNet's way down, with one block in each transformer: as float16 it takes 5.6 MB.
CONTROLNET_CONFIG = config_for_unet(UNET_CONFIG) | {
    "transformer_layers_per_block": 1,
    "conditioning_embedding_out_channels": [16, 32, 64],
}

SCHEDULER_CONFIG = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 0,
}

MODEL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def config_flag(default: ConfigDict):
    """The --config.KEY=VALUE flags of one training."""
    return config_flags.DEFINE_config_dict("config", default)
