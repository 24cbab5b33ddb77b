"""launch/evaluate.py as a program: a model that is its baseline scores as the baseline does."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_models import TEXT, randomise, tiny_tokenizer
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from mlcm_jax.data.real_images import RealImages
from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.evaluate import load_pipelines
from mlcm_jax.sampling.sample import default_guidance_scale

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
OWN = {"clip_score", "seconds_per_image", "diversity"}
PAIRWISE = {"latent_mse", "perceptual_distance"}
PIXELS = {f"{metric}/pixels/data" for metric in ("high_frequency_energy", "noise_level")}  # nothing here is on white
SETS = ("frechet_distance", "kernel_distance", "precision", "recall")


@pytest.fixture
def evaluate(launch):
    """evaluate(flag=value...) -> its stdout."""

    def run(**flags):
        result = launch("evaluate", *(f"--{name}={value}" for name, value in flags.items()))
        assert result["status"] == 0, result["stderr"]
        return result["stdout"]

    return run


@pytest.fixture(scope="module")
def inputs(sdxl_folder, tmp_path_factory):
    """Flags: a model and a copy of it as the baseline, a scorer, 9 prompts and 9 images."""
    folder = tmp_path_factory.mktemp("evaluate")
    scorer, prompts = folder / "scorer", folder / "prompts.txt"
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=6))
    randomise(model, 5).save_pretrained(scorer)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16).save_pretrained(scorer)
    tiny_tokenizer(folder / "vocabulary").save_pretrained(scorer)
    prompts.write_text("".join(f"{color} {thing}\n" for color in ("red", "blue", "green") for thing in "abc"))
    np.save(folder / "real.npy", np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3)).astype(np.uint8))
    shutil.copytree(sdxl_folder, folder / "copy")
    return {"model": folder / "copy", "baseline": sdxl_folder, "scorer": scorer, "prompts": prompts} | {
        "data": folder / "real.npy"
    }


def test_a_model_that_is_its_baseline(evaluate, inputs, tmp_path):
    """Two full batches and a part of a third; the reference is not among the steps, and is a row all the same."""
    sizes = {"num_images": 8, "batch_size": 3, "steps": "2,1", "reference_steps": 5, "resamples": 20}
    again = f"clip-again={inputs['scorer']}"  # a second one, which is the first
    sizes |= {"features": f"clip={inputs['scorer']},{again}", "scorers": again}
    sizes |= {"guidance_scale": 3, "baseline_guidance_scale": 3, "diversity_prompts": 4, "diversity_seeds": 2}
    told = evaluate(**inputs, **sizes, data_matches_prompts=True, out=tmp_path / "out")

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "launch/evaluate.py" in results["command"] and results["hardware"]["cpu"] and results["versions"]["jax"]
    assert results["reference"] == "baseline 5 steps" and results["settings"]["num_images"] == 8
    rows = {(row["sampler"], row["steps"]): row for row in results["rows"]}
    assert list(rows) == [("model", 1), ("model", 2), ("baseline", 1), ("baseline", 2), ("baseline", 5)]
    assert all(row["scheduler"] == "DDIMScheduler" and row["guidance_scale"] == 3 for row in rows.values())
    names = [f"{name}/{reference}" for name in ("clip", "clip-again") for reference in ("data", "baseline")]
    sets = {f"{metric}/{name}" for metric in SETS for name in names} | PIXELS
    for n in (1, 2):
        model, baseline = (rows[who, n]["figures"] for who in ("model", "baseline"))
        assert set(model) == set(results["metrics"]) == OWN | {"clip-again_score"} | PAIRWISE | sets
        assert {name.replace("-again", ""): model[name] for name in model if "-again" in name}.items() <= model.items()
        for key in model.keys() - {"seconds_per_image"}:
            for part in ("value", "interval"):
                np.testing.assert_allclose(model[key][part], baseline[key][part], rtol=1e-5, atol=1e-9)

    reference, far, near = (rows["baseline", n]["figures"] for n in (5, 1, 2))
    for key in ("latent_mse", "perceptual_distance", "frechet_distance/clip/baseline", "kernel_distance/clip/baseline"):
        np.testing.assert_allclose([reference[key]["value"], *reference[key]["interval"]], 0, atol=1e-9)
    assert reference["precision/clip/baseline"]["value"] == reference["recall/clip/baseline"]["value"] == 1
    assert far["latent_mse"]["value"] > near["latent_mse"]["value"] > 0
    low, high = far["latent_mse"]["interval"]
    assert low < far["latent_mse"]["value"] < high
    assert all(row["figures"]["seconds_per_image"]["value"] > 0 for row in rows.values())

    ratios = rows["model", 1]["relative_to_reference"]
    key = "frechet_distance/clip/data"
    assert ratios[key]["value"] == pytest.approx(far[key]["value"] / reference[key]["value"])
    assert not PAIRWISE & ratios.keys()

    tables = (tmp_path / "out" / "results.md").read_text()
    assert told == tables and tables.count("\n## ") + tables.startswith("## ") == 5
    for image in ("grid.png", "metrics.png"):
        assert np.asarray(Image.open(tmp_path / "out" / image).convert("L")).std() > 1


def test_a_model_alone(evaluate, inputs, tmp_path):
    """Without a baseline and real images only the figures that need neither."""
    alone = {name: inputs[name] for name in ("model", "scorer", "prompts")}
    evaluate(**alone, num_images=4, steps=1, diversity_prompts=0, out=tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["reference"] is None
    (row,) = results["rows"]
    assert row["figures"].keys() == OWN - {"diversity"} and "relative_to_reference" not in row
    assert row["guidance_scale"] == 5


def test_another_scheduler_is_the_models_alone(inputs):
    """A teacher that is sampled like its students has no guidance by default, as they have."""
    names = dict.fromkeys(("architecture", "variant", "revision"))
    settings = SimpleNamespace(**names, model=inputs["model"], baseline=inputs["baseline"], dtype="float32")
    for scheduler, scale in ((None, 5), ("LCMScheduler", 1)):
        settings.scheduler = scheduler
        pipelines = load_pipelines(settings)
        assert pipelines["model"].scheduler_config["_class_name"] == (scheduler or "DDIMScheduler")
        assert default_guidance_scale(pipelines["model"]) == scale
        assert pipelines["baseline"].scheduler_config["_class_name"] == "DDIMScheduler"


def test_images_of_a_folder(tmp_path):
    """By name, cropped about the centre and resized; an array of them is the same."""
    wide = np.zeros((40, 60, 3), np.uint8)
    wide[:, 10:50] = 200  # all that is left is of one colour
    Image.fromarray(wide).save(tmp_path / "b.png")
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(tmp_path / "a.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    real = RealImages(tmp_path, 20)
    assert len(real) == 2
    first, second = real.batches(1, 2)
    assert first.shape == second.shape == (1, 20, 20, 3) and (first == 90).all() and (second == 200).all()
    np.save(tmp_path / "all.npy", np.concatenate([first, second]))
    (both,) = RealImages(tmp_path / "all.npy", 20).batches(5, 2)
    np.testing.assert_array_equal(both, np.concatenate([first, second]))


def test_a_file_that_is_no_image(tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(UserError, match=r"broken.png cannot be read as an image .* replace it or take it away"):
        list(RealImages(tmp_path, 8).batches(1, 1))
