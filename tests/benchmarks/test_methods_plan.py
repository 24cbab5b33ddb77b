"""benchmarks/methods_plan.py: the table of all methods' work, on a tiny model in the place of SDXL."""

import sys
from pathlib import Path

import pytest
from absl.testing import flagsaver

from configs import sdxl

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import methods_plan


def test_the_table_is_written_between_its_markers(sdxl_folder, tmp_path, monkeypatch):
    def tiny(name):
        config = sdxl.get_config(name)
        config.teacher = config.architecture = str(sdxl_folder)
        return config

    page = tmp_path / "methods.md"
    page.write_text("before\n<!-- begin: sdxl plan -->\nold\n<!-- end: sdxl plan -->\nafter\n")
    monkeypatch.setattr(methods_plan, "get_config", tiny)
    monkeypatch.setattr(methods_plan, "PLANNED", ["tract"])
    monkeypatch.setattr(methods_plan, "PAGE", page)
    with flagsaver.as_parsed(docs="true"):
        methods_plan.main()
    before, _, heads, _, tract, _, after = page.read_text().splitlines()
    assert (before, after) == ("before", "after")
    row = dict(zip(_cells(heads), _cells(tract), strict=True))
    assert (row["method"], row["steps"], row["batch"]) == ("tract", "12000", "16")
    # The teacher is guided up to 0.4 of the run; the former student, which then takes its place, is not.
    unguided, guided = map(float, row["TFLOP an example"].split(" to "))
    expected = (0.4 * guided + 0.6 * unguided) * 16 * 12000 / 1e6
    assert unguided < guided and float(row["EFLOP in all"]) == pytest.approx(expected, rel=0.01)


def _cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]
