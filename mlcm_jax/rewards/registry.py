"""The reward models by name, and how flags and settings name one with the folder of its weights."""

from collections.abc import Collection, Sequence

from mlcm_jax.errors import UserError
from mlcm_jax.rewards.aesthetic import AESTHETIC
from mlcm_jax.rewards.clip_score import CLIP
from mlcm_jax.rewards.hps_v2 import HPS_V2
from mlcm_jax.rewards.image_reward import IMAGE_REWARD
from mlcm_jax.rewards.mps import MPS_SCORE
from mlcm_jax.rewards.nearest_reference import NEAREST_REFERENCE
from mlcm_jax.rewards.pick_score import PICK_SCORE

REWARD_MODELS = {
    spec.name: spec for spec in (AESTHETIC, CLIP, NEAREST_REFERENCE, HPS_V2, IMAGE_REWARD, MPS_SCORE, PICK_SCORE)
}


def parse_places(flag: str, entries: Sequence[str], known: Collection[str]) -> dict[str, str]:
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
    """The registry's name of what a flag names: "clip" for "clip" and for "clip-large", a second one of its kind."""
    return name.partition("-")[0]
