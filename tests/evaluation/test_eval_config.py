"""configs/eval_coco5k.py reaches launch/evaluate.py, and the command line goes before it."""

import pytest

UNKNOWN_ENTRY = "from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({'num_photos': 3})\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config=configs/eval_coco5k.py", "--prompts={folder}/prompts.txt"], "--num_images=5000 is more than the 4"),
        (["--config={folder}/unknown.py"], "the entry 'num_photos', which is no flag"),
        (["--config=configs/nothing.py"], "--config=configs/nothing.py is not a configuration file"),
    ],
)
def test_config_of_an_evaluation(launch, args, message, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "unknown.py").write_text(UNKNOWN_ENTRY)
    result = launch("evaluate", "--model=nowhere", *(arg.format(folder=tmp_path) for arg in args))
    assert result["status"] == 2, result["stderr"]
    assert result["stderr"].startswith("error: ") and result["stderr"].count("\n") == 1, result["stderr"]
    assert message in result["stderr"]


def test_networks_of_the_config_are_in_the_registries():
    from configs.eval_coco5k import get_config
    from mlcm_jax.evaluation.extractors.registry import FEATURE_EXTRACTORS
    from mlcm_jax.rewards.registry import REWARD_MODELS, parse_places

    config = get_config()
    assert set(parse_places("scorers", config.scorers, REWARD_MODELS)) == {"aesthetic", "image_reward"}
    assert set(parse_places("features", config.features, FEATURE_EXTRACTORS)) == {"inception"}
