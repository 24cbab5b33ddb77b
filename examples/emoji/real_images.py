"""Write the real images of a caption file's first captions, for launch/evaluate.py to compare with.

python examples/emoji/real_images.py --data_dir=DATA --num_images=512 --out=real.npy
python launch/evaluate.py --model=DIR --num_images=512 --data=real.npy --data_matches_prompts
"""

from pathlib import Path

import numpy as np
from absl import flags
from emoji_dataset.dataset import SPLITS, EmojiSplit, load_split
from emoji_dataset.prompts import rows_of

from mlcm_jax.cli import run_main
from mlcm_jax.data.prompts import read_prompts
from mlcm_jax.errors import UserError

DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that build_data.py wrote.", required=True)
SPLIT = flags.DEFINE_enum("split", "train", SPLITS, "Where the captions come from.")
PROMPTS = flags.DEFINE_string("prompts", "examples/emoji/prompts/eval.txt", "Captions, one a line; none: any images.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 512, "Captions that are taken, the file's first ones.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "The .npy file, uint8 [num_images, 64, 64, 3].", required=True)


def main():
    data = load_split(DATA_DIR.value, SPLIT.value)
    if PROMPTS.value:
        indices = captioned(data)
    else:
        indices = np.random.default_rng(0).permutation(len(data["caption"]))[: NUM_IMAGES.value]
    out = Path(OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    np.save(out, data["image"][indices])
    print(f"{out}: {len(indices)} images of the {SPLIT.value} split")


def captioned(data: EmojiSplit) -> list[int]:
    """Indices of the prompt file's first captions."""
    prompts = read_prompts(PROMPTS.value)
    if NUM_IMAGES.value > len(prompts):
        raise UserError(
            f"--num_images={NUM_IMAGES.value} is more than the {len(prompts)} prompts of {PROMPTS.value}: lower it."
        )
    return rows_of(data, prompts[: NUM_IMAGES.value])


if __name__ == "__main__":
    run_main(main)
