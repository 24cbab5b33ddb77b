"""A small CLIP tokenizer: the byte-level BPE of CLIP's text encoders, trained on the captions.

The folder holds the files of CLIP's own tokenizer (vocab.json, merges.txt, tokenizer_config.json,
special_tokens_map.json), so that CLIPTokenizer and the pipelines built on it read it unchanged.
"""

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

VOCAB_SIZE = 2048
MODEL_MAX_LENGTH = 24
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# Words as CLIP cuts them: English contractions, runs of letters, single digits, runs of anything else.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def train_tokenizer(captions: Iterable[str], folder: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Learn merges on `captions` and write the tokenizer's files to `folder`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    write_tokenizer(_learn_merges(captions, alphabet, vocab_size - 2 * len(alphabet) - 2), folder)


def write_tokenizer(merges: Sequence[tuple[str, str]], folder: Path) -> None:
    """Write the files of a tokenizer with these merges, the first with the highest priority.

    The ids are laid out as in CLIP: the 256 bytes, the 256 bytes at a word's end, the merges, start, end. The end
    token thus has the highest id, which older text encoders rely on when they look for it by argmax.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_and_ends = [*alphabet, *(byte + WORD_END for byte in alphabet)]
    tokens = [*bytes_and_ends, *("".join(pair) for pair in merges), START, END]

    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MODEL_MAX_LENGTH, "do_lower_case": True}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", {**config, "add_prefix_space": False, "errors": "replace", **special})


def _learn_merges(captions: Iterable[str], alphabet: list[str], count: int) -> list[tuple[str, str]]:
    """The first `count` merges, or fewer where the captions hold no more."""
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=WORD_END))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    # Ties between merges fall by id. As special tokens the bytes at a word's end have fixed ids; left to the trainer
    # they take the order of a hash map, and two runs learn two tokenizers.
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + count,
        special_tokens=[byte + WORD_END for byte in alphabet],
        initial_alphabet=alphabet,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.model.save(folder)
        lines = Path(folder, "merges.txt").read_text(encoding="utf-8").split("\n")
    pairs = (line.split(" ") for line in lines if line and not line.startswith("#version"))
    return [(left, right) for left, right in pairs]


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def longest(captions: Iterable[str], folder: Path) -> int:
    """Tokens of the longest caption, start and end included."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return max(len(tokenizer(caption).input_ids) for caption in captions)
