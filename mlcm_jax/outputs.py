"""Where results go: places are tried before the work begins, files take their names when they are whole."""

import contextlib
import errno
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from etils import epath
from PIL import Image

from mlcm_jax.errors import UserError

PROBE_BYTES = 65536  # a disk that does not take these is full
# What a place answers that is full or may not be used: no mistake in the program.
ADVICE = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EFBIG: "choose a place that takes files of this size",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "change its permissions or choose another place",
    errno.EPERM: "change its permissions or choose another place",
}
# Libraries that write for themselves (tensorstore, safetensors, array_record) raise errors of their own with these.
WORDS = {os.strerror(number).lower(): number for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)}


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is a URL, such as gs://bucket/folder."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def atomic_write(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """Open a file for writing, here or at gs://, that takes its real name only when it is complete and on the disk.

    Raises UserError where the disk is full or may not be written to; what was there before stays.
    """
    path = epath.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as f:
            yield f
            f.flush()
            if not is_remote(path):
                os.fsync(f.fileno())
        temporary.replace(path)
    except OSError as error:
        advice = ADVICE.get(error.errno or 0, "choose another place")
        raise UserError(f"{path} cannot be written ({error.strerror or error}): {advice}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def disk_reason(error: BaseException | None) -> str:
    """What the disk says where the cause of an error is that it is full or may not be used; "" for any other error."""
    number = _disk_number(error)
    return os.strerror(number) if number else ""


def disk_error(error: BaseException) -> UserError | None:
    """The sentence for an error with a ``disk_reason``; None for any other."""
    number = _disk_number(error)
    if not number:
        return None
    what = getattr(error, "filename", None) or "A file"
    return UserError(f"{what} cannot be written or opened ({os.strerror(number)}): {ADVICE[number]}.")


def _disk_number(error: BaseException | None) -> int:
    """The error number of ``ADVICE`` that an error, or what caused it, has; 0 where there is none."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        number = number or next((n for words, n in WORDS.items() if words in str(error).lower()), None)
        if number in ADVICE:
            return number
        error = error.__cause__ or error.__context__
    return 0


def check_folder(flag: str, place: epath.PathLike, *, remote: bool = False) -> None:
    """Raise UserError unless ``place`` is a folder that can be written to, or can become one. Nothing is left there.

    flag: its name, for the message. remote: whether it may be a URL.
    """
    said = f"--{flag}={place}"
    if is_remote(place):
        _check_remote(said, place, allowed=remote)
        return
    path = Path(place)
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{said} is {'a file' if path.exists() else 'a link to nothing'}: name a folder.")
    _check_writable(said, path)


def check_file(flag: str, place: epath.PathLike, suffix: str = "") -> None:
    """Raise UserError unless ``place`` is a file that can be written. suffix: which it must have, if any."""
    said = f"--{flag}={place}"
    if is_remote(place):
        _check_remote(said, place, allowed=False)
    path = Path(place)
    if path.is_dir():
        raise UserError(f"{said} is a folder: name a file.")
    if os.path.lexists(path) and not path.is_file():
        raise UserError(f"{said} is no ordinary file: name another.")
    if suffix and path.suffix != suffix:
        raise UserError(f"{said} must end in {suffix}.")
    _check_writable(said, path.parent)


def check_image_file(flag: str, place: epath.PathLike) -> None:
    """The same for an image, in a format that its suffix names and that holds colours."""
    check_file(flag, place)
    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), format=image_format(place))
    except Exception:  # ValueError, KeyError and OSError: formats differ
        raise UserError(f"--{flag}={place} has no suffix of an image file: name it *.png, *.jpg or *.webp.") from None


def image_format(place: epath.PathLike) -> str:
    """Pillow's name of the format that a suffix stands for; raises ValueError where there is none."""
    suffix = Path(place).suffix.lower()
    found = Image.registered_extensions().get(suffix)
    if found is None:
        raise ValueError(f"no image format has the suffix {suffix!r}")
    return found


def _check_remote(said: str, place: epath.PathLike, *, allowed: bool) -> None:
    if not allowed:
        raise UserError(f"{said} is a URL: name a place on this machine.")
    try:
        epath.Path(place).exists()
    except Exception as error:  # each kind of bucket has its own errors, and a missing package is another
        raise UserError(f"{said} cannot be reached ({' '.join(str(error).split())[:150]}).") from None


def _check_writable(said: str, folder: Path) -> None:
    """Write to the folder, or to the nearest one above it that exists, and take it away again."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UserError(f"{said} lies below {there}, which is no folder: choose another place.")
    try:
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(bytes(PROBE_BYTES))
    except OSError as error:
        advice = ADVICE.get(error.errno or 0, "choose another place")
        raise UserError(f"{said} cannot be written ({error.strerror}): {advice}.") from None
