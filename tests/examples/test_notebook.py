"""examples/quickstart.ipynb: it runs from top to bottom, and its stored run shows nothing of a machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_it_runs(tmp_path):
    """Its code cells in one process, in the folder where Jupyter starts them; only runs/ is elsewhere."""
    code = "\n".join("".join(cell["source"]) for cell in CODE).replace('"runs/', f'"{tmp_path}/')
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=NOTEBOOK.parent, env=env, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "largest difference of a pixel: 0." in result.stdout
    assert (tmp_path / "quickstart" / "export" / "model_index.json").is_file()


def test_the_stored_run_is_whole():
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert not [output for output in outputs if output["output_type"] == "error"]
    images = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) == 3 and NOTEBOOK.stat().st_size < 300_000
    text = json.dumps([{**output, "data": None} for output in outputs])
    assert "largest difference of a pixel" in text
    assert not re.search(r"(?<![\w.])/(?!/)\w+/", text), "a path of the machine that it ran on"
