"""Recompute Table 1 of the paper: SDXL at 1024 px on MSCOCO-2017's 5,000 captions (arXiv 2406.05768).

    python examples/coco5k/build_coco5k.py --data_dir=DATA --out_dir=coco5k
    python launch/evaluate.py --config=configs/eval_coco5k.py --model=DIR --out=runs/coco5k

Needs the weights of the evaluation networks below networks/ (docs/evaluate.md), 16 GB of host memory for the baseline's
images, and accelerators that sample 5,000 of them for each number of steps. Not run: these weights were not available.
Expected, from the paper's sixth version (our CLIP score is the cosine, a hundredth of this):

    sampler                     FID     CLIP    aesthetic   ImageReward
    SDXL, DDIM, 25 steps        23.29   33.97   5.87        0.82
    TLCM, 2 steps               27.50   33.18   5.90        0.97
    TLCM, 4 steps               30.33   33.52   6.06        1.01
    TLCM, 8 steps               32.40   33.53   6.08        1.02

The entries are defaults for flags of launch/evaluate.py; the command line overrides them.
"""

from ml_collections import ConfigDict

NETWORKS = "networks"  # folder


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            baseline="stabilityai/stable-diffusion-xl-base-1.0",
            steps=["2", "3", "4", "8", "25"],
            prompts="coco5k/prompts.txt",
            num_images=5000,
            data="coco5k/images",
            scorer=f"{NETWORKS}/clip-vit-g-14",
            scorers=[f"aesthetic={NETWORKS}/clip-vit-l-14", f"image_reward={NETWORKS}/image-reward"],
            features=[f"inception={NETWORKS}/pt_inception-2015-12-05.safetensors"],
            resamples=20,  # each is a singular value decomposition of 2048 x 2048
            batch_size=8,
            dtype="bfloat16",
        )
    )
