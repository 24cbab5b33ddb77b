"""CLIP weights in open_clip's layout (OpenAI's own, too), read as if transformers had written them."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from mlcm_jax.hub.load import TensorReader

# open_clip's spelling -> transformers', applied in turn to each name; what no rule knows keeps its name
RULES = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
TRANSPOSED = ("visual.proj", "text_projection")  # plain matrices there, linear layers' weights here
_FUSED = re.compile(r"in_proj_(weight|bias)$")  # query, key and value below one another


class OpenClipReader(TensorReader):
    """Has the names, shapes and tensors of transformers' CLIPModel; raises UserError as TensorReader does."""

    def __init__(self, source: Path):
        super().__init__(source)
        self._sources: dict[str, tuple[str, int | None]] = {}  # our name: (the file's, which third)
        for name in super().names():
            ours = name
            for pattern, replacement in RULES:
                ours = re.sub(pattern, replacement, ours)
            if _FUSED.search(ours):
                thirds = (_FUSED.sub(rf"{letter}_proj.\1", ours) for letter in "qkv")
                self._sources |= {third: (name, i) for i, third in enumerate(thirds)}
            else:
                self._sources[ours] = (name, None)

    def names(self) -> list[str]:
        return list(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        source, third = self._sources[name]
        shape = super().shape(source)
        if third is not None:
            return (shape[0] // 3, *shape[1:])
        return shape[::-1] if source in TRANSPOSED else shape

    def dtype(self, name: str) -> Any:
        return super().dtype(self._sources[name][0])

    def read(self, name: str) -> np.ndarray:
        source, third = self._sources[name]
        tensor = super().read(source)
        if third is not None:
            return np.split(tensor, 3)[third]
        return tensor.T if source in TRANSPOSED else tensor
