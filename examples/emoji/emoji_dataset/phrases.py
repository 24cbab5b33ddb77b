"""Pairs of English and Chinese phrases that names have in common, and new names put together from them.

Other names show what the parts of a name's Chinese mean: "flag of japan" is 日本国旗 and "flag of peru" 秘鲁国旗, so
"flag of" is 国旗 and "japan" 日本. All of it is counted in the names that are given, those of the training split.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

MAX_WORDS, MAX_CHARACTERS = 4, 8  # of a phrase that is counted
MIN_NAMES, MIN_DICE = 2, 0.6  # that have both sides of it; twice these, as a part of those that have either
# How phrases a, b are joined, in English and in Chinese. Most names put what describes a thing before it in both.
JOINED = (("{a} {b}", "{a}{b}"),) * 4 + (
    ("{a} {b}", "{a}的{b}"),
    ("{a} with {b}", "有{b}的{a}"),
    ("{a} and {b}", "{a}和{b}"),
)
NO_ENDS = frozenset(["a", "an", "and", "at", "for", "in", "of", "on", "the", "to", "with"])  # of an English phrase
SWAPPED, ALONE = 0.5, 0.15  # parts of the new names that are old ones with another phrase, or one phrase
Pair = tuple[str, str]


class NewNames:
    """Makes up names, English and Chinese, from what the given ones are made of.

    names: English to Chinese. never: names in either language that are not made, and are no phrase either.
    """

    def __init__(self, names: Mapping[str, str], never: Collection[str] = ()):
        self._never = set(never)
        self.pairs = [pair for pair in phrase_pairs(names) if not self._never & set(pair)]
        self._frames = [
            (pair, frame)
            for pair in names.items()
            for frame in map(_frame_maker(*pair), self.pairs)
            if frame is not None
        ]

    def __call__(self, rng: np.random.Generator) -> Pair:
        """A name with one phrase replaced by another, a phrase alone, or two phrases joined."""
        while True:
            name = self._draw(rng)
            if not self._never & set(name):
                return name

    def _draw(self, rng: np.random.Generator) -> Pair:
        first, second = (self.pairs[i] for i in rng.integers(len(self.pairs), size=2))
        kind = rng.random()
        if kind < SWAPPED:
            _, (english, chinese) = self._frames[rng.integers(len(self._frames))]
            return english.format(first[0]), chinese.format(first[1])
        if kind < SWAPPED + ALONE:
            return first
        english, chinese = JOINED[rng.integers(len(JOINED))]
        return english.format(a=first[0], b=second[0]), chinese.format(a=first[1], b=second[1])


def _frame_maker(english: str, chinese: str) -> Callable[[Pair], Pair | None]:
    """A function of a pair of phrases: the name with a gap where both of them are, None where it is without."""

    def frame(pair: Pair) -> Pair | None:
        phrase, part = pair
        padded = f" {english} "
        if phrase == english or f" {phrase} " not in padded or part not in chinese:
            return None
        return padded.replace(f" {phrase} ", " {} ", 1).strip(), chinese.replace(part, "{}", 1)

    return frame


def phrase_pairs(names: Mapping[str, str]) -> list[Pair]:
    """English and Chinese of whole names, of phrases that go together in several, and of what these leave of a name."""
    common = _common_phrases(names)
    pairs = dict.fromkeys(common)
    for english, chinese in names.items():
        pairs |= dict.fromkeys(_rests(english, chinese, common))
    return [*names.items(), *(pair for pair in pairs if not {pair[0].split()[0], pair[0].split()[-1]} & NO_ENDS)]


def _common_phrases(names: Mapping[str, str]) -> list[Pair]:
    """Pairs of phrases, each of which is the one that is most often in the same names as the other.

    Of phrases that are in the same names, the longest counts: it holds the others.
    """
    having: Counter[Pair] = Counter()
    together: Counter[Pair] = Counter()
    for english, chinese in names.items():
        phrases, parts = set(_word_groups(english)), set(_substrings(chinese))
        having.update(("en", phrase) for phrase in phrases)
        having.update(("zh", part) for part in parts)
        together.update(itertools.product(phrases, parts))
    best: dict[Pair, tuple] = {}
    for (phrase, part), both in together.items():
        dice = 2 * both / (having["en", phrase] + having["zh", part])
        rank = dice, len(phrase.split()), len(part), phrase, part
        if both >= MIN_NAMES and dice >= MIN_DICE:
            for side in (("en", phrase), ("zh", part)):
                best[side] = max(rank, best.get(side, ()))
    return sorted(rank[-2:] for (side, _), rank in best.items() if side == "en" and best["zh", rank[-1]] == rank)


def _word_groups(english: str) -> Iterator[str]:
    words = english.split()
    for i in range(len(words)):
        for j in range(i + 1, min(i + MAX_WORDS, len(words)) + 1):
            yield " ".join(words[i:j])


def _substrings(chinese: str) -> Iterator[str]:
    for i in range(len(chinese)):
        for j in range(i + 1, min(i + MAX_CHARACTERS, len(chinese)) + 1):
            if " " not in chinese[i:j]:
                yield chinese[i:j]


def _rests(english: str, chinese: str, common: Collection[Pair]) -> Iterator[Pair]:
    """What is left of a name without a common phrase at one end of it, in both languages."""
    for phrase, part in common:
        for rest in _without_end(english, phrase, " "):
            yield from ((rest, other) for other in _without_end(chinese, part, ""))


def _without_end(text: str, end: str, space: str) -> Iterator[str]:
    if text.startswith(end + space) and text != end:
        yield text.removeprefix(end + space).strip()
    if text.endswith(space + end) and text != end:
        yield text.removesuffix(space + end).strip()
