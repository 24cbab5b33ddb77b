"""Evaluate a pipeline folder: python launch/evaluate.py --model=DIR --baseline=DIR2 --data=IMAGES --out=DIR3.

The same prompts from the same noise, by the model and by the baseline, at each number of steps. Every figure comes with
a 95 % bootstrap interval; docs/evaluate.md explains each. Writes results.json, results.md, metrics.png, grid.png.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

# Before NumPy is imported. Intervals are thousands of small decompositions: on a busy machine threads that wait for
# each other made them 100 times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from absl import flags
from ml_collections import config_flags

from mlcm_jax import model_flags, size_flags
from mlcm_jax.cli import run_main, take_defaults
from mlcm_jax.diffusion.samplers import SAMPLERS
from mlcm_jax.evaluation.evaluate import Settings, evaluate
from mlcm_jax.rng import MAX_SEED

flags.adopt_module_key_flags(model_flags)
flags.adopt_module_key_flags(size_flags)
CONFIG = config_flags.DEFINE_config_file("config", None, "Other defaults of these flags: configs/eval_coco5k.py.")
SCHEDULER = flags.DEFINE_enum("scheduler", None, list(SAMPLERS), "In place of the model's own, from its settings.")
BASELINE = flags.DEFINE_string("baseline", None, "One to compare with: the teacher.")
STEPS = flags.DEFINE_list("steps", ["1", "2", "3", "4", "8", "25"], "Numbers of sampling steps, of both.")
REFERENCE_STEPS = flags.DEFINE_integer("reference_steps", 25, "Steps of the baseline's reference sample.")
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", None, "Default: 1 (none) for distilled models, 5 for others.")
BASELINE_GUIDANCE_SCALE = flags.DEFINE_float("baseline_guidance_scale", None, "The baseline's, by the same default.")
PROMPTS = flags.DEFINE_string("prompts", "examples/emoji/prompts/eval.txt", "Text file, one prompt a line.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 512, "Prompts that are sampled, the file's first ones.")
DATA = flags.DEFINE_string("data", None, "Real images: a folder of files, or an .npy file, uint8 [n, H, W, 3].")
DATA_MATCHES_PROMPTS = flags.DEFINE_bool("data_matches_prompts", False, "Image i of --data is one of prompt i.")
SCORER = flags.DEFINE_string(
    "scorer", "examples/emoji/scorer", "CLIPModel folder of CLIP score, perceptual distance and diversity."
)
SCORERS = flags.DEFINE_list("scorers", [], "Further reward models, NAME=PLACE,...: see mlcm_jax/rewards/registry.py.")
FEATURES = flags.DEFINE_list(
    "features",
    [],
    "Feature extractors, NAME=PLACE,...: see mlcm_jax/evaluation/extractors/registry.py. Default: clip=--scorer.",
)
DIVERSITY_PROMPTS = flags.DEFINE_integer("diversity_prompts", 32, "Prompts sampled from several seeds.", lower_bound=0)
DIVERSITY_SEEDS = flags.DEFINE_integer("diversity_seeds", 4, "Seeds for each of them.", lower_bound=2)
RESAMPLES = flags.DEFINE_integer("resamples", 200, "Of Frechet and kernel distance, for intervals.", lower_bound=2)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the initial noise.", 0, MAX_SEED)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images that are sampled at a time.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the UNets' and text encoders' arithmetic.")
OUT = flags.DEFINE_string("out", "runs/evaluation", "Folder for what is written.")


def main():
    take_defaults(CONFIG.value)
    given: dict[str, Any] = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Settings)}
    print(evaluate(Settings(**given), Path(OUT.value)), end="")


if __name__ == "__main__":
    run_main(main)
