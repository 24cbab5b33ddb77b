"""Make the edges that a canny ControlNet follows: launch/canny.py --image=photo.jpg --out=edges.png

    python launch/sample.py --controlnet=DIR --control_image=edges.png ...

Needs `pip install mlcm_jax[canny]`.
"""

import numpy as np
from absl import flags

from mlcm_jax.cli import run_main
from mlcm_jax.errors import UserError
from mlcm_jax.images import open_image, write_image
from mlcm_jax.outputs import check_image_file
from mlcm_jax.sampling.canny import HIGH, LOW, canny_edges

IMAGE = flags.DEFINE_string("image", None, "The image.", required=True)
THRESHOLD_LOW = flags.DEFINE_float("low", LOW, "Gradient at which an edge ends, for 8-bit images.", lower_bound=0.0)
THRESHOLD_HIGH = flags.DEFINE_float("high", HIGH, "Gradient at which an edge begins.", lower_bound=0.0)
OUT = flags.DEFINE_string("out", None, "The image of edges, white on black, of the same size.", required=True)


def main():
    check_image_file("out", OUT.value)
    low, high = THRESHOLD_LOW.value, THRESHOLD_HIGH.value
    if low > high:
        raise UserError(f"--low={low} is above --high={high}: an edge ends at a smaller gradient than it begins.")
    write_image(np.asarray(canny_edges(open_image(IMAGE.value), low, high)), OUT.value)


if __name__ == "__main__":
    run_main(main)
