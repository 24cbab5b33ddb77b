"""LoRA files that cannot be read: one sentence says what is wrong."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlcm_jax.errors import UserError
from mlcm_jax.hub.lora import save_lora
from mlcm_jax.hub.lora_reader import load_lora

QUERY = "unet.mid_block.attentions.0.transformer_blocks.1.attn1.to_q.lora_A.weight"
SPOILT = {
    "layer": (lambda t: t.pop(QUERY), "lacks tensors that belong to its others: unet.*transformer_blocks.1.*to_q.lora"),
    "other": (lambda t: t.update({"unet.nowhere.lora_A.weight": torch.zeros(4, 4)}), "naming: unet.nowhere"),
    "encoder": (lambda t: t.update({"text_encoder.x.lora_A.weight": torch.zeros(4, 4)}), "naming: text_encoder.x"),
    "shape": (lambda t: t.update({"unet.mid_block.resnets.0.conv1.lora_B.weight": torch.zeros(3, 4, 1, 1)}), "shape"),
    "empty": (lambda t: t.clear(), "it holds no tensors"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_files(tree, shapes, tmp_path, case):
    change, message = SPOILT[case]
    tensors = load_file(file := save_lora(tree, tmp_path))
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=message):
        load_lora(tmp_path, shapes)


def test_absent_file(shapes, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_lora(tmp_path, shapes)
