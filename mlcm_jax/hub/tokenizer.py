"""Tokenizers of a diffusers folder."""

from importlib import import_module
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import VERY_LARGE_INTEGER  # of a tokenizer that names no length

from mlcm_jax.errors import UserError, shortened
from mlcm_jax.json_config import is_size

# Imported by name: pyright would read 2,600 files for the type of this module, longer than all of ours together.
transformers = import_module("transformers")

# tokenizer class that is read as itself: the files one of which groups it needs; others are transformers' to find
TOKENIZER_FILES = {
    "CLIPTokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "BertTokenizer": (("tokenizer.json",), ("vocab.txt",)),
    "AutoTokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
}


def load_tokenizer(folder: Path, class_name: str) -> Any:
    """Read a tokenizer with transformers; raises UserError when the folder holds none, or one that cannot be used."""
    loader = next((name for name in TOKENIZER_FILES if class_name.startswith(name)), "AutoTokenizer")
    # transformers makes an empty vocabulary of a folder without these files
    groups = TOKENIZER_FILES[loader]
    if not any(all((folder / f).is_file() for f in group) for group in groups):
        needed = " or ".join(" with ".join(group) for group in groups)
        raise UserError(f"{folder} holds no tokenizer: it needs {needed}.")
    try:
        tokenizer = getattr(transformers, loader).from_pretrained(folder, local_files_only=True)
        length = len(tokenizer("a cat", padding="max_length", truncation=True)["input_ids"])
    except Exception as e:  # what transformers and tokenizers raise depends on what is wrong with which file
        raise UserError(f"{folder} holds no readable {class_name} ({shortened(e)}).") from None
    if not is_size(length) or tokenizer.model_max_length not in (length, VERY_LARGE_INTEGER):
        raise UserError(f"{folder} does not pad texts: set model_max_length in its tokenizer_config.json, such as 77.")
    return tokenizer
