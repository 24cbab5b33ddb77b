"""Whether a checkpoint's files are all there and as they were written, without restoring them."""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import orbax.checkpoint as ocp
from etils import epath

from mlcm_jax.errors import UserError
from mlcm_jax.hub.save import write_json
from mlcm_jax.hub.tensor_reader import read_json
from mlcm_jax.outputs import is_remote

MANIFEST = "files.json"  # in a checkpoint's folder: each file's size in bytes and CRC-32
STATE = "default"  # folder of the train state in a checkpoint's; what orbax writes beside it is not needed to restore
NEEDED = (f"{STATE}/_METADATA", f"{STATE}/manifest.ocdbt")  # what is looked for where there is no manifest
CHUNK = 2**22  # bytes


class Found(NamedTuple):
    """step: of the newest whole checkpoint; None where there is none. damaged: newer ones, and what is wrong."""

    step: int | None
    damaged: dict[int, str]


def newest_whole(folder: epath.PathLike) -> Found:
    """Look through the checkpoints of a run, newest first, until one is whole."""
    damaged = {}
    for step in sorted(ocp.utils.checkpoint_steps(folder), reverse=True):  # of a folder that does not exist, none
        reason = find_damage(epath.Path(folder) / str(step))
        if not reason:
            return Found(step, damaged)
        damaged[step] = reason
    return Found(None, damaged)


def write_manifest(folder: epath.Path) -> None:
    """Note the files of a checkpoint that has been written and does not have its name yet."""
    files = {str(file.relative_to(folder)): _described(file) for file in _files(folder / STATE)}
    write_json(files, folder / MANIFEST)


def find_damage(folder: epath.Path) -> str:
    """What is wrong with a checkpoint, in a few words; "" where nothing is. Those of older versions have no manifest:
    of them only the most important files are looked for."""
    if not (folder / MANIFEST).exists():
        return next((f"{name} is missing or empty" for name in NEEDED if not _size(folder / name)), "")
    try:
        files = read_json(folder / MANIFEST)
    except UserError:
        return f"{MANIFEST} cannot be read"
    return next((reason for name, noted in files.items() if (reason := _difference(folder, name, noted))), "")


def _difference(folder: epath.Path, name: str, noted: dict) -> str:
    file = folder / name
    if not file.is_file():
        return f"{name} is missing"
    if _size(file) != noted["bytes"]:
        return f"{name} has {_size(file)} of {noted['bytes']} bytes"
    return "" if _described(file) == noted else f"{name} is not what was written"


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    """All files at any depth; epath has no pattern for that."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry)
        else:
            yield entry


def _described(file: epath.Path) -> dict[str, int]:
    """Size and checksum; of a bucket's objects, which have checksums of their own, the size alone."""
    described = {"bytes": _size(file)}
    if is_remote(file):
        return described
    checksum = 0
    with file.open("rb") as f:
        while chunk := f.read(CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return described | {"crc32": checksum}


def _size(file: epath.Path) -> int:
    return file.stat().length if file.is_file() else 0
