"""The emoji data set, built from a few drawn images in place of the downloaded packages."""

import base64
import hashlib
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlcm_jax.errors import UserError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "emoji"
sys.path.insert(0, str(EXAMPLE))

from emoji_dataset import dataset, names, prompts, sources, tokenizer  # noqa: E402

HELD_OUT = "yin yang"
BLUE = (0, 0, 255, 255)
ENTRIES = [
    {"name": "HEAVY BLACK HEART", "unified": "2764-FE0F", "category": "Smileys & Emotion", "subcategory": "heart"},
    {
        "name": "WAVING HAND SIGN",
        "unified": "1F44B",
        "category": "People & Body",
        "subcategory": "hand-fingers-open",
        "skin_variations": {"1F3FB": {"unified": "1F44B-1F3FB"}},
    },
    {"name": "Japan Flag", "unified": "1F1EF-1F1F5", "category": "Flags", "subcategory": "country-flag"},
    {"name": "YIN YANG", "unified": "262F-FE0F", "category": "Symbols", "subcategory": "religion"},
]
FORMS = ["2764-fe0f", "1f44b", "1f44b-1f3fb", "1f1ef-1f1f5", "262f-fe0f"]


def draw(size: tuple[int, int]) -> Image.Image:
    """A clear image with a blue block in its middle, half as wide and high."""
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    width, height = size
    image.paste(BLUE, (width // 4, height // 4, width * 3 // 4, height * 3 // 4))
    return image


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Unpacked packages: all forms in Noto and Twemoji (palette images), no flag in Fluent (not square)."""
    drawn = {
        "noto": (draw((64, 64)), ".png", FORMS),
        "twemoji": (draw((64, 64)).quantize(4), ".png", FORMS),
        "fluent": (draw((256, 264)), ".webp", [form for form in FORMS if form != "1f1ef-1f1f5"]),
    }
    for source in sources.SOURCES:
        folder = tmp_path / "packages" / source.stem / "package" / source.images
        folder.mkdir(parents=True)
        image, ending, forms = drawn[source.style]
        for form in forms:
            image.save(folder / f"{form}{ending}", **({"lossless": True} if ending == ".webp" else {}))
    sources.names_file(tmp_path / "packages").write_text(json.dumps(ENTRIES))
    return tmp_path / "packages"


def test_builder_reads_back_every_image_with_its_caption(packages: Path, tmp_path: Path):
    dataset.build(tmp_path / "data", packages)
    train = dataset.load_split(tmp_path / "data", "train")
    expected = {
        f"{text}, {style} style"
        for style in sources.STYLES
        for text in ("red heart", "waving hand", "waving hand, light skin tone", "flag of japan")
    } - {"flag of japan, fluent style"}
    assert set(train["caption"]) == expected and len(train["caption"]) == len(expected)
    assert train["image"].shape == (len(expected), 64, 64, 3) and train["image"].dtype == np.uint8
    for i, caption in enumerate(train["caption"]):
        parts = (train["name"][i], train["skin_tone"][i], f"{train['style'][i]} style")
        assert caption == ", ".join(part for part in parts if part)
        assert train["image"][i][0, 0].tolist() == [255, 255, 255]
        np.testing.assert_allclose(train["image"][i][32, 32], BLUE[:3], atol=2)
    assert set(train["category"]) == {"Smileys & Emotion", "People & Body", "Flags"}

    heldout = dataset.load_split(tmp_path / "data", "heldout")
    assert sorted(heldout["caption"]) == [f"{HELD_OUT}, {style} style" for style in sorted(sources.STYLES)]
    assert "tensorflow" not in sys.modules


def test_images_that_are_not_square_keep_their_shape(tmp_path: Path):
    Image.new("RGBA", (128, 256), BLUE).save(tmp_path / "tall.png")
    image = dataset.read_image(tmp_path / "tall.png")
    assert image[32, 2].tolist() == [255, 255, 255] and image[32, 61].tolist() == [255, 255, 255]
    assert image[2, 32].tolist() == [0, 0, 255] and image[61, 32].tolist() == [0, 0, 255]


def test_load_split_names_what_is_wrong(tmp_path: Path):
    with pytest.raises(UserError, match="no split 'test'"):
        dataset.load_split(tmp_path, "test")
    with pytest.raises(UserError, match="run examples/emoji/build_data"):
        dataset.load_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "expected"),
    [(HELD_OUT, True), ("raccoon", True), ("red heart", False), ("waving hand", False), ("pizza", False)],
)
def test_held_out_rule_is_fixed(name: str, expected: bool):
    assert names.is_held_out(name) is expected


def test_held_out_rule_takes_a_tenth():
    held = sum(names.is_held_out(f"name {i}") for i in range(10_000))
    assert 900 < held < 1100


@pytest.mark.parametrize(
    ("unified", "subcategory", "expected"),
    [
        ("1F1E8-1F1EE", "country-flag", "flag of cote d'ivoire"),
        ("1F251", "alphanum", "japanese acceptable button"),
        ("1F9D1-200D-1F680", "person-role", "astronaut"),
    ],
)
def test_names_are_natural_and_plain(tmp_path: Path, unified: str, subcategory: str, expected: str):
    entry = {"name": "OFFICIAL", "unified": unified, "category": "Any", "subcategory": subcategory}
    (tmp_path / "emoji.json").write_text(json.dumps([entry]))
    (read,) = names.read_emojis(tmp_path / "emoji.json")
    assert (read.name, read.from_fallback) == (expected, False)


def test_an_unknown_sequence_takes_its_official_name(tmp_path: Path):
    entry = {"name": "NEW THING", "unified": "E000", "category": "Any", "subcategory": "any"}
    variations = {"1F3FB-1F3FF": {"unified": "E000-1F3FB-1F3FF"}, "1F3FD-1F3FD": {"unified": "E000-1F3FD"}}
    (tmp_path / "emoji.json").write_text(json.dumps([{**entry, "skin_variations": variations}]))
    plain, mixed, same = names.read_emojis(tmp_path / "emoji.json")
    assert plain.from_fallback and plain.caption("noto") == "new thing, noto style"
    assert mixed.caption("noto") == "new thing, light skin tone and dark skin tone, noto style"
    assert same.caption("noto") == "new thing, medium skin tone, noto style"


def pack(folder: Path, source: sources.Source, images: Path) -> sources.Source:
    """Write the source's tarball with one image and one sprite sheet; return the source with its integrity."""
    tarball = folder / f"{source.stem}.tgz"
    with tarfile.open(tarball, "w:gz") as archive:
        archive.add(images, f"package/{source.images}/2764-fe0f.png")
        archive.add(images, "package/sheets/all.png")
    digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    return replace(source, integrity=f"sha512-{digest}")


def test_cached_tarballs_are_checked_and_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    draw((64, 64)).save(tmp_path / "heart.png")
    packed = tuple(pack(tmp_path, source, tmp_path / "heart.png") for source in sources.SOURCES)
    monkeypatch.setattr(sources, "SOURCES", packed)
    folder = sources.fetch_packages(tmp_path)
    for source in packed:
        assert list(source.image_files(folder)) == ["2764"]
        assert not (folder / source.stem / "package" / "sheets").exists()

    monkeypatch.setattr(sources, "SOURCES", (replace(packed[0], integrity="sha512-other"),))
    with pytest.raises(UserError, match="delete it"):
        sources.fetch_packages(tmp_path)


def test_tokenizer_reads_as_clip_and_returns_its_text(tmp_path: Path):
    from transformers import CLIPTokenizer

    captions = ["red heart, noto style", "waving hand, medium-light skin tone, fluent style", "eight o'clock"]
    tokenizer.train_tokenizer(captions * 3, tmp_path, vocab_size=560)
    clip = CLIPTokenizer.from_pretrained(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert len(clip) == len(vocab) == 560
    assert (clip.bos_token_id, clip.eos_token_id, clip.pad_token_id) == (558, 559, 559)
    assert clip.model_max_length == 24
    for caption in [*captions, "Über 7 new words 🎉"]:
        ids = clip(caption).input_ids
        assert ids[0] == 558 and ids[-1] == 559 and 559 not in ids[1:-1]
        assert clip.decode(ids, skip_special_tokens=True).replace(" ", "") == caption.lower().replace(" ", "")


def test_tokenizer_is_the_same_every_time(tmp_path: Path):
    captions = (EXAMPLE / "prompts" / "train.txt").read_text().splitlines()
    for run in range(3):
        tokenizer.train_tokenizer(captions, tmp_path / str(run))
    assert len({(tmp_path / str(run) / "merges.txt").read_bytes() for run in range(3)}) == 1


def test_prompts_hold_plain_captions_and_the_grid(tmp_path: Path):
    captions = [*names.GRID_CAPTIONS, "waving hand, dark skin tone, noto style"]
    tones = [""] * len(names.GRID_CAPTIONS) + ["dark skin tone"]
    prompts.write_prompts({"caption": captions, "skin_tone": tones}, tmp_path)
    assert (tmp_path / "train.txt").read_text().splitlines() == sorted(names.GRID_CAPTIONS)
    with pytest.raises(UserError, match="lack"):
        prompts.write_prompts({"caption": captions[1:], "skin_tone": tones[1:]}, tmp_path)


def test_committed_files_agree_with_the_rules():
    from transformers import CLIPTokenizer

    heldout = (EXAMPLE / "heldout_names.txt").read_text().splitlines()
    files = {name: (EXAMPLE / "prompts" / f"{name}.txt").read_text().splitlines() for name in ("train", "eval", "grid")}
    assert len(heldout) == 177 and all(names.is_held_out(name) for name in heldout)
    assert not {caption.rsplit(", ", 1)[0] for caption in files["train"]} & set(heldout)
    assert len(set(files["eval"])) == prompts.EVAL_CAPTIONS and set(files["eval"]) <= set(files["train"])
    assert files["grid"] == list(names.GRID_CAPTIONS) and set(files["grid"]) <= set(files["train"])
    clip = CLIPTokenizer.from_pretrained(EXAMPLE / "tokenizer")
    assert len(clip) == tokenizer.VOCAB_SIZE
    assert max(map(len, clip(files["train"]).input_ids)) <= clip.model_max_length == tokenizer.MODEL_MAX_LENGTH
