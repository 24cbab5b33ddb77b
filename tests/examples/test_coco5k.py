"""The COCO data of configs/eval_coco5k.py, built from three images that a local server gives."""

import functools
import hashlib
import http.server
import io
import json
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

from mlcm_jax.data.prompts import read_prompts
from mlcm_jax.errors import UserError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "coco5k"
sys.path.insert(0, str(EXAMPLE))

import build_coco5k  # noqa: E402
import coco_captions_2017  # noqa: E402

CAPTIONS = {139: ["A room with\n chairs. ", "Another."], 9: ["Ein Bär, é."], 285: ["A bear.", "A big bear."]}


def jpeg(number):
    file = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), number % 256, np.uint8)).save(file, "JPEG")
    return file.getvalue()


def archives(folder):
    """The two archives in COCO's layout; returns tfds' checksum lines for them."""
    images = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in CAPTIONS]
    texts = [(number, text) for number, each in CAPTIONS.items() for text in each]
    annotations = [{"id": i, "image_id": number, "caption": text} for i, (number, text) in enumerate(texts)]
    contents = {
        "zips/val2017.zip": {f"val2017/{p['file_name']}": jpeg(p["id"]) for p in images},
        "annotations/annotations_trainval2017.zip": {
            "annotations/captions_val2017.json": json.dumps({"images": images, "annotations": annotations[::-1]})
        },
    }
    lines = []
    for name, members in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True)
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        lines.append("\t".join([f"{{site}}/{name}", str(len(data)), digest, path.name]))
    return "\n".join(lines) + "\n"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A local copy of COCO's site, with checksums of its own; the folder that it serves."""
    served = tmp_path / "site"
    checksums = archives(served)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    (tmp_path / "checksums.tsv").write_text(checksums.format(site=address))
    monkeypatch.setattr(coco_captions_2017, "SITE", address)

    class CocoCaptions2017(coco_captions_2017.CocoCaptions2017, skip_registration=True):
        code_path = epath.Path(tmp_path / "builder.py")  # tfds reads the checksums beside it, once for a class

    monkeypatch.setattr(build_coco5k, "CocoCaptions2017", CocoCaptions2017)
    yield served
    server.shutdown()
    server.server_close()


def test_captions_and_images(site, tmp_path):
    builder = build_coco5k.fetch(tmp_path / "data")
    assert build_coco5k.write(builder, tmp_path / "coco5k") == 3
    assert read_prompts(tmp_path / "coco5k" / "prompts.txt") == ["Ein Bär, é.", "A room with chairs.", "A bear."]
    images = sorted((tmp_path / "coco5k" / "images").iterdir())
    assert [p.name for p in images] == ["000000000009.jpg", "000000000139.jpg", "000000000285.jpg"]
    assert [p.read_bytes() for p in images] == [jpeg(9), jpeg(139), jpeg(285)]


def test_other_bytes_than_coco_s(site, tmp_path):
    with (site / "zips" / "val2017.zip").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="MSCOCO could not be fetched"):
        build_coco5k.fetch(tmp_path / "data")


def test_checksums_are_of_both_archives():
    lines = (EXAMPLE / "checksums.tsv").read_text().splitlines()
    urls = {f"{coco_captions_2017.SITE}/{path}" for path in coco_captions_2017.ARCHIVES.values()}
    assert {line.split("\t")[0] for line in lines} == urls


def test_a_site_that_does_not_answer(site, tmp_path):
    (site / "zips" / "val2017.zip").unlink()
    with pytest.raises(UserError, match=r"MSCOCO could not be fetched into .*data"):
        build_coco5k.fetch(tmp_path / "data")
