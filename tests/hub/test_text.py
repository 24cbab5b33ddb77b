"""Text encoders and tokenizers of another folder in a pipeline's place."""

import json
import shutil

import jax
import pytest
from safetensors.numpy import load_file, save_file

from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import load_pipeline, save_pipeline
from mlcm_jax.hub.text import with_text
from mlcm_jax.sampling.conditioning import encode_prompts

PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@pytest.fixture
def other_text(sdxl_folder, tmp_path):
    """The pipeline's own text parts with the first encoder's embeddings doubled and a mark in its tokenizer."""
    for part in PARTS:
        shutil.copytree(sdxl_folder / part, tmp_path / "text" / part)
    file = tmp_path / "text/text_encoder/model.safetensors"
    tensors = load_file(file)
    save_file({k: 2 * v if "token_embedding" in k else v for k, v in tensors.items()}, file, {"format": "pt"})
    (tmp_path / "text/tokenizer/mark.txt").write_text("new")
    return tmp_path / "text"


def test_the_written_pipeline_speaks_as_the_text_folder(sdxl_folder, other_text, tmp_path):
    own = load_pipeline(sdxl_folder)
    other = with_text(own, other_text)
    assert other.unet is own.unet and other.vae is own.vae
    save_pipeline(other, tmp_path / "out")
    assert (tmp_path / "out/tokenizer/mark.txt").is_file()
    states = [encode_prompts(p, ["a cat"], 32) for p in (own, other, load_pipeline(tmp_path / "out"))]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), states[1], states[2]))
    assert not (states[0].hidden_states == states[1].hidden_states).all()


def test_a_text_folder_that_does_not_fit(sdxl_folder, other_text):
    pipeline = load_pipeline(sdxl_folder)
    config_file = other_text / "text_encoder_2" / "config.json"
    width = json.loads(config_file.read_text())["projection_dim"]
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"projection_dim": width // 2}))
    file = other_text / "text_encoder_2/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"text_projection.weight": tensors["text_projection.weight"][: width // 2]}, file)
    with pytest.raises(UserError, match=f"pooled states .* are {width // 2} wide, but the model takes {width}"):
        with_text(pipeline, other_text)
    shutil.rmtree(other_text / "tokenizer_2")
    with pytest.raises(UserError, match="tokenizer_2 does not exist"):
        with_text(pipeline, other_text)
