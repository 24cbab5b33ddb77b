"""The caption files: what is distilled on, what is evaluated on, and what the sample grids show."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from mlcm_jax.errors import UserError

from .dataset import EmojiSplit
from .names import GRID_CAPTIONS

EVAL_CAPTIONS = 640
EVAL_SEED = 0


def plain_captions(split: EmojiSplit) -> list[str]:
    """The captions without a skin tone, sorted."""
    rows = zip(split["caption"], split["skin_tone"], strict=True)
    return sorted(caption for caption, skin_tone in rows if not skin_tone)


def rows_of(split: EmojiSplit, captions: Sequence[str]) -> list[int]:
    """Where the split has the images of these captions.

    Raises:
        UserError: it has none of one of them.
    """
    places = {caption: i for i, caption in enumerate(split["caption"])}
    if absent := [caption for caption in captions if caption not in places]:
        raise UserError(f"This split has no image of {absent[0]!r}: choose the other --split or other --prompts.")
    return [places[caption] for caption in captions]


def write_prompts(train: EmojiSplit, folder: Path) -> None:
    """Write train.txt, eval.txt and grid.txt, one caption a line.

    Raises:
        UserError: a caption of the sample grid is not among the training captions.
    """
    captions = plain_captions(train)
    absent = sorted(set(GRID_CAPTIONS) - set(captions))
    if absent:
        raise UserError(f"The training captions lack {absent[0]!r}: choose another caption for the sample grid.")
    write_lines(folder / "train.txt", captions)
    write_lines(folder / "eval.txt", random.Random(EVAL_SEED).sample(captions, min(EVAL_CAPTIONS, len(captions))))
    write_lines(folder / "grid.txt", GRID_CAPTIONS)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file of one entry a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
