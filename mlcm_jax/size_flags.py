"""The flags for the size of images."""

from absl import flags

from mlcm_jax.image_size import ImageSize, asked_size

IMAGE_SIZE = flags.DEFINE_integer("image_size", 0, "Height and width in pixels; 0: what the model was trained on.")
HEIGHT = flags.DEFINE_integer("height", 0, "In pixels, with --width, for images that are no squares.")
WIDTH = flags.DEFINE_integer("width", 0, "In pixels, with --height.")


def flagged_size() -> ImageSize | None:
    """Height and width; None where the flags are not given. Raises UserError for flags that contradict one another."""
    return asked_size(IMAGE_SIZE.value, HEIGHT.value, WIDTH.value)
