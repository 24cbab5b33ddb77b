"""Chinese captions, made-up ones, their tokenizers, and the shipped Chinese text encoders against the English ones."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import load_pipeline
from mlcm_jax.hub.text import with_text
from mlcm_jax.hub.tokenizer import load_tokenizer
from mlcm_jax.sampling.conditioning import encode_prompts

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "emoji"
sys.path.insert(0, str(EXAMPLE))

from chinese_pairs import Captions, PairBatches  # noqa: E402
from emoji_dataset import chinese, phrases, tokenizer  # noqa: E402
from recipe import MADE_UP, NUM_MADE_UP, PEA  # noqa: E402

# Mean squared error of the outputs, as a part of their variance over the captions, that the shipped encoders stay below
# on training captions; the model card has 0.16 and 0.04.
UNEXPLAINED = {"hidden_states": 0.2, "pooled": 0.06}


def prompt_lines(name: str) -> list[str]:
    return (EXAMPLE / "prompts" / f"{name}.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("row", "spelling", "expected"),
    [
        (("red heart", "", "noto"), 0, "红心, noto 风格"),
        (("flag of japan", "", "fluent"), 0, "日本国旗, fluent 风格"),
        (("waving hand", "light skin tone", "twemoji"), 1, "挥手\uff0c浅肤色\uff0ctwemoji 风格"),
        (("waving hand", "light skin tone and dark skin tone", "noto"), 3, "挥手, 浅肤色和深肤色, noto风格"),
    ],
)
def test_captions(row, spelling, expected):
    assert chinese.chinese_caption(chinese.chinese_names(), *row, spelling) == expected


def test_a_name_without_chinese():
    with pytest.raises(UserError, match="'new thing' has no Chinese name"):
        chinese.chinese_caption(chinese.chinese_names(), "new thing", "", "noto")


def test_every_name_has_its_own_chinese():
    known = chinese.chinese_names()
    used = {caption.rsplit(", ", 1)[0] for caption in prompt_lines("train")}
    used |= set((EXAMPLE / "heldout_names.txt").read_text().splitlines())
    assert len({known[name] for name in used}) == len(used) > 1800


def test_prompt_files_are_parallel():
    for name in ("train", "eval", "grid"):
        english, translated = prompt_lines(name), prompt_lines(f"chinese/{name}")
        assert len(english) == len(translated)
        known = chinese.chinese_names()
        for caption, line in zip(english, translated, strict=True):
            thing, style = caption.removesuffix(" style").rsplit(", ", 1)
            assert chinese.chinese_caption(known, thing, "", style) == line


def test_tokenizer_makes_one_token_of_a_known_character_and_spells_the_others(tmp_path):
    from transformers import CLIPTokenizer

    chinese.train_chinese_tokenizer(["红心, noto 风格", "日本国旗"], tmp_path)
    clip = CLIPTokenizer.from_pretrained(tmp_path)
    assert clip.model_max_length == tokenizer.MODEL_MAX_LENGTH
    inner = chinese.end_forms(clip.get_vocab())
    ids = [inner.get(i, i) for i in clip("红心红").input_ids[1:-1]]
    assert len(ids) == 3 and ids[0] == ids[2] != ids[1]
    assert len(clip("红心, noto 风格").input_ids) == len(clip("红心\uff0cnoto风格").input_ids) == 2 + 6
    assert len(clip("笑").input_ids) == 2 + len("笑".encode())
    for text in ("红心, noto 风格", "笑红心 2"):
        assert clip.decode(clip(text).input_ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


NAMES = {
    "flag of japan": "日本国旗",
    "flag of peru": "秘鲁国旗",
    "red heart": "红心",
    "blue heart": "蓝心",
    "red square": "红色方块",
    "blue square": "蓝色方块",
    "pizza": "披萨",
}


def test_phrases_of_names():
    pairs = phrases.phrase_pairs(NAMES)
    expected = {
        ("japan", "日本"),
        ("heart", "心"),
        ("red", "红"),
        ("blue", "蓝"),
        ("pizza", "披萨"),
    }
    assert expected <= {(english, chinese.removesuffix("色")) for english, chinese in pairs}
    assert not {english for english, _ in pairs} & {"of", "flag", "of japan"}
    assert pairs == phrases.phrase_pairs(dict(NAMES))


def test_new_names_are_made_of_the_given_ones_and_never_those_that_are_held_out():
    never = ("blue pizza", "蓝披萨", "flag of pizza", "披萨国旗")
    for held_out in ((), never):
        new_name, generator = phrases.NewNames(NAMES, held_out), np.random.default_rng(0)
        made = {new_name(generator) for _ in range(3000)}
        joining = set("的有和")
        assert all(set(chinese) <= set("".join(NAMES.values())) | joining for _, chinese in made)
        assert len(made - set(NAMES.items())) > 100
        found = {text for name in made for text in name} & set(never)
        assert found == (set() if held_out else set(never)) and ("pizza heart", "披萨心") in made


def test_bert_tokenizer(tmp_path):
    first = chinese.write_bert_tokenizer(["红心, noto 风格", "日本国旗"], tmp_path)
    bert = load_tokenizer(tmp_path, "BertTokenizer")
    spelt = bert(["红心, noto 风格", "红心, noto风格", "红心\uff0cnoto 风格", "红笑OK"])["input_ids"]
    assert spelt[0] == spelt[1] and len(spelt[0]) == 2 + 6
    assert [a == b for a, b in zip(spelt[0], spelt[2], strict=True)].count(False) == 1
    assert bert.convert_ids_to_tokens(spelt[3]) == ["[CLS]", "红", "[UNK]", "o", "##k", "[SEP]"]
    assert (
        len(bert) == first + len(set("红心风格日本国旗")) and min(bert.convert_tokens_to_ids(list("红心风格"))) >= first
    )


def test_batches_hold_made_up_captions_and_no_held_out_name(tmp_path):
    known = chinese.chinese_names()
    held_out = (EXAMPLE / "heldout_names.txt").read_text().splitlines()
    names = [line.rsplit(", ", 1)[0] for line in prompt_lines("train")][:120:2]
    train = {"name": names, "skin_tone": [""] * len(names), "style": ["noto"] * len(names)}
    train["caption"] = [f"{name}, noto style" for name in names]
    captions = Captions({"train": train, "heldout": {"name": held_out}}, seed=0)
    assert len(captions.english) == len(captions.parts) == len(names) + NUM_MADE_UP
    assert not {name for name, _, _ in captions.parts} & {known[name] for name in held_out}
    assert not {caption.rsplit(", ", 1)[0] for caption in captions.english} & set(held_out)

    chinese.write_bert_tokenizer([known[name] for name in names] + ["风格的有和"], tmp_path)
    bert, states = load_tokenizer(tmp_path, "BertTokenizer"), {"pooled": np.arange(len(captions.english))}
    batches = PairBatches(train, captions, bert, states, PEA)
    tokens, said = batches(3)
    made_up = said["pooled"] >= len(names)
    assert tokens.shape == (PEA.batch_size, bert.model_max_length) and made_up.sum() == round(PEA.batch_size * MADE_UP)
    for row, ids in zip(said["pooled"], tokens, strict=True):
        name, _, style = captions.parts[row]
        text = bert.decode(ids, skip_special_tokens=True).replace(" ", "")
        assert text.startswith(name.replace(" ", "").lower()) and f"{style}风格" in text
    np.testing.assert_array_equal(tokens, batches(3)[0])
    assert not (said["pooled"] == batches(4)[1]["pooled"]).all()


@pytest.fixture(scope="module")
def pipelines():
    """The teacher as it is, and with the Chinese text encoders."""
    english = load_pipeline(EXAMPLE / "teacher")
    return english, with_text(english, EXAMPLE / "chinese")


@pytest.fixture(scope="module")
def conditionings(pipelines):
    """English and Chinese conditioning of the first 128 captions of eval.txt."""
    prompts = [prompt_lines(name)[:128] for name in ("eval", "chinese/eval")]
    return [jax.device_get(encode_prompts(p, lines, 64)) for p, lines in zip(pipelines, prompts, strict=True)]


@pytest.mark.parametrize("part", UNEXPLAINED)
def test_the_shipped_encoders_say_what_the_english_ones_say(conditionings, part):
    english, translated = (np.asarray(getattr(c, part), np.float32) for c in conditionings)
    variance = english.var(axis=0).mean()
    assert english.shape == translated.shape
    assert np.square(english - translated).mean() < UNEXPLAINED[part] * variance
    assert np.square(english - np.roll(translated, 1, axis=0)).mean() > variance


def test_every_spelling_is_understood(pipelines):
    english, translated = pipelines
    target = encode_prompts(english, ["red heart, noto style"], 64).pooled[0]
    spelt = ["红心, noto 风格", "红心\uff0cnoto 风格", "红心\uff0cnoto风格", "红心, noto风格"]
    for pooled in encode_prompts(translated, spelt, 64).pooled:
        assert np.linalg.norm(pooled - target) < 0.5 * np.linalg.norm(target)


def test_transformers_reads_the_shipped_encoders(conditionings):
    import torch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder = EXAMPLE / "chinese"
    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    outputs = []
    for part, torch_class in classes.items():
        clip = CLIPTokenizer.from_pretrained(folder / part.replace("text_encoder", "tokenizer"))
        assert len(clip) == clip.eos_token_id + 1
        tokens = clip(prompt_lines("chinese/eval")[:4], padding="max_length", truncation=True, return_tensors="pt")
        model = torch_class.from_pretrained(folder / part, torch_dtype=torch.float32)
        with torch.no_grad():
            outputs.append(model(tokens.input_ids, output_hidden_states=True))
    states = torch.cat([out.hidden_states[-2] for out in outputs], dim=-1).numpy()
    np.testing.assert_allclose(conditionings[1].hidden_states[:4], states, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(conditionings[1].pooled[:4], outputs[1].text_embeds.numpy(), atol=1e-4, rtol=1e-4)


def test_the_shipped_folder_is_small_and_holds_no_held_out_name():
    files = [file for file in (EXAMPLE / "chinese").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 15e6
    known = chinese.chinese_names()
    held_out = {known[name] for name in (EXAMPLE / "heldout_names.txt").read_text().splitlines()}
    assert not held_out & {caption.rsplit(", ", 1)[0] for caption in prompt_lines("chinese/train")}
