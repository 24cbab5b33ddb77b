"""What the page of launch/demo.py answers to its inputs, without the library that draws it."""

from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

from mlcm_jax.errors import UserError
from mlcm_jax.sampling.side_by_side import Request, SideBySide

Shown = list[Any]  # image and time of the student, and then of the teacher where there is one


def answers(models: SideBySide, error: Callable[[str], Exception]) -> Callable[..., Iterator[Shown]]:
    """The page's function from its inputs, in their order, to what it shows, once for each image that is made.

    error: makes the exception that the page shows of the sentence of a UserError.
    """

    def answer(*inputs: Any) -> Iterator[Shown]:
        shown: Shown = [None, ""] * (2 if models.teacher else 1)
        try:
            for i, (image, seconds) in enumerate(models(request_of(*inputs))):
                shown[2 * i : 2 * i + 2] = image, f"{seconds:.2f} s"
                yield list(shown)
        except UserError as e:
            raise error(str(e)) from None

    return answer


def request_of(
    prompt: str,
    negative_prompt: str,
    num_steps: float | None,
    seed: float | None,
    height: float | None,
    width: float | None,
    lora: str,
    control_image: Image.Image | None = None,
    control_scale: float = 1.0,
) -> Request:
    """The page's inputs as a request; raises UserError for a number that is missing or not whole."""
    numbers = {"number of steps": num_steps, "seed": seed, "height": height, "width": width}
    for name, number in numbers.items():
        if number is None or number != int(number):
            raise UserError(f"The {name} is {'missing' if number is None else number}: give a whole number.")
    steps, noise, *size = (int(number) for number in numbers.values() if number is not None)
    return Request(
        prompt=prompt,
        image_size=(size[0], size[1]),
        negative_prompt=negative_prompt,
        num_steps=steps,
        seed=noise,
        lora=lora.strip(),
        control_image=control_image,
        control_scale=control_scale,
    )
