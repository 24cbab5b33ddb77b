"""The training step in bfloat16 lowers for CUDA, its attention by cuDNN in both directions, for all kinds of states."""

from pathlib import Path

import cuda_driver
import jax
import pytest
from small_runs import settings

import mlcm_jax.training.program
from mlcm_jax.models.attention_backend import AttentionBackend
from mlcm_jax.training.program import build_program

SCORER = Path(__file__).parents[2] / "examples" / "emoji" / "scorer"
PREFERENCE = {"states": "student", "student_steps": 2, "target": "x0", "preference.weight": 1.0}
PREFERENCE |= {"preference.reward_model": f"clip={SCORER}"}


# The UNet has one transformer block: two calls of attention, one of them to 77 keys.
@pytest.mark.parametrize(
    ("changes", "forward", "backward"),
    [
        # teacher, target and student, and the student again for its gradient
        ({"trainable": "full", "remat": True}, 8, 2),
        ({"trainable": "lora", "states": "mds"}, 6, 2),
        (PREFERENCE | {"trainable": "lora"}, 8, 2),
    ],
    ids=["streaming, full, remat", "mds, lora", "student, lora, preference"],
)
def test_the_step_lowers_for_cuda(changes, forward, backward, architecture, monkeypatch):
    cuda_driver.answer(monkeypatch, "9.0")
    monkeypatch.setattr(
        mlcm_jax.training.program, "attention_backend", lambda config, mesh: AttentionBackend("auto", "gpu", mesh)
    )
    config = settings(batch_size=2, compute_dtype="bfloat16", frozen_dtype="bfloat16")
    config.update_from_flattened_dict(changes)
    config.lora.update({"rank": 4, "targets": (r"/to_(q|k|v|out_0)$",)})
    program = build_program(config, architecture, jax.devices()[:1])
    (stage,) = program.stages
    traced = stage.step.trace(program.state, program.frozen, stage.batch)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert cuda_driver.attention_calls(text) == (forward, backward)
    assert "stablehlo.custom_call @__cudnn$fmha" in text
