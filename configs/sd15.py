"""Distil Stable Diffusion 1.5 at 512 px (MLCM, arXiv 2406.05768) with the settings of configs/sdxl.py.

    python launch/train.py --config=configs/sd15.py --workdir=runs/sd15 --config.prompts=prompts.txt

Variants: ":lora" (rank 64, the default), ":full" or ":all", as in configs/sdxl.py. Hardware: one GPU of 24 GB or more,
or a TPU v5e slice. Not run at this size. prompts: any text file, one prompt a line.
"""

from ml_collections import ConfigDict

from configs.sdxl import get_config as sdxl_config


def get_config(variant: str = "lora") -> ConfigDict:
    config = sdxl_config(variant)
    config.teacher = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.architecture = "configs/architectures/sd15"
    config.batch_size = 32
    return config
