"""The programs' way of answering mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest

from mlcm_jax.data.text_states import TextStates

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out=/tmp/x"], "--model"),
        (["--modle=a"], "Unknown command line flag 'modle'"),
        (["--model=/no/such/model", "--out=/no/such/out"], "/no/such/model does not exist: name the folder"),
        (["--model=a", "--out=/no/such/out", "extra"], "Unexpected argument 'extra'"),
        (["--model=a", f"--out={ROOT}"], "is not an empty folder: choose another"),
        (["--model=owner/name", "--out=/no/such/out"], "owner/name is no folder here, and it could not be downloaded"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(launch, args, message):
    result = launch("convert", *args)
    assert result["status"] == 2, result["stderr"]
    assert result["stderr"].startswith("error: ") and result["stderr"].count("\n") == 1, result["stderr"]
    assert message in result["stderr"]
    assert result["stdout"] == ""


def test_a_process_of_its_own_answers_alike(launch):
    command = [sys.executable, "launch/convert.py", "--modle=a"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    forked = launch("convert", "--modle=a")
    assert forked == {"status": result.returncode, "stdout": result.stdout, "stderr": result.stderr}


def test_convert(launch, sd15_folder, tmp_path):
    result = launch("convert", f"--model={sd15_folder}", f"--out={tmp_path / 'out'}")
    assert result["status"] == 0, result["stderr"]
    for part in ("unet", "vae", "text_encoder"):
        assert f"{part}" in result["stdout"]
        assert (tmp_path / "out" / part / "config.json").is_file()
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_programs_with_an_adapted_text_folder(launch, sdxl_folder, tmp_path):
    from tiny_models import tiny_adapted_text

    text = f"--text={tiny_adapted_text(tmp_path / 'text')}"
    arguments = [f"--model={sdxl_folder}", text, "--steps=1", "--guidance_scale=1", f"--out={tmp_path / 'image.png'}"]
    result = launch("sample", *arguments, "--prompt=红心", "--prompt=心")
    assert result["status"] == 0, result["stderr"]
    assert "2 images" in result["stdout"] and (tmp_path / "image.png").is_file()

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("红心\n心\n", encoding="utf-8")
    arguments = [f"--model={sdxl_folder}", text, f"--prompts={prompts}", f"--sample_prompts={prompts}", "--text_only"]
    result = launch("encode", *arguments, f"--out={tmp_path / 'states.array_record'}")
    assert result["status"] == 0, result["stderr"]
    states = TextStates(tmp_path / "states.array_record")
    assert states.unconditional.hidden_states.shape == (1, 7, 64) and states.sample.pooled.shape == (2, 32)
    assert not (states.sample.pooled[0] == states.sample.pooled[1]).all()

    for out in ("out", "model.safetensors"):
        result = launch("convert", f"--model={sdxl_folder}", text, f"--out={tmp_path / out}")
        assert result["status"] == 2 and "A model with a text adapter cannot be written" in result["stderr"]
        assert not (tmp_path / out).exists()
