"""Where compiled programs are kept from run to run: jax's persistent compilation cache, on by default."""

import os
from pathlib import Path

import jax

OFF = "off"
# Seconds of compiling from which on a program is worth a file: a GPU's small ones add up to much of a start.
MIN_COMPILE_SECONDS = 0.05


def default_folder() -> Path:
    """mlcm_jax/xla below the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlcm_jax" / "xla"


def use_compilation_cache(place: str = "") -> str | None:
    """Keep compiled programs in the folder ``place``; "off": nowhere; "": in JAX_COMPILATION_CACHE_DIR where it is set,
    else in ``default_folder()``. Call it before the first compilation. Returns the folder, None for "off".

    jax's other JAX_PERSISTENT_CACHE_* variables are left as they are.
    """
    if place == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    folder = place or os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(default_folder())
    jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    return folder
