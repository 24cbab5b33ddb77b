"""Chinese captions, such as "红心, noto 风格", and their tokenizer.

The names are Unicode's Chinese ones as the `emoji` package has them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import emoji
from tokenizers import pre_tokenizers

from mlcm_jax.data.prompts import read_prompts
from mlcm_jax.errors import UserError

from .dataset import EmojiSplit
from .names import FLAG_PREFIX, plain
from .prompts import write_lines
from .sources import STYLES
from .tokenizer import MODEL_MAX_LENGTH, WORD_END, write_tokenizer

SKIN_TONES = {
    "light skin tone": "浅肤色",
    "medium-light skin tone": "中浅肤色",
    "medium skin tone": "中等肤色",
    "medium-dark skin tone": "中深肤色",
    "dark skin tone": "深肤色",
}
# What people type instead of "红心, noto 风格": the full-width comma, and no spaces.
FULL_WIDTH_COMMA = "\uff0c"
SPELLINGS = ((", ", " "), (FULL_WIDTH_COMMA, " "), (FULL_WIDTH_COMMA, ""), (", ", ""))
_FIRST_IDEOGRAPH, _LAST_IDEOGRAPH = "\u4e00", "\u9fff"


def chinese_names() -> dict[str, str]:
    """Natural English name, as `names.Emoji` has it, to Chinese name."""
    emoji.config.load_language("zh")
    names = {}
    for text, entry in emoji.EMOJI_DATA.items():
        if "zh" in entry:
            place = "\U0001f1e6" <= text[0] <= "\U0001f1ff" or text[-1] == "\U000e007f"
            english, chinese = plain(entry["en"].strip(":")), entry["zh"].strip(":").replace("_", " ")
            names[FLAG_PREFIX + english if place else english] = f"{chinese}国旗" if place else chinese
    return names


def chinese_caption(names: Mapping[str, str], name: str, skin_tone: str, style: str, spelling: int = 0) -> str:
    """The Chinese of the caption of an emoji, e.g. "挥手, 浅肤色, noto 风格"; `spelling` is a row of `SPELLINGS`.

    Raises UserError when `name` has no Chinese one.
    """
    if name not in names:
        raise UserError(f"{name!r} has no Chinese name in the emoji package: install emoji 2.16 or newer.")
    return spelt_caption(names[name], skin_tone, style, spelling)


def spelt_caption(name: str, skin_tone: str, style: str, spelling: int = 0) -> str:
    """The same of a Chinese name."""
    comma, space = SPELLINGS[spelling]
    tones = "和".join(SKIN_TONES[tone] for tone in skin_tone.split(" and ") if tone)
    return comma.join(part for part in (name, tones, f"{style}{space}风格") if part)


def chinese_captions(split: EmojiSplit, spelling: int = 0) -> list[str]:
    """The Chinese of every caption of a split, row by row."""
    names = chinese_names()
    rows = zip(split["name"], split["skin_tone"], split["style"], strict=True)
    return [chinese_caption(names, *row, spelling) for row in rows]


def write_chinese_prompts(train: EmojiSplit, folder: Path, files: Sequence[str] = ("train", "eval", "grid")) -> None:
    """Write folder/chinese/NAME.txt beside each folder/NAME.txt, line by line the same captions in Chinese."""
    chinese = dict(zip(train["caption"], chinese_captions(train), strict=True))
    for name in files:
        english = read_prompts(folder / f"{name}.txt")
        write_lines(folder / "chinese" / f"{name}.txt", [chinese[caption] for caption in english])


def train_chinese_tokenizer(captions: Iterable[str], folder: Path) -> None:
    """Write a tokenizer that makes one token of every Chinese character in `captions` and of every style's name.

    It is a byte-level BPE in CLIP's layout. Its merges are not learned: they join the bytes of each character and
    stop there, so that new names are spelt with known characters. Other characters come as their bytes.
    """
    characters = _ideographs(captions)
    merges = dict.fromkeys(pair for text in (*characters, *STYLES, FULL_WIDTH_COMMA) for pair in _joining_merges(text))
    write_tokenizer(list(merges), folder)


def write_bert_tokenizer(captions: Iterable[str], folder: Path) -> int:
    """Write a BertTokenizer of the styles' names, ASCII, the comma and every Chinese character in `captions`.

    Returns the id of the first of these characters, which come last. Other characters become [UNK].
    """
    letters = [c for c in map(chr, range(33, 127)) if not c.isupper()]
    words = [*STYLES, *letters, *(f"##{c}" for c in letters if c.isalnum()), FULL_WIDTH_COMMA]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    write_lines(folder / "vocab.txt", [*special, *words, *_ideographs(captions)])
    config = {"tokenizer_class": "BertTokenizer", "model_max_length": MODEL_MAX_LENGTH, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return len(special) + len(words)


def _ideographs(captions: Iterable[str]) -> list[str]:
    return sorted({c for caption in captions for c in caption if _FIRST_IDEOGRAPH <= c <= _LAST_IDEOGRAPH})


def _joining_merges(text: str) -> Iterator[tuple[str, str]]:
    """The merges that make one token of a text, within a word and at its end."""
    ((symbols, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    for i in range(1, len(symbols)):
        yield symbols[:i], symbols[i]
    yield symbols[:-1], symbols[-1] + WORD_END


def end_forms(vocab: Mapping[str, int]) -> dict[int, int]:
    """Id of a token at a word's end to that of the same text within a word."""
    return {index: vocab[token.removesuffix(WORD_END)] for token, index in vocab.items() if token.endswith(WORD_END)}
