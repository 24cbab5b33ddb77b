"""What each emoji is called, and which names are held out of training."""

import hashlib
import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import emoji

from .sources import code_points_key

SKIN_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}
FLAG_PREFIX = "flag of "
FLAGS_OF_PLACES = frozenset({"country-flag", "subdivision-flag"})
HELDOUT_PERCENT = 10

# The captions of the sample grids; their names never go to the held-out split.
GRID_CAPTIONS = (
    "red heart, noto style",
    "grinning face, twemoji style",
    "pizza, fluent style",
    "cat face, noto style",
    "rainbow, twemoji style",
    "fire, fluent style",
    "rocket, noto style",
    "red apple, twemoji style",
    "smiling face with sunglasses, fluent style",
    "sunflower, noto style",
    "thumbs up, twemoji style",
    "soccer ball, fluent style",
    "octopus, noto style",
    "christmas tree, twemoji style",
    "flag of japan, noto style",
    "ghost, fluent style",
)
ALWAYS_TRAIN = frozenset(caption.rsplit(", ", 1)[0] for caption in GRID_CAPTIONS)

_ASCII = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": None, "\u201d": None, "&": "and", "_": " ", ".": None})


@dataclass(frozen=True)
class Emoji:
    """One sequence of code points; `skin_tone` is "" for the plain form."""

    key: str
    name: str
    skin_tone: str
    category: str
    from_fallback: bool

    def caption(self, style: str) -> str:
        """The text a model is given for this emoji, e.g. "waving hand, light skin tone, noto style"."""
        return ", ".join(part for part in (self.name, self.skin_tone, f"{style} style") if part)


def read_emojis(path: Path) -> list[Emoji]:
    """Every emoji of an emoji.json, plain forms and skin tones, each with its natural English name."""
    return [one for entry in json.loads(path.read_text()) for one in _forms(entry)]


def _forms(entry: dict) -> list[Emoji]:
    name, from_fallback = _natural_name(entry)

    def form(unified: str, skin_tone: str) -> Emoji:
        return Emoji(code_points_key(unified), name, skin_tone, entry["category"], from_fallback)

    tones = entry.get("skin_variations", {}).items()
    return [form(entry["unified"], ""), *(form(tone["unified"], _skin_tone(code)) for code, tone in tones)]


def _skin_tone(codes: str) -> str:
    """Words for "1F3FB" or, where two people differ, "1F3FB-1F3FF"; two equal tones are said once."""
    return " and ".join(dict.fromkeys(SKIN_TONES[code] for code in codes.split("-")))


def _natural_name(entry: dict) -> tuple[str, bool]:
    """Name after Unicode's CLDR as the `emoji` package has it, else the official one; and whether it is the latter."""
    text = "".join(chr(int(code, 16)) for code in entry["unified"].split("-"))
    known = emoji.EMOJI_DATA.get(text)
    name = known["en"].strip(":") if known else entry["name"].removesuffix(" Flag")
    name = plain(name)
    return (FLAG_PREFIX + name if entry["subcategory"] in FLAGS_OF_PLACES else name), known is None


def plain(name: str) -> str:
    """Lower case, single spaces, accents dropped: "São_Tomé_&_Príncipe" becomes "sao tome and principe"."""
    decomposed = unicodedata.normalize("NFKD", name.translate(_ASCII))
    return " ".join("".join(c for c in decomposed if not unicodedata.combining(c)).lower().split())


def is_held_out(name: str) -> bool:
    """Whether a base name belongs to the held-out split: a fixed tenth of all names, by their hash."""
    if name in ALWAYS_TRAIN:
        return False
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100 < HELDOUT_PERCENT
