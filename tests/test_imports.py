"""Imports point one way: each package of mlcm_jax imports only what stands before it here."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A name is a package or a module of mlcm_jax. Those of one line stand beside each other and do not import one another.
ORDER = (
    ("errors",),
    ("outputs",),
    ("config", "compilation_cache", "image_size", "images", "plots", "types"),
    ("cli", "json_config", "rng", "rules", "parallel", "size_flags"),
    ("diffusion", "models"),
    ("hub",),
    ("model_flags", "data", "sampling"),
    ("rewards",),
    ("distillation", "evaluation"),
    ("training",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
FILES = sorted((ROOT / "mlcm_jax").rglob("*.py"))


def imported(file: Path) -> set[str]:
    """The packages and modules of mlcm_jax that a file imports, by their first name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("mlcm_jax.")}


def owner(file: Path) -> str:
    first, *_ = file.relative_to(ROOT / "mlcm_jax").parts
    return first.removesuffix(".py")


@pytest.mark.parametrize("name", sorted({owner(file) for file in FILES} - {"__init__"}))
def test_a_package_imports_only_what_stands_before_it(name):
    assert name in RANK, "a new package has a place in ORDER"
    for file in FILES:
        if owner(file) == name:
            above = {other for other in imported(file) - {name} if RANK[other] >= RANK[name]}
            assert not above, f"{file.relative_to(ROOT)} imports {', '.join(above)}"


def test_the_configuration_imports_nothing_of_the_package_but_errors():
    assert imported(ROOT / "mlcm_jax" / "config.py") <= {"errors"}


def test_no_program_is_imported():
    for file in FILES:
        source = file.read_text()
        assert "import launch" not in source and "from launch" not in source, file


def test_nothing_imports_another_framework():
    # tensorboardX, of training, imports torch where that is installed
    files = [file for file in FILES if owner(file) != "training"]
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    modules = [name.removesuffix(".__init__") for name in modules]
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
    code += "print([name for name in ('torch', 'tensorflow', 'diffusers') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout == "[]\n", result.stderr[-2000:]
    for file in (*FILES, *(ROOT / "launch").glob("*.py")):
        if file.name != "convert_efficientnet.py":  # reads a .pth file
            assert not {"torch", "tensorflow", "diffusers"} & top_level(file), file


def top_level(file: Path) -> set[str]:
    """The packages that a file imports, also within functions."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[0] for name in names}
