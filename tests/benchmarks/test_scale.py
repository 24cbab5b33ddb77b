"""benchmarks/scale.py: it goes on where it stopped, and tells what does not fit."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl import flags

from mlcm_jax.training import compile_steps

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import scale

FIGURES = {"arguments_gb": 2.26, "temporaries_gb": 1.5, "used_gb": 3.78, "compile_cpu_seconds": 150}
FITS_UP_TO = 4  # images a chip
TOO_LARGE = compile_steps._too_large("stage 1 on v5e:4x4", "20.1 GB", "16 GB")


@pytest.fixture
def compiled(monkeypatch):
    """A stand-in for launch/compile.py; returns the commands that it was given."""
    commands = []

    def run(command, **_):
        commands.append(command)
        given = dict(word[2:].partition("=")[::2] for word in command if word.startswith("--"))
        if int(given["config.batch_size"]) > FITS_UP_TO * scale.CHIPS[given["topology"]]:
            return SimpleNamespace(returncode=2, stderr=f"a warning\nerror: {TOO_LARGE}\n")
        Path(given["out"]).write_text(json.dumps(FIGURES | {"collectives_gb": {"all-gather": 20.0, "all-reduce": 0.5}}))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(scale.subprocess, "run", run)
    flags.FLAGS.mark_as_parsed()  # not parsed: other programs' flags are here, too, some of them required
    return commands


def test_rows_are_written_once_and_doubled_until_they_do_not_fit(compiled, tmp_path, monkeypatch, capsys):
    out = tmp_path / "scale.jsonl"
    for name, value in {"table": str(out), "rows": "v5e:4x4, full, trajectories", "largest": True}.items():
        monkeypatch.setattr(flags.FLAGS[name], "value", value)
    scale.main([])
    assert [row["per_chip"] for row in scale.read_rows(out).values()] == [1, 2, 4, 8]
    assert "--memory_only" in compiled[0] and "--stage=1" in compiled[0]
    scale.main([])
    assert len(compiled) == 4, "what is there is not compiled again"
    capsys.readouterr()
    monkeypatch.setattr(flags.FLAGS["markdown"], "value", True)
    scale.main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| v5e:4x4 | full | trajectories | 1 | 2.26 | 1.50 | 3.78 | 20.5 | 2.5 min |"
    assert "does not fit" in lines[-1]


def test_an_error_that_says_nothing_of_the_row_ends_the_program(tmp_path, monkeypatch):
    failed = SimpleNamespace(returncode=2, stderr="error: --topology=v5e:4x4 cannot be compiled for (no libtpu).\n")
    monkeypatch.setattr(scale.subprocess, "run", lambda *_, **__: failed)
    flags.FLAGS.mark_as_parsed()
    monkeypatch.setattr(flags.FLAGS["table"], "value", str(tmp_path / "scale.jsonl"))
    with pytest.raises(SystemExit, match="no libtpu"):
        scale.main([])
    assert not (tmp_path / "scale.jsonl").exists()


def test_a_name_that_no_row_has_is_refused(compiled, tmp_path, monkeypatch):
    for name, value in {"table": str(tmp_path / "scale.jsonl"), "rows": "v5e:4x4, all"}.items():
        monkeypatch.setattr(flags.FLAGS[name], "value", value)
    with pytest.raises(SystemExit, match=r"--rows=v5e:4x4, all is in no row's name: .* v5e:4x4, full, trajectories, 1"):
        scale.main([])
    assert not compiled


def test_every_row_is_a_configuration_with_that_stage():
    from configs.sdxl import get_config

    rows = scale.wanted()
    assert len({row.name for row in rows}) == len(rows) == len(scale.STAGES) * len(scale.CHIPS) * 2
    for row in rows:
        given = dict(word[2:].partition("=")[::2] for word in row.arguments())
        config = get_config(given["config"].split(":")[1])
        assert int(given["stage"]) <= 1 + len(config.stages)
        assert given.get("config.trainable", config.trainable) == row.trainable
