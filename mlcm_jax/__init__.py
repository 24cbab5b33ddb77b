"""Multistep latent consistency distillation of latent diffusion models in JAX."""

import os

# Tokenizers are all that is taken from transformers, which else regrets at each start that there is no PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
