"""What jax asks a CUDA driver for, answered without one: all of jax's other checks and its lowering are its own."""

from types import SimpleNamespace

from jax._src.cudnn import fused_attention_stablehlo

CUDNN_VERSION = 91000


def answer(monkeypatch, capability):
    """cuDNN's version and a GPU's compute capability, "8.0" or "9.0"."""
    versions = SimpleNamespace(cudnn_get_version=lambda: CUDNN_VERSION)
    answers = {
        "cuda_versions": versions,
        "check_compute_capability": lambda needed: float(needed) <= float(capability),
        "is_cuda_compute_capability_equal": lambda asked: asked == capability,
    }
    for name, value in answers.items():
        monkeypatch.setattr(fused_attention_stablehlo, name, value)


def attention_calls(text):
    """(forward, backward) calls of cuDNN's attention in a program for CUDA."""
    backward = text.count("__cudnn$fmhaSoftmaxBackward(")
    return text.count("__cudnn$fmhaSoftmax") - backward, backward
