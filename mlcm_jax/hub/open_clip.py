"""CLIP weights in open_clip's layout (OpenAI's own, too), where transformers' are expected."""

import re
from collections.abc import Collection

from mlcm_jax.hub.layout import Layout, Place

# transformers' spelling -> open_clip's, applied in turn to each name; what no rule knows keeps its name
RULES = (
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.self_attn\.[qkv]_proj\.", ".attn.in_proj_"),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
TRANSPOSED = ("visual.proj", "text_projection")  # plain matrices there, linear layers' weights here
_THIRD = re.compile(r"\.self_attn\.([qkv])_proj\.")  # query, key and value are one tensor there


def places(names: Collection[str]) -> dict[str, Place]:
    """Where open_clip keeps the tensors that transformers' CLIPModel or one of its towers calls ``names``."""
    return {name: _place(name) for name in names}


def _place(name: str) -> Place:
    theirs = name
    for pattern, replacement in RULES:
        theirs = re.sub(pattern, replacement, theirs)
    part = _THIRD.search(name)
    third = "qkv".index(part[1]) if part else None
    return Place(theirs, third, "transposed" if theirs in TRANSPOSED else "same")


OPEN_CLIP = Layout(places)
