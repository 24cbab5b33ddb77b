"""Multistep latent consistency distillation of latent diffusion models in JAX."""

__version__ = "0.1.0"
