"""The judges that give each picture one number, by name."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from mlcm_jax.errors import UserError
from mlcm_jax.rewards.aesthetic import load_aesthetic
from mlcm_jax.rewards.clip_features import image_features, load_scorer_once
from mlcm_jax.rewards.clip_score import clip_scores, load_scorer_tokenizer, text_features
from mlcm_jax.rewards.hps_v2 import load_hps_v2
from mlcm_jax.rewards.image_reward import load_image_reward
from mlcm_jax.rewards.mps import load_mps
from mlcm_jax.rewards.nearest_reference import load_nearest_reference
from mlcm_jax.rewards.pick_score import load_pick_score, load_similarity
from mlcm_jax.rewards.reward_model import Judge

Score = Callable[[UInt8[np.ndarray, "n H W 3"], Sequence[str]], Float[np.ndarray, " n"]]


def load_clip_score(folder: str | Path) -> Score:
    """The cosine similarity of picture and prompt in a transformers CLIPModel folder with its tokenizer.

    Raises UserError for an unsupported setting, unfit weights, and a missing tokenizer or preprocessor_config.json.
    """
    scorer, tokenizer = load_scorer_once(folder), load_scorer_tokenizer(folder)

    def score(images: UInt8[np.ndarray, "n H W 3"], prompts: Sequence[str]) -> Float[np.ndarray, " n"]:
        return clip_scores(image_features(scorer, images), text_features(scorer, tokenizer, prompts))

    return score


# name: what reads its folder, with a ``dtype`` to compute in. More is better for each of them.
JUDGES: dict[str, Callable[..., Judge]] = {
    "aesthetic": load_aesthetic,
    "clip": load_similarity,
    "efficientnet": load_nearest_reference,
    "hps_v2": load_hps_v2,
    "image_reward": load_image_reward,
    "mps": load_mps,
    "pick_score": load_pick_score,
}
# The same for finished pictures; CLIP's features are then shared with other figures.
SCORERS: dict[str, Callable[[str], Score]] = {**JUDGES, "clip": load_clip_score}


def parse_places(flag: str, entries: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """["clip=DIR", "clip-large=DIR2", ...] as {"clip": "DIR", "clip-large": "DIR2", ...}: see ``kind_of``.

    Raises UserError, which names ``flag``, for an entry of another form, an unknown name and a name that comes twice.
    """
    places = {}
    for entry in entries:
        name, _, place = entry.partition("=")
        if not place or kind_of(name) not in known or name in places:
            raise UserError(
                f"--{flag} has the entry {entry!r}: write NAME=PLACE, each name once, of {', '.join(sorted(known))} "
                "(or, for a second one of a kind, NAME-LABEL=PLACE)."
            )
        places[name] = place
    return places


def kind_of(name: str) -> str:
    """What reads the folder of a judge: "clip" for "clip" and for "clip-large", the name of a second one."""
    return name.partition("-")[0]
