"""Records what the public PyTorch networks make of the weights and images of tests/recorded_weights.py.

The packages do not go together with what the tests install, so their outputs are kept here, beside this program:

    pip install --no-deps --target=A torchvision==0.28.0 pytorch-fid==0.3.0 open_clip_torch==3.3.0 ftfy==6.3.1 wcwidth
    pip install --no-deps --target=B image-reward==1.5 transformers==4.46.3 tokenizers==0.20.3 \
        huggingface_hub==0.26.5 timm==0.6.13 fairscale==0.4.13
    PYTHONPATH=tests:A python tests/evaluation/recorded/record.py inception open_clip
    PYTHONPATH=tests:B:A python tests/evaluation/recorded/record.py image_reward
    pip install --no-deps --target=C einops==0.8.2
    git clone https://github.com/Kwai-Kolors/MPS D
    PYTHONPATH=tests:C:D python tests/evaluation/recorded/record.py mps

with torch 2.13.0 and transformers 5 installed, CPU, float32.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from recorded_weights import example_images, weights

HERE = Path(__file__).parent
OPEN_CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 16, "head_width": 8, "patch_size": 14, "mlp_ratio": 1.5},
    "text_cfg": {"context_length": 77, "vocab_size": 520, "width": 24, "heads": 4, "layers": 3},
}
VISION = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}
MED = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
MED |= {"vocab_size": 40, "max_position_embeddings": 10, "layer_norm_eps": 1e-12, "add_cross_attention": True}
TOWER = {"num_hidden_layers": 2, "num_attention_heads": 2}
MPS_CLIP = {
    "text_config": TOWER
    | {"hidden_size": 24, "intermediate_size": 32, "vocab_size": 60, "bos_token_id": 58, "eos_token_id": 59}
    | {"hidden_act": "gelu", "max_position_embeddings": 8},
    "vision_config": TOWER
    | {"hidden_size": 16, "intermediate_size": 24, "image_size": 32, "patch_size": 8, "hidden_act": "gelu"},
    "projection_dim": 12,
}
MPS_CROSS = {"dim": 12, "layer_num": 2, "dim_head": 8, "heads": 3}
MPS_CONDITION = [5, 6, 7, 59, 59, 59, 59, 59]
MPS_IDS = [[58, 5, 17, 59, 59, 59, 59, 59], [58, 31, 32, 33, 34, 35, 36, 59], [58, 40, 59, 59, 59, 59, 59, 59]]
IDS = np.array([[2, 30, 7, 3, 0, 0], [2, 5, 6, 9, 11, 3], [2, 3, 0, 0, 0, 0]])


def fill(module):
    shapes = {name: t.shape for name, t in module.state_dict().items() if t.is_floating_point()}
    state = {name: torch.from_numpy(np.array(w)) for name, w in weights(shapes).items()}
    module.load_state_dict(state, strict=False)
    return module.eval()


def shapes(model):
    """Of all parameters, by name, as JSON."""
    return np.array(json.dumps({name: p.shape for name, p in model.named_parameters()}))


def inception():
    import pytorch_fid.inception as reference

    # The function downloads its weights: it is given none, and the network is filled afterwards.
    reference.load_state_dict_from_url = lambda *_, **__: {}
    load, torch.nn.Module.load_state_dict = torch.nn.Module.load_state_dict, lambda *_, **__: None
    network = reference.fid_inception_v3()
    torch.nn.Module.load_state_dict = load
    fill(network)
    reference.fid_inception_v3 = lambda: network
    module = reference.InceptionV3([reference.InceptionV3.DEFAULT_BLOCK_INDEX]).eval()
    outputs = {}
    for side in (64, 320):
        images = torch.from_numpy(example_images(2, side, side).transpose(0, 3, 1, 2).copy()).float() / 255
        outputs[f"features_{side}"] = module(images)[0][:, :, 0, 0].numpy()
    return outputs


def open_clip():
    import open_clip

    model = fill(open_clip.CLIP(**OPEN_CLIP))
    pixels = torch.from_numpy(example_images(3, 28, 28).transpose(0, 3, 1, 2).copy()).float() / 255
    ids = torch.full((3, 77), 513)
    for row, text in zip(ids, ([4, 30, 7, 500], [7], range(100, 175)), strict=True):
        row[: len(text) + 1] = torch.tensor([512, *text])
    images, texts = model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)
    return {"scores": (images * texts).sum(-1).numpy(), "ids": ids.numpy(), "shapes": shapes(model)}


def image_reward():
    # The package's own __init__ imports trainers and other scorers: only the networks are wanted.
    import importlib.util

    root = importlib.util.find_spec("ImageReward").submodule_search_locations[0]
    for name, folder in {"ImageReward": "", "ImageReward.models": "models"}.items():
        package = types.ModuleType(name)
        package.__path__ = [str(Path(root) / folder)]
        sys.modules[name] = package
    from ImageReward.models.BLIP.med import BertConfig, BertModel
    from ImageReward.models.BLIP.vit import VisionTransformer

    sys.modules["ImageReward.models.BLIP.blip_pretrain"] = types.ModuleType("blip_pretrain")
    sys.modules["ImageReward.models.BLIP.blip_pretrain"].BLIP_Pretrain = None
    from ImageReward.ImageReward import MLP
    from ImageReward.ImageReward import ImageReward as Reference

    model = Reference.__new__(Reference)
    torch.nn.Module.__init__(model)
    model.blip = torch.nn.Module()
    model.blip.visual_encoder = VisionTransformer(**VISION, mlp_ratio=4)
    config = BertConfig(**MED, encoder_width=VISION["embed_dim"])
    model.blip.text_encoder = BertModel(config=config, add_pooling_layer=False)
    model.mlp = MLP(MED["hidden_size"])
    model.device, model.mean, model.std = "cpu", 0.16717362830052426, 1.0333394966054072
    fill(model)
    pixels = torch.from_numpy(example_images(3, 32, 32).transpose(0, 3, 1, 2).copy()).float() / 255
    ids = torch.from_numpy(IDS)
    scores = model.score_gard(ids, (ids != 0).long(), pixels)
    full_size = full_size_shapes(BertConfig, BertModel, MLP)
    return {"scores": scores[:, 0].numpy(), "ids": IDS, "shapes": shapes(model), "full_size_shapes": full_size}


def mps():
    """The repository's layers on transformers' towers, put together as its eval_overall_mps_on_imagereward.py does."""
    import transformers
    from trainer.models.cross_modeling import Cross_model

    model = torch.nn.Module()
    model.model = transformers.CLIPModel(transformers.CLIPConfig(**MPS_CLIP))
    model.cross_model = Cross_model(**MPS_CROSS)
    buffers = {name: b.clone() for name, b in model.cross_model.named_buffers()}  # norms' biases, frequencies
    fill(model)
    model.cross_model.load_state_dict(buffers, strict=False)
    clip, scores = model.model, []
    pixels = torch.from_numpy(example_images(3, 32, 32).transpose(0, 3, 1, 2).copy()).float() / 255
    condition = clip.text_projection(clip.text_model(torch.tensor([MPS_CONDITION]))[0])
    for ids, image_pixels in zip(MPS_IDS, pixels, strict=True):
        text = clip.text_model(torch.tensor([ids]))
        words, end = clip.text_projection(text[0]), clip.text_projection(text[1])
        alike = torch.einsum("bid,bjd->bji", words, condition).max(dim=1, keepdim=True)[0]
        alike = alike / alike.max()
        image = clip.visual_projection(clip.vision_model(image_pixels[None])[0])
        mask = torch.where(alike > 0.3, 0, float("-inf")).repeat(1, image.shape[1], 1)
        image = model.cross_model(image, words, mask)[:, 0]
        scores.append(clip.logit_scale.exp() * torch.nn.functional.cosine_similarity(image, end)[0])
    tensors = np.array(json.dumps({name: t.shape for name, t in model.state_dict().items()}))
    return {"scores": torch.stack(scores).numpy(), "ids": np.array(MPS_IDS), "shapes": tensors}


def full_size_shapes(bert_config, bert, mlp):
    """Of the published ImageReward, without its weights."""
    from ImageReward.models.BLIP.blip import create_vit

    model = torch.nn.Module()
    model.blip = torch.nn.Module()
    model.blip.visual_encoder, width = create_vit("large", 224)
    with torch.device("meta"):
        config = bert_config(vocab_size=30524, encoder_width=width, add_cross_attention=True)
        model.blip.text_encoder = bert(config=config, add_pooling_layer=False)
        model.mlp = mlp(768)
    return shapes(model)


if __name__ == "__main__":
    # torchvision's operators for CUDA do not load beside a torch for CPUs; their declarations let it be imported.
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    with torch.no_grad():
        for name in sys.argv[1:]:
            outputs = globals()[name]()
            np.savez_compressed(HERE / f"{name}.npz", **outputs)
            print(name, {k: v.shape for k, v in outputs.items()}, outputs.get("scores"))
