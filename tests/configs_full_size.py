"""Settings of full-size UNets as config.json has them, for comparisons of names and shapes."""

_SD = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
SD15 = {**_SD, "attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64}
SD21 = {
    **_SD,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
# SDXL pruned unevenly as SSD-1B is (arXiv 2401.02677); written down by hand, not the published file
SSD1B = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "attention_type": "default",
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "dropout": 0.0,
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2D",
    "projection_class_embeddings_input_dim": 2816,
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    "sample_size": 128,
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
VEGA = {  # Segmind-Vega, of the same work; also by hand
    **SSD1B,
    "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
    "transformer_layers_per_block": [1, [1, 1], [2, 2]],
}
LCM_SD15 = {**SD15, "time_cond_proj_dim": 256}  # latent consistency models of Stable Diffusion 1.5
_KL = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
VAES = {
    "sd15": _KL,
    "sdxl": {**_KL, "force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025},
    "sdxl fp16-fix": {**_KL, "force_upcast": False, "scaling_factor": 0.13025},
}

# The judges: openai/clip-vit-large-patch14, laion/CLIP-ViT-H-14-laion2B-s32B-b79K (PickScore and HPS v2 are tuned from
# it), laion/CLIP-ViT-g-14-laion2B-s12B-b42K, and BLIP's med_config.json, as ImageReward has it.
CLIP_L14 = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": 768,
    "logit_scale_init_value": 2.6592,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12},
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 224,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
}
_LAION_TEXT = {"hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
_LAION_TEXT |= {"num_hidden_layers": 24, "eos_token_id": 2}
CLIP_H14 = {
    **CLIP_L14,
    "projection_dim": 1024,
    "text_config": _LAION_TEXT,
    "vision_config": {
        **CLIP_L14["vision_config"],
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
    },
}
CLIP_G14 = {
    **CLIP_H14,
    "vision_config": {
        **CLIP_H14["vision_config"],
        "hidden_size": 1408,
        "intermediate_size": 6144,
        "num_hidden_layers": 40,
    },
}
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}
