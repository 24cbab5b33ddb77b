"""Every key of every table of settings with values of a wrong type or sign: one sentence, or a whole network."""

import importlib
import json
import shutil

import jax
import numpy as np
import pytest

from mlcm_jax.diffusion import scheduler_config
from mlcm_jax.diffusion.samplers import step_table
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.errors import UserError
from mlcm_jax.hub.network import NETWORKS, network_shapes
from mlcm_jax.hub.pipeline import load_pipeline, read_architecture
from mlcm_jax.json_config import UNREAD, Kind
from mlcm_jax.models import clip_config, latent_lpips, tiny_vae, unet_config, vae
from mlcm_jax.rewards import preprocess
from mlcm_jax.rewards.networks import blip, efficientnet_lite

TOWER = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9}
BLOCKS = {"block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 1}
UNET = BLOCKS | {
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 2,
    "projection_class_embeddings_input_dim": 20,
}
VISION = {k: v for k, v in TOWER.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}
TINY = {f"{half}_block_out_channels": [8, 8] for half in ("encoder", "decoder")}
TINY |= {f"num_{half}_blocks": [1, 1] for half in ("encoder", "decoder")}
# a network's class: a small config.json, and the table of its keys
NETWORK_TABLES = {
    "UNet2DConditionModel": (UNET, unet_config.CONFIG_KEYS),
    "AutoencoderKL": (BLOCKS, vae.CONFIG_KEYS),
    "AutoencoderTiny": (TINY, tiny_vae.CONFIG_KEYS),
    "CLIPTextModel": (TOWER, clip_config.TEXT_KEYS),
    "CLIPTextModelWithProjection": (TOWER, clip_config.TEXT_KEYS),
    "CLIPVisionModelWithProjection": (VISION, clip_config.VISION_KEYS),
    "CLIPModel": ({"text_config": TOWER, "vision_config": VISION}, clip_config.CLIP_KEYS),
    "LatentLPIPS": ({"block_out_channels": [8], "layers_per_block": [1]}, latent_lpips.KEYS),
}
NAN = float("nan")
WRONG = [
    None,
    "12",
    "",
    [],
    [1],
    [8, "8"],
    [[]],
    {},
    {"a": 1},
    -1,
    0,
    0.5,
    True,
    NAN,
    float("inf"),
    10**400,
    1e400,
    2**70,
]


SEEN = set()


def build_network(_folder, class_name, config):
    spec = NETWORKS[class_name]
    named = {"architectures": [class_name]} if spec.library == "transformers" else {}
    module = getattr(importlib.import_module(spec.module), spec.attribute).from_config(config | named)
    if module not in SEEN:  # most values that are taken change nothing
        assert all(0 < leaf.size < 1e9 for leaf in jax.tree.leaves(network_shapes(module, config)))
        SEEN.add(module)


def build_scheduler(_folder, class_name, config):
    config = config | {"_class_name": class_name}
    assert np.isfinite(Schedule.from_config(config).alphas_cumprod).all()
    table = step_table(config, 4)
    rows = np.concatenate(
        [np.reshape(v, (len(table.timesteps), -1)) for v in table if isinstance(v, np.ndarray)], axis=1
    )
    assert len(rows) and np.isfinite(rows).all() and table.clip_range > 0


def build_preprocessor(folder, _class_name, config):
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    out = preprocess.Preprocessor.from_folder(folder)(np.zeros((1, 300, 300, 3), np.uint8))
    assert np.isfinite(out).all()


def build_efficientnet(_folder, _class_name, config):
    efficientnet_lite.EfficientNetLite.from_config(config)


def build_blip(_folder, _class_name, config):
    blip.TextConfig.read(config)


TABLES = {name: (build_network, *table) for name, table in NETWORK_TABLES.items()}
TABLES |= {
    name: (build_scheduler, {}, table) for name, table in scheduler_config.SCHEDULERS.items() if "PNDM" not in name
}
TABLES["PNDMScheduler"] = (build_scheduler, {"skip_prk_steps": True}, scheduler_config.SCHEDULERS["PNDMScheduler"])
TABLES["preprocessor"] = (build_preprocessor, {}, preprocess.KEYS)
TABLES["EfficientNetLite"] = (
    lambda _f, _c, c: efficientnet_lite.EfficientNetLite.from_config(c),
    {},
    efficientnet_lite.KEYS,
)
TABLES["med_config"] = (lambda _f, _c, c: blip.TextConfig.read(c), {}, blip.MED_KEYS)


def test_all_networks_are_here():
    assert NETWORKS.keys() == NETWORK_TABLES.keys()


KEYS = [(name, key) for name, (_, _, table) in TABLES.items() for key, (_, rule) in table.items() if rule is not UNREAD]


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_values_of_a_wrong_type_or_sign(tmp_path, name, key):
    build, config, table = TABLES[name]
    rule = table[key][1]
    for value in WRONG:
        if not isinstance(rule, Kind) and value in rule and build is build_network:
            continue  # other settings, which the tests of the networks draw
        try:
            build(tmp_path, name, config | {key: json.loads(json.dumps(value))})
        except UserError as e:
            assert key.removesuffix("_dict") in str(e) or "betas" in str(e) or "num_steps" in str(e), (value, e)
            assert len(str(e)) < 300 and "\n" not in str(e), (value, e)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_s_own_defaults_and_what_nothing_reads(tmp_path, name):
    build, config, table = TABLES[name]
    unread = {key: value for key, (_, rule) in table.items() if rule is UNREAD for value in ([[{}]],)}
    build(tmp_path, name, config | unread)


EXAMPLES = {
    "an offset that is null": ("scheduler/scheduler_config", {"steps_offset": None}, "steps_offset=None"),
    "a beta that is text": ("scheduler/scheduler_config", {"beta_end": "0.012"}, "beta_end='0.012'"),
    "a scale that is null": ("vae/config", {"scaling_factor": None}, "scaling_factor=None"),
    "no heads": ("text_encoder/config", {"num_attention_heads": 0}, "num_attention_heads=0"),
}


@pytest.mark.parametrize("case", EXAMPLES)
def test_a_pipeline_is_refused_when_it_is_read(sdxl_folder, tmp_path, case):
    place, settings, message = EXAMPLES[case]
    folder = shutil.copytree(sdxl_folder, tmp_path / "model")
    file = folder / f"{place}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(UserError, match=message):
        step_table(load_pipeline(folder, parts=()).scheduler_config, 4)


@pytest.mark.parametrize(("size", "latent_size"), [(16, (16, 16)), ([12, 16], (12, 16)), (None, None)])
def test_the_size_that_a_unet_was_trained_on(sd15_folder, tmp_path, size, latent_size):
    folder = shutil.copytree(sd15_folder, tmp_path / "model")
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": size}))
    pipeline = read_architecture(folder)
    if latent_size is None:
        with pytest.raises(UserError, match="has no sample_size"):
            _ = pipeline.latent_size
    else:
        assert pipeline.latent_size == latent_size
        if latent_size[0] != latent_size[1]:
            with pytest.raises(UserError, match="takes square images alone"):
                _ = pipeline.latent_side
