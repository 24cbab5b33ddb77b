"""Where compiled programs are kept."""

import jax
import pytest

from mlcm_jax.compilation_cache import MIN_COMPILE_SECONDS, default_folder, use_compilation_cache

SETTINGS = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_it_is_below_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert use_compilation_cache() == str(tmp_path / "mlcm_jax" / "xla") == str(default_folder())
    assert jax.config.jax_compilation_cache_dir == str(default_folder())
    assert jax.config.jax_persistent_cache_min_compile_time_secs == MIN_COMPILE_SECONDS


def test_the_flag_comes_before_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    assert use_compilation_cache() == "/elsewhere"
    assert use_compilation_cache(str(tmp_path)) == jax.config.jax_compilation_cache_dir == str(tmp_path)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == seconds


def test_off(monkeypatch):
    assert use_compilation_cache("off") is None
    assert not jax.config.jax_enable_compilation_cache
