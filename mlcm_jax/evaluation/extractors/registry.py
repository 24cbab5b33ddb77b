"""The feature extractors by name."""

from mlcm_jax.evaluation.extractors.base import FeatureExtractor
from mlcm_jax.evaluation.extractors.clip import CLIP
from mlcm_jax.evaluation.extractors.efficientnet import EFFICIENTNET
from mlcm_jax.evaluation.extractors.inception import INCEPTION
from mlcm_jax.rewards.registry import kind_of

FEATURE_EXTRACTORS = {spec.name: spec for spec in (CLIP, EFFICIENTNET, INCEPTION)}


def load_extractor(name: str, place: str) -> FeatureExtractor:
    """name: of the registry, or NAME-LABEL. Raises UserError as the network's loader does."""
    spec = FEATURE_EXTRACTORS[kind_of(name)]
    return FeatureExtractor(spec, place, spec.load(place))
