"""The npm packages that hold the images: which ones, how they are fetched and where an emoji's file lies."""

import base64
import hashlib
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from mlcm_jax.errors import UserError


@dataclass(frozen=True)
class Source:
    """One npm package and the style of drawing it holds.

    `integrity` is the registry's own `dist.integrity` of the tarball.
    """

    style: str
    package: str
    version: str
    images: str
    integrity: str

    @property
    def stem(self) -> str:
        """The tarball's name without its ending, as `npm pack` gives it."""
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}"

    def image_files(self, packages_dir: Path) -> dict[str, Path]:
        """Code points (see `code_points_key`) to image file, for every image of the package."""
        folder = packages_dir / self.stem / "package" / self.images
        # Sorted in reverse: of two spellings of one sequence the shorter comes last and stays.
        return {code_points_key(path.stem): path for path in sorted(folder.iterdir(), reverse=True)}


SOURCES = (
    Source(
        "noto", "emoji-datasource-google", "16.0.0", "img/google/64",
        "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    ),
    Source(
        "twemoji", "emoji-datasource-twitter", "16.0.0", "img/twitter/64",
        "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
    ),
    Source(
        "fluent", "@lobehub/fluent-emoji-3d", "1.1.0", "assets",
        "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    ),
)  # fmt: skip
# The variation selector and the tag that ends a flag: packages differ in whether file names have them.
_OPTIONAL_CODE_POINTS = frozenset({"fe0f", "e007f"})
STYLES = tuple(source.style for source in SOURCES)


def names_file(packages_dir: Path) -> Path:
    """The emoji.json that lists every emoji with its code points and category."""
    return packages_dir / SOURCES[0].stem / "package" / "emoji.json"


def code_points_key(code_points: str) -> str:
    """One spelling for a sequence such as "0023-FE0F-20E3": lower-case, no leading zeros, no invisible marks."""
    parts = (part.lstrip("0") for part in code_points.lower().replace("_", "-").split("-"))
    return "-".join(part for part in parts if part not in _OPTIONAL_CODE_POINTS)


def fetch_packages(cache_dir: Path) -> Path:
    """Download with `npm pack` what `cache_dir` lacks, check it, unpack it, and return the folder of packages.

    Raises:
        UserError: npm is missing or fails, or a tarball is not the one that the registry published.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    packages_dir = cache_dir / "packages"
    for source in SOURCES:
        tarball = cache_dir / f"{source.stem}.tgz"
        if not tarball.exists():
            _npm_pack(source, cache_dir)
        _check_integrity(tarball, source)
        target = packages_dir / source.stem
        if not target.exists():
            _unpack(tarball, target, source)
    return packages_dir


def _npm_pack(source: Source, cache_dir: Path) -> None:
    command = ["npm", "pack", f"{source.package}@{source.version}", "--pack-destination", str(cache_dir)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("npm was not found: install Node.js, or put the tarballs into the cache folder.") from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"`{' '.join(command)}` failed ({reason}): check the network and try again.") from error


def _check_integrity(tarball: Path, source: Source) -> None:
    digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if f"sha512-{digest}" != source.integrity:
        raise UserError(f"{tarball} is not {source.package} {source.version} as published: delete it and try again.")


def _unpack(tarball: Path, target: Path, source: Source) -> None:
    # The packages also hold sprite sheets several times as large as what is needed here.
    wanted = (f"package/{source.images}/", "package/emoji.json", "package/LICENSE", "package/README.md")
    partial = target.with_name(target.name + ".partial")
    with tarfile.open(tarball) as archive:
        members = [member for member in archive if member.name.startswith(wanted)]
        archive.extractall(partial, members=members, filter="data")
    partial.rename(target)
