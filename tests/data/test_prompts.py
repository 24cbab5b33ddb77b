"""Prompts from every kind of place, and what is said where one cannot be read."""

import json

import numpy as np
import pyarrow as pa
import pytest
import tensorflow_datasets as tfds
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import parquet

from mlcm_jax.data.prompts import open_prompts, read_prompts, shuffled
from mlcm_jax.errors import UserError

PROMPTS = ["red heart", 'a "blue" star, small', "grüne Blätter"]


def write(folder, name: str):
    """The prompts as a file of the kind that the name says, with what readers must leave out."""
    path = folder / name
    if path.suffix == ".txt":
        path.write_text("\n".join(["", *PROMPTS, " "]), encoding="utf-8")
    elif path.suffix == ".jsonl":
        rows = [{"id": 1, "prompt": prompt} for prompt in [*PROMPTS, None, " "]]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        quoted = ['"' + p.replace('"', '""') + '"' for p in PROMPTS]
        path.write_text("id,caption\n" + "".join(f"{i},{p}\n" for i, p in enumerate([*quoted, ""])), encoding="utf-8")
    else:
        table = {"url": ["u"] * 5, "text": [f" {p}" for p in PROMPTS] + [None, ""]}
        parquet.write_table(pa.table(table), path)
    return path


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv", "p.parquet"])
def test_every_file_gives_the_same_prompts(tmp_path, name):
    path = write(tmp_path, name)
    assert read_prompts(path) == PROMPTS
    assert open_prompts(path).__getitems__([2, 0]) == [(PROMPTS[2],), (PROMPTS[0],)]


LINES = {
    "Windows' line ends and mark": b"\xef\xbb\xbfred heart\r\nblue star\r\n",
    "old Macs' line ends": b"red heart\rblue star",
    "no line end after the last": b"\xef\xbb\xbfred heart\n\nblue star",
}


@pytest.mark.parametrize("kind", LINES)
def test_lines_of_other_editors(tmp_path, kind):
    (tmp_path / "p.txt").write_bytes(LINES[kind])
    assert read_prompts(tmp_path / "p.txt") == ["red heart", "blue star"]


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl"])
def test_only_line_ends_end_a_prompt(tmp_path, name):
    """Other characters that str.splitlines cuts at stay within the prompt."""
    within = "red" + "".join(map(chr, (0x0B, 0x0C, 0x1C, 0x1D, 0x1E, 0x85, 0x2028, 0x2029))) + "heart"
    text = {"p.txt": within, "p.csv": f"prompt\n{within}", "p.jsonl": json.dumps({"prompt": within})}[name]
    (tmp_path / name).write_text(f"\ufeff{text}\n", encoding="utf-8")
    assert read_prompts(tmp_path / name) == [within]


class BucketInMemory(MemoryFileSystem):
    """Stands in for the cloud's file system: takes gs:// paths, and keeps what is written in memory."""

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("gs://", "memory://"))


@pytest.mark.parametrize("name", ["p.txt", "p.parquet"])
def test_prompts_are_read_from_a_bucket(tmp_path, monkeypatch, name):
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: BucketInMemory())
    epath.Path(f"gs://bucket/{name}").write_bytes(write(tmp_path, name).read_bytes())
    assert read_prompts(f"gs://bucket/{name}") == PROMPTS


def test_a_column_of_lists_takes_turns(tmp_path):
    captions = [["a bear", "a brown bear"], [], ["a room"]]
    parquet.write_table(pa.table({"captions": captions, "title": ["x", "y", "z"]}), tmp_path / "p.parquet")
    source = open_prompts(tmp_path / "p.parquet")
    assert source.__getitems__([0, 1]) == [("a bear", "a brown bear"), ("a room",)]
    assert read_prompts(tmp_path / "p.parquet", "title") == ["x", "y", "z"]
    turns = [place for place in shuffled(range(8), 2, seed=0) if place.row == 0]
    assert [place.turn(2) for place in turns] == [0, 1, 0, 1], "each walk through the rows takes the next caption"


class Captioned(tfds.core.GeneratorBasedBuilder):
    """Images with captions, laid out as coco_captions is."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = epath.Path(__file__)

    def _info(self):
        captions = tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})
        image = tfds.features.Tensor(shape=(2, 2), dtype=np.uint8)
        features = {"image": image, "image/filename": tfds.features.Text(), "captions": captions}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5), "validation": self._generate_examples(2)}

    def _generate_examples(self, n: int):
        for i in range(n):
            captions = [{"id": j, "text": f"thing {i} seen {j} times"} for j in range(i % 2 + 1)]
            yield i, {"image": np.full((2, 2), i, np.uint8), "image/filename": f"{i}.png", "captions": captions}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    Captioned(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def test_captions_of_a_data_set_are_read_by_its_name(data_dir, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(data_dir))  # read from TFDS_DATA_DIR at the import
    source = open_prompts("tfds:captioned")
    rows = source.__getitems__(range(len(source)))
    assert sorted(map(tuple, rows)) == [
        ("thing 0 seen 0 times",),
        ("thing 1 seen 0 times", "thing 1 seen 1 times"),
        ("thing 2 seen 0 times",),
        ("thing 3 seen 0 times", "thing 3 seen 1 times"),
        ("thing 4 seen 0 times",),
    ]
    assert len(open_prompts("tfds:captioned:validation")) == 2 and len(open_prompts("tfds:captioned:train[:60%]")) == 3


def test_a_prepared_folder_will_do_and_a_feature_can_be_named(data_dir):
    place = f"tfds:{data_dir}/captioned/1.0.0:validation"
    assert sorted(read_prompts(place, "image/filename")) == ["0.png", "1.png"]
    assert sorted(read_prompts(place, "captions/text")) == ["thing 0 seen 0 times", "thing 1 seen 0 times"]


WRONG = {
    "absent.parquet": ("", "does not exist"),
    "p.parquet": ("prompt", "has no text in 'prompt': it has url, text"),
    "unnamed.csv": ("", "does not say which column holds the prompts: set prompts_column; it has a, b"),
    "numbers.csv": ("", "it has none"),
    "blank.csv": ("", "has no prompt in the column"),
    "broken.jsonl": ("", "is not a readable .jsonl file"),
    "p.txt": ("text", "has no columns"),
    "utf16.txt": ("", "is not UTF-8 text"),
    "tfds:nothing_of_this_name": ("", "tfds build nothing_of_this_name --file_format=array_record"),
    "DATA:nowhere": ("", "has no split 'nowhere': it has train, validation"),
    "DATA:train": ("image", "has no text in 'image': it has captions/text, image/filename"),
    "gs://bucket/p.txt": ("", "cannot be reached (Please install gcsfs"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_place_is_answered_in_one_sentence(tmp_path, data_dir, name):
    write(tmp_path, "p.txt"), write(tmp_path, "p.parquet")
    (tmp_path / "utf16.txt").write_text("red heart\n", encoding="utf-16-le")
    (tmp_path / "unnamed.csv").write_text("a,b\nx,y\n")
    (tmp_path / "numbers.csv").write_text("a,b\n1,2\n")
    (tmp_path / "blank.csv").write_text('prompt\n" "\n')
    (tmp_path / "broken.jsonl").write_text('{"prompt": "x"\n')
    column, words = WRONG[name]
    place = name.replace("DATA", f"tfds:{data_dir}/captioned/1.0.0")
    with pytest.raises(UserError) as error:
        open_prompts(place if ":" in name else tmp_path / name, column)
    sentence = str(error.value)
    assert words in sentence and len(sentence) < 300 and "\n" not in sentence
