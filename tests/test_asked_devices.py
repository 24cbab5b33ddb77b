"""`pytest -m gpu` must not be run on the CPU."""

import pytest
from asked_devices import wants_gpu


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("-m gpu tests/models/test_attention.py", True),
        ("-mgpu", True),
        ("-q -m=gpu", True),
        ("-m|gpu or slow", True),
        ("-m|not gpu", False),
        ("-m|not slow", False),
        ("tests/models/test_gpu.py", False),
        ("", False),
    ],
)
def test_the_gpu_is_asked_for_by_its_marker(arguments, expected):
    assert wants_gpu(["pytest", *(arguments.split("|") if "|" in arguments else arguments.split())]) == expected
