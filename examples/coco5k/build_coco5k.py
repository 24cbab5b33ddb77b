"""Fetch MSCOCO 2017's validation split; write its images and the first caption of each, for configs/eval_coco5k.py.

python examples/coco5k/build_coco5k.py --data_dir=DATA --out_dir=coco5k
"""

from pathlib import Path

import tensorflow_datasets as tfds
from absl import flags
from coco_captions_2017 import CocoCaptions2017
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.util import DownloadError
from tqdm import tqdm

from mlcm_jax.cli import run_main
from mlcm_jax.errors import UserError

_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of the TensorFlow Datasets, and of downloads.", required=True)
_OUT_DIR = flags.DEFINE_string("out_dir", "coco5k", "Folder that prompts.txt and images/ are written to.")


def fetch(data_dir: Path) -> CocoCaptions2017:
    """The finished data set below `data_dir`; raises UserError when it cannot be downloaded."""
    builder = CocoCaptions2017(data_dir=str(data_dir), file_format="array_record")
    try:
        config = tfds.download.DownloadConfig(force_checksums_validation=True)
        builder.download_and_prepare(download_config=config)
    except (OSError, DownloadError, NonMatchingChecksumError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"MSCOCO could not be fetched into {data_dir} ({reason}): run this again online.") from None
    return builder


def write(builder: CocoCaptions2017, out_dir: Path) -> int:
    """Write prompts.txt, the first caption of each image, and the JPEG files in the same order; returns how many."""
    images_dir, prompts = out_dir / "images", []
    images_dir.mkdir(parents=True, exist_ok=True)
    source = builder.as_data_source("validation", decoders={"image": tfds.decode.SkipDecoding()})
    indices = sorted(range(len(source)), key=lambda i: int(source[i]["image_id"]))
    for index in tqdm(indices, unit="image"):
        example = source[index]
        (images_dir / f"{int(example['image_id']):012d}.jpg").write_bytes(example["image"])
        prompts.append(example["captions"][0].decode())
    (out_dir / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    return len(prompts)


def main():
    out_dir = Path(_OUT_DIR.value)
    count = write(fetch(Path(_DATA_DIR.value).expanduser()), out_dir)
    print(f"{out_dir}: {count} captions and images")


if __name__ == "__main__":
    run_main(main)
