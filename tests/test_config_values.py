"""Every key of every table of settings with values of a wrong type or sign: one sentence, or a whole network."""

import json
import shutil

import numpy as np
import pytest
from small_settings import NETWORK_TABLES, build_network, build_scheduler

from mlcm_jax.diffusion import scheduler_config
from mlcm_jax.diffusion.samplers import step_table
from mlcm_jax.errors import UserError
from mlcm_jax.hub import preprocess
from mlcm_jax.hub.network import NETWORKS
from mlcm_jax.hub.pipeline import load_pipeline, read_architecture
from mlcm_jax.json_config import UNREAD, Kind
from mlcm_jax.rewards.networks import blip, efficientnet_lite

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


def build_preprocessor(folder, _class_name, config):
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    out = preprocess.Preprocessor.from_folder(folder)(np.zeros((1, 300, 300, 3), np.uint8))
    assert np.isfinite(out).all()


def build_efficientnet(_folder, _class_name, config):
    efficientnet_lite.EfficientNetLite.from_config(config)


def build_blip(_folder, _class_name, config):
    blip.read_text_config(config)


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
TABLES["med_config"] = (lambda _f, _c, c: blip.read_text_config(c), {}, blip.MED_KEYS)


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
        assert pipeline.image_size == tuple(side * pipeline.downscale for side in latent_size)
        assert pipeline.latent_shape() == (*latent_size, 4)
