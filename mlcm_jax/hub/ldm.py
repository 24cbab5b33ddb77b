"""Names of the UNet and of the autoencoder in the original latent diffusion code, which single files are written in.

There the UNet's resnets, attentions and samplers are numbered in the order they run (arXiv 2112.10752's code).
"""

import re
from collections.abc import Collection, Iterable

from mlcm_jax.errors import UserError
from mlcm_jax.hub.layout import Place

Rules = tuple[tuple[str, str], ...]

UNET: Rules = (
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
    (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
)
# after the number of the block that they are in
UNET_MODULES: dict[str, Rules] = {
    "resnets": (
        (r"^norm1\.", "in_layers.0."),
        (r"^conv1\.", "in_layers.2."),
        (r"^time_emb_proj\.", "emb_layers.1."),
        (r"^norm2\.", "out_layers.0."),
        (r"^conv2\.", "out_layers.3."),
        (r"^conv_shortcut\.", "skip_connection."),
    ),
    "attentions": ((r"^", ""),),
    "downsamplers": ((r"^conv\.", "op."),),
    "upsamplers": ((r"^conv\.", "conv."),),
}
VAE: Rules = (
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)
_MODULE = re.compile(r"^(?:(down_blocks|up_blocks)\.(\d+)|mid_block)\.(resnets|attentions|\w+samplers)\.(\d+)\.")
_VAE_UP = re.compile(r"\.up\.(\d+)\.")
_VAE_ATTENTION = re.compile(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$")  # 1x1 convolutions there


def unet_places(names: Collection[str]) -> dict[str, Place]:
    """Where LDM's UNet keeps the tensors that diffusers' calls ``names``; raises UserError for one it has no name for.

    ``names`` are all of the network's: the numbers of the blocks follow from them.
    """
    numbers = _numbers({m[0] for m in map(_MODULE.match, names) if m})
    return {name: Place(_unet_name(name, numbers)) for name in names}


def _unet_name(name: str, numbers: dict[str, str]) -> str:
    module = _MODULE.match(name)
    head, tail = (numbers[module[0]], name[module.end() :]) if module else ("", name)
    for pattern, replacement in UNET_MODULES[module[3]] if module else UNET:
        if re.search(pattern, tail):
            return head + re.sub(pattern, replacement, tail, count=1)
    raise UserError(f"The UNet's {name} has no name in a single file's layout: write a diffusers folder instead.")


def _numbers(modules: Collection[str]) -> dict[str, str]:
    """LDM's prefix of each module, "down_blocks.1.resnets.0." -> "input_blocks.4.0."."""
    numbers = {}
    count = 1  # input_blocks.0 is conv_in
    for block in _blocks("down_blocks", modules):
        for i in range(_count(f"{block}.resnets.", modules)):
            numbers[f"{block}.resnets.{i}."] = f"input_blocks.{count}.0."
            numbers[f"{block}.attentions.{i}."] = f"input_blocks.{count}.1."
            count += 1
        if f"{block}.downsamplers.0." in modules:
            numbers[f"{block}.downsamplers.0."] = f"input_blocks.{count}.0."
            count += 1
    count = 0
    for block in _blocks("up_blocks", modules):
        attends = f"{block}.attentions.0." in modules
        for i in range(_count(f"{block}.resnets.", modules)):
            numbers[f"{block}.resnets.{i}."] = f"output_blocks.{count}.0."
            numbers[f"{block}.attentions.{i}."] = f"output_blocks.{count}.1."
            count += 1
        numbers[f"{block}.upsamplers.0."] = f"output_blocks.{count - 1}.{2 if attends else 1}."
    middle = ["mid_block.resnets.0.", "mid_block.attentions.0.", "mid_block.resnets.1."]
    middle = [module for module in middle if module in modules]
    return numbers | {module: f"middle_block.{i}." for i, module in enumerate(middle)}


def _blocks(side: str, modules: Iterable[str]) -> list[str]:
    indices = {int(m[2]) for m in map(_MODULE.match, modules) if m and m[1] == side}
    return [f"{side}.{i}" for i in sorted(indices)]


def _count(prefix: str, modules: Iterable[str]) -> int:
    return sum(module.startswith(prefix) for module in modules)


def vae_places(names: Collection[str]) -> dict[str, Place]:
    """Where LDM's autoencoder keeps the tensors that diffusers' calls ``names``."""
    renamed = {}
    for name in names:
        theirs = name
        for pattern, replacement in VAE:
            theirs = re.sub(pattern, replacement, theirs)
        renamed[name] = theirs
    # LDM counts the decoder's blocks from the largest image, diffusers in the order they run
    last = max((int(m[1]) for m in map(_VAE_UP.search, renamed.values()) if m), default=0)

    def place(name: str) -> Place:
        up = _VAE_UP.search(name)
        name = name if up is None else name.replace(up[0], f".up.{last - int(up[1])}.", 1)
        return Place(name, form="pointwise" if _VAE_ATTENTION.search(name) else "same")

    return {ours: place(theirs) for ours, theirs in renamed.items()}
