"""What may differ when a run goes on: the settings in its workdir against those it is started with."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mlcm_jax.config import base
from mlcm_jax.data.prompts import TextSource, fingerprint
from mlcm_jax.errors import UserError
from mlcm_jax.hub.save import write_json
from mlcm_jax.hub.tensor_reader import read_json
from mlcm_jax.parallel.distributed import is_first
from mlcm_jax.training.optimizer import stage_learning_rate
from mlcm_jax.training.stages import read_stages

CONFIG_FILE, PROMPTS_FILE = "config.json", "prompts.json"
# Settings that may change when a run goes on: they say how long, how often and on what, not what is trained.
MAY_CHANGE = (
    "num_steps",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "sample_every",
    "text_states",
    "wandb_project",
    "sample",
    "mesh",
    "attention",
    "unroll",
)


def read_settings(workdir: epath.Path) -> ConfigDict | None:
    """The settings of the run in ``workdir``; None where there is none.

    A run that is older than a setting gets its default, which is what was done before there was a choice.
    """
    if not (workdir / CONFIG_FILE).is_file():
        return None
    settings = base()
    with settings.unlocked(), settings.ignore_type():
        _update(settings, read_json(workdir / CONFIG_FILE))
    return settings


def check_resume(config: ConfigDict, workdir: epath.Path, *, new_learning_rate: bool = False) -> None:
    """Raise UserError when ``workdir`` holds a run with other settings.

    new_learning_rate: learning rates may be others, also those of stages.
    """
    found = read_settings(workdir)
    if found is None:
        return
    before, now = (dict(_flat(json.loads(settings.to_json()))) for settings in (found, config))
    keys = now.keys() | {key for key in before if key.startswith("stages.")}  # others are settings of the past
    changed = sorted(k for k in keys if before.get(k) != now.get(k) and k.split(".")[0] not in MAY_CHANGE)
    rates = [key for key in changed if key.endswith("learning_rate")]
    if new_learning_rate:
        changed = [key for key in changed if key not in rates]
    if not changed:
        return
    if changed == rates:
        raise UserError(
            f"{workdir} holds a run with another {rates[0]} ({before.get(rates[0])}): to go on with "
            f"{now.get(rates[0])}, add --new_learning_rate."
        )
    raise UserError(
        f"{workdir} holds a run with other settings ({', '.join(changed)}): use another --workdir, or the settings "
        f"in {workdir / CONFIG_FILE}."
    )


def changed_schedule(config: ConfigDict, workdir: epath.Path, step: int) -> str:
    """What differs in the learning rate of the run in ``workdir`` after ``step`` finished steps, to be put after a
    sentence about them; "" where nothing does.
    A schedule that falls does so over num_steps, so that another length bends it.
    """
    found = read_settings(workdir)
    if found is None:
        return ""
    before, now = (stage_learning_rate(read_stages(settings)) for settings in (found, config))
    for place in np.linspace(step, max(config.num_steps, step + 1), 9, endpoint=False).astype(int):
        was, will = float(np.asarray(before(place))), float(np.asarray(now(place)))
        if abs(was - will) > 1e-6 * max(was, will):
            ends = f": its {config.optim.schedule} schedule ends at step {config.num_steps}, not {found.num_steps}"
            cause = ends if config.num_steps != found.num_steps else ""
            return f"; the learning rate is {will:.3g} at step {place + 1}, where it was to be {was:.3g}{cause}"
    return ""


def changed_prompts(prompts: TextSource, workdir: epath.Path, step: int) -> str:
    """What differs between the prompts and those that the run in ``workdir`` began with, to be put after the place's
    name; "" where nothing does. step: finished ones; a run that begins, or did so before there were such notes, notes
    its prompts. Of several processes the first looks."""
    if not is_first():
        return ""
    file, now = workdir / PROMPTS_FILE, fingerprint(prompts)
    if not step or not file.exists():
        write_json(now, file)
        return ""
    before = read_json(file)
    if before == now:
        return ""
    rows = f"{before.get('rows')} prompts then, {now['rows']} now"
    return f"has changed since the run began ({rows}): from here on steps take other prompts than they would have"


def _update(settings: ConfigDict, values: Mapping[str, Any]) -> None:
    """Put ``values`` in the place of defaults, at any depth; former names become the present ones."""
    for key, value in values.items():
        if isinstance(value, Mapping) and key in settings:
            _update(settings[key], value)
        else:
            settings[key] = value


def _flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names; the stages' as stages.2.num_segments, numbered as people do."""
    if isinstance(settings, Mapping):
        entries = settings.items()
    elif prefix == "stages.":
        entries = enumerate(settings, 2)
    else:
        yield prefix[:-1], settings
        return
    for key, value in entries:
        yield from _flat(value, f"{prefix}{key}.")
