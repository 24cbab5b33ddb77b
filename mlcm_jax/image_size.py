"""Height and width of images in pixels, as users give them: one side for a square, or both."""

from mlcm_jax.errors import UserError

ImageSize = tuple[int, int]  # height, width


def asked_size(image_size: int, height: int, width: int) -> ImageSize | None:
    """The size that three settings ask for, each 0 where it is not given; None where none is.

    Raises UserError for a height without a width, the reverse, and a square beside both.
    """
    if image_size < 0 or height < 0 or width < 0:
        raise UserError(f"image_size={image_size}, height={height}, width={width} cannot be: use numbers above 0.")
    if bool(height) != bool(width):
        raise UserError(f"height={height} and width={width}: give both, or image_size for a square.")
    if image_size and height and (height, width) != (image_size, image_size):
        raise UserError(f"image_size={image_size} is a square, and height={height}, width={width}: leave one out.")
    return (image_size, image_size) if image_size else (height, width) if height else None


def named(size: ImageSize) -> str:
    """The size by its settings."""
    height, width = size
    return f"image_size={height}" if height == width else f"height={height}, width={width}"


def both(size: int | ImageSize) -> ImageSize:
    """Height and width of a square's side, or of both."""
    return (size, size) if isinstance(size, int) else size
