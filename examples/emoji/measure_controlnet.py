"""How well samples follow edges: examples/emoji/measure_controlnet.py --data_dir=DIR --out=DIR

For held-out captions and the edges of their real images, with and without the ControlNet, from the same noise: the
teacher in 25 steps and the student, which the ControlNet has never seen, in 4, 2 and 1. A JSON object a row:

    edges       F1 of the sample's edges against those that it was to follow (edges.py), 0 to 1
    clip_score  of the sample against its caption, by a CLIP that the teacher has no part of
"""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from edges import Images, agreement, edges_of
from emoji_dataset.dataset import load_split
from packed_figures import summary
from recipe import IMAGE_SIZE

from mlcm_jax.cli import run_main
from mlcm_jax.evaluation.provenance import provenance
from mlcm_jax.evaluation.statistics.bootstrap import mean_figure
from mlcm_jax.hub.controlnet import load_controlnet
from mlcm_jax.hub.lora import with_loras
from mlcm_jax.hub.pipeline import Pipeline, load_pipeline
from mlcm_jax.hub.save import write_json
from mlcm_jax.images import image_grid, write_image
from mlcm_jax.models.controlnet import Controlled
from mlcm_jax.outputs import check_folder
from mlcm_jax.rewards.clip_score import load_clip_score
from mlcm_jax.rewards.reward_model import batch_indices
from mlcm_jax.sampling.conditioning import encode_prompts, unconditional
from mlcm_jax.sampling.control import Control, controlled_unet
from mlcm_jax.sampling.decode import decode
from mlcm_jax.sampling.sample import draw_noise, sample_latents

HERE = Path(__file__).resolve().parent
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that build_data.py wrote.", required=True)
CONTROLNET = flags.DEFINE_string("controlnet", str(HERE / "controlnet"), "Folder that train_controlnet.py wrote.")
TEACHER = flags.DEFINE_string("teacher", str(HERE / "teacher"), "The pipeline that it was trained for.")
STUDENT = flags.DEFINE_string(
    "student", str(HERE / "student"), "LoRA of a student of that teacher, PLACE or PLACE:SCALE."
)
SCORER = flags.DEFINE_string("scorer", str(HERE / "guard"), "Folder of a CLIPModel with its tokenizer.")
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", 1.5, "The teacher's; a student has its own within.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 256, "Held-out captions, drawn with a fixed seed.", lower_bound=2)
OUT = flags.DEFINE_string("out", None, "Folder for results.json and grid.png.", required=True)

STEPS = {"teacher": (25,), "student": (4, 2, 1)}
CHUNK = 64  # samples at a time
IN_GRID = 12


def sampler(pipeline: Pipeline, captions: list[str], edges: Images, guidance_scale: float) -> Callable[..., Images]:
    """(steps, whether the ControlNet adds) -> an image of each caption, always from the same noise."""
    network = load_controlnet(CONTROLNET.value, pipeline)
    text = encode_prompts(pipeline, captions, IMAGE_SIZE)
    empty = unconditional(pipeline, min(CHUNK, len(captions)), IMAGE_SIZE)
    noise = draw_noise(0, len(captions), pipeline.latent_shape())

    def chunk(rows: np.ndarray, steps: int, with_control: bool) -> Images:
        unet, conditionings = pipeline.unet, [jax.tree.map(lambda a: jnp.asarray(a[rows]), text), empty]
        if with_control:
            unet = controlled_unet(unet, [Control(network, None)])
            control = (jnp.asarray(edges[rows], jnp.float32) / 255,), (jnp.ones(len(rows)),)
            conditionings = [Controlled(one, *control) for one in conditionings]
        settings = {"guidance_scale": guidance_scale, "num_steps": steps, "rng": jax.random.key(1)}
        return decode(
            pipeline.vae, sample_latents(unet, pipeline.scheduler_config, noise[rows], *conditionings, **settings)
        )

    def sample(steps: int, with_control: bool) -> Images:
        chunks = [chunk(rows, steps, with_control) for rows in batch_indices(len(captions), CHUNK)]
        return np.concatenate(chunks)[: len(captions)]

    return sample


def main():
    out = Path(OUT.value)
    check_folder("out", out)
    data = load_split(DATA_DIR.value, "heldout")
    chosen = np.random.default_rng(0).permutation(len(data["caption"]))[: NUM_IMAGES.value]
    captions, edges = [data["caption"][i] for i in chosen], edges_of(data["image"][chosen])
    score = load_clip_score(SCORER.value)
    teacher = load_pipeline(TEACHER.value)
    places = {"teacher": teacher, "student": with_loras(teacher, [STUDENT.value])}
    rows, grid = [], [data["image"][chosen][:IN_GRID], edges[:IN_GRID]]
    for who, pipeline in places.items():
        sample = sampler(pipeline, captions, edges, GUIDANCE_SCALE.value if who == "teacher" else 1.0)
        for steps in STEPS[who]:
            for with_control in (False, True):
                images = sample(steps, with_control)
                grid.append(images[:IN_GRID])
                row = {"who": who, "steps": steps, "control": with_control}
                figures = {"edges": agreement(images, edges), "clip_score": np.asarray(score(images, captions))}
                rows.append(row | {name: summary(mean_figure(values)) for name, values in figures.items()})
                print(json.dumps(rows[-1]), flush=True)
    write_image(image_grid(np.concatenate(grid), columns=IN_GRID), out / "grid.png")
    write_json({**provenance(), "images": len(captions), "figures": rows}, out / "results.json")


if __name__ == "__main__":
    run_main(main)
