"""Resuming a run: orbax checkpoints of the train state, written aside and renamed, so that a kill leaves whole ones."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from mlcm_jax.distillation.state import TrainState
from mlcm_jax.errors import UserError
from mlcm_jax.outputs import disk_reason, is_remote
from mlcm_jax.parallel.distributed import is_first, say
from mlcm_jax.training.checkpoint_files import newest_whole, write_manifest
from mlcm_jax.types import Params

SAVED_NAMES = {"trajectory_buffer": "pool", "critics": "rivals"}  # of TrainState's fields: files keep their first names
DAMAGED = ".damaged"  # after the step, in the name of a checkpoint that was set aside


def latest_step(folder: epath.PathLike, *, set_aside: bool = False) -> int | None:
    """The step of the newest whole checkpoint in a run's folder of them; None where there is none.

    Says which newer ones are skipped, and why. set_aside: give those another name, so that the run can save these steps
    again. Of several processes the first looks, and all must call.
    """
    step, damaged = newest_whole(folder) if is_first() else (None, {})
    for number, reason in damaged.items():
        say(f"{'skipped':>10}  the checkpoint of step {number}, which is damaged: {reason}")
        if set_aside:
            _rename(epath.Path(folder) / str(number))
    if jax.process_count() == 1:
        return step
    agreed = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    return None if agreed < 0 else agreed


def _rename(damaged: epath.Path) -> None:
    aside = damaged.with_name(damaged.name + DAMAGED)
    if aside.exists():
        aside.rmtree() if aside.is_dir() else aside.unlink()
    damaged.rename(aside)


def read_trained(folder: epath.PathLike, sharding: jax.sharding.Sharding) -> tuple[int, Params] | None:
    """The number of steps and the trained parameters alone of the newest whole checkpoint in a run's folder, their
    moving average where one was kept, whatever devices they were saved from; None where there is none. sharding: of all
    of them."""
    step = latest_step(folder)
    if step is None:
        return None
    handler, saved = ocp.PyTreeCheckpointHandler(), _absolute(folder) / str(step) / "default"
    tree: Any = handler.metadata(saved).tree
    name = "params" if tree.get("ema") is None else "ema"
    wanted = {name: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree[name])}
    restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
    return step, handler.restore(saved, args=args)[name]


def _absolute(folder: epath.PathLike) -> epath.Path:
    """As orbax needs it; epath takes a URL for a relative path."""
    return epath.Path(folder) if is_remote(folder) else epath.Path(folder).absolute()


def _as_saved(state: Any) -> Any:
    """A train state under the names that it has in a checkpoint; anything else as it is. A state without a former
    student is saved as those were that are older than this field."""
    if not isinstance(state, TrainState):
        return state
    fields = (field.name for field in dataclasses.fields(state))
    named = {SAVED_NAMES.get(name, name): getattr(state, name) for name in fields}
    return {name: value for name, value in named.items() if name != "previous_student" or value is not None}


def _like(like: Any, saved: Any) -> Any:
    """What ``_as_saved`` made a dictionary of."""
    if not isinstance(like, TrainState):
        return saved
    names = {SAVED_NAMES.get(field.name, field.name): field.name for field in dataclasses.fields(like)}
    return TrainState(**{names[name]: value for name, value in saved.items()})


class Checkpoints:
    """The checkpoints of one run, in ``folder``/<step>; saving runs in the background.

    keep: how many of the newest stay. save, go_back and close raise UserError where the disk is full.
    """

    def __init__(self, folder: epath.PathLike, *, keep: int = 2):
        self._folder, self._saving = _absolute(folder), 0
        noting = ocp.AsyncOptions(post_finalization_callback=self._note_files)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True, async_options=noting)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, state: Any, step: int) -> None:
        if step == self._manager.latest_step():
            return
        with self._disk_errors():
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(step, args=ocp.args.StandardSave(_as_saved(state)))

    def go_back(self, like: Any, step: int) -> Any:
        """The newest state of at most ``step``; later ones are removed. None, and all stay, where there is none."""
        with self._disk_errors():
            self._manager.wait_until_finished()
        steps = self._manager.all_steps()
        if min(steps, default=step + 1) > step:
            return None
        for later in steps:
            if later > step:
                self._manager.delete(later)
        return self.restore(like)

    def restore(self, like: Any) -> Any:
        """The newest state, placed as ``like`` (arrays or ShapeDtypeStructs with shardings); None when there is none.

        Raises UserError when the checkpoint does not fit ``like``.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_saved(like))
        try:
            return _like(like, self._manager.restore(step, args=ocp.args.StandardRestore(abstract)))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"The checkpoint {self._manager.directory}/{step} does not fit this configuration "
                f"({str(error).splitlines()[0][:200]}): use another --workdir, or the configuration it was made with."
            ) from error

    def close(self) -> None:
        """Wait for a save in the background and let go of the folder."""
        with self._disk_errors():
            self._manager.wait_until_finished()
            self._manager.close()

    def _note_files(self) -> None:
        """Called in the background when all files of a checkpoint are written, before its folder takes its name."""
        if is_first():
            for folder in self._folder.glob(f"{self._saving}*"):
                if folder.name.split(".")[0] == str(self._saving) and DAMAGED not in folder.name:
                    write_manifest(folder)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax and tensorstore have errors of their own, with the disk's words in them
            reason = disk_reason(error)
            if not reason:
                raise
            whole = max((step for step in ocp.utils.checkpoint_steps(self._folder) if step != self._saving), default=0)
            raise UserError(
                f"The checkpoint of step {self._saving} cannot be written ({reason}): make room in {self._folder} and "
                f"run the same command to go on after step {whole}."
            ) from error
