"""Train a Chinese text tower with an adapter: train_pea.py --data_dir=DIR --workdir=DIR --out=DIR.

PEA-Diffusion (arXiv 2311.17086) in small: the UNet stays as it is, and one tower with an adapter stands for both
English text encoders. They are the teacher: the adapter learns to say for a Chinese caption what they say for the
English one, at every token position and pooled. The paper has a published tower, which stays as it is, and compares
the UNet's features; here the tower learns, too, and no UNet is needed.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from chinese_pairs import Captions, PairBatches
from emoji_dataset.chinese import chinese_captions, write_bert_tokenizer
from emoji_dataset.dataset import load_split
from recipe import PEA, PEA_ADAPTER_CONFIG, PEA_BLURRED, PEA_TEXT_CONFIG, TEXT_CONFIG, config_flag
from text_states import EnglishEncoders, TextStates, in_chunks, spread, unexplained
from training import run, start

from mlcm_jax import rng
from mlcm_jax.cli import run_main
from mlcm_jax.hub.pipeline import WEIGHT_FILES
from mlcm_jax.hub.save import save_params
from mlcm_jax.hub.text import ADAPTER
from mlcm_jax.hub.tokenizer import load_tokenizer
from mlcm_jax.models.chinese_clip import AdaptedTextModel, ChineseCLIPTextModel, TextAdapter
from mlcm_jax.outputs import check_folder
from mlcm_jax.sampling.conditioning import tokenize

HERE = Path(__file__).resolve().parent
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that build_data.py wrote.", required=True)
TEACHER = flags.DEFINE_string("teacher", str(HERE / "teacher"), "Folder with the English text encoders and tokenizers.")
WORKDIR = flags.DEFINE_string("workdir", "runs/emoji_pea", "Checkpoints and metrics.")
OUT = flags.DEFINE_string("out", None, "Folder for the tower, the adapter and the tokenizer.", required=True)
CONFIG = config_flag(PEA)


def states_of(module: AdaptedTextModel, params, tokens) -> TextStates:
    """The adapter's outputs by the names of the English encoders' that they stand for."""
    out, first = module.apply({"params": params}, tokens), TEXT_CONFIG["hidden_size"]
    return {"states_1": out.penultimate[..., :first], "states_2": out.penultimate[..., first:], "pooled": out.pooled}


def make_loss(module: AdaptedTextModel, unknown: int, first_character: int, variance: dict[str, float]):
    """Error of the states, each as a part of its variance over captions.

    A part of the Chinese characters, whose ids begin with ``first_character``, is ``unknown``, so that the others tell.
    """

    def loss_fn(params, batch, key):
        tokens, target = batch
        blurred = jax.random.bernoulli(key, PEA_BLURRED, tokens.shape) & (tokens >= first_character)
        states = states_of(module, params, jnp.where(blurred, unknown, tokens))
        errors = unexplained(states, target, variance)
        return sum(errors.values()), errors

    return loss_fn


def main():
    config, out = CONFIG.value, Path(OUT.value)
    check_folder("out", out)
    splits = {split: load_split(DATA_DIR.value, split) for split in ("train", "heldout")}
    english, captions = EnglishEncoders(Path(TEACHER.value)), Captions(splits, config.seed)
    states = english(captions.english)
    train_states = {name: value[: len(splits["train"]["caption"])] for name, value in states.items()}
    variance = spread(train_states)

    first_character = write_bert_tokenizer(chinese_captions(splits["train"]), out / "tokenizer")
    tokenizer = load_tokenizer(out / "tokenizer", "BertTokenizer")
    text_config = {**PEA_TEXT_CONFIG, "vocab_size": len(tokenizer)}
    module = AdaptedTextModel(
        ChineseCLIPTextModel.from_config(text_config), TextAdapter.from_config(PEA_ADAPTER_CONFIG)
    )
    first = module.init(rng.stream(config.seed, "init", 0), jnp.zeros((1, module.num_tokens), jnp.int32))["params"]
    state, step = start(first, make_loss(module, tokenizer.unk_token_id, first_character, variance), config)
    batches = PairBatches(splits["train"], captions, tokenizer, states, config)
    params = run(state, step, batches, config, Path(WORKDIR.value)).ema

    kinds = WEIGHT_FILES["transformers"], WEIGHT_FILES["diffusers"]
    save_params(params["tower"], text_config, out / "text_encoder", file_name=kinds[0], dtype=jnp.float16)
    save_params(params["adapter"], PEA_ADAPTER_CONFIG, out / ADAPTER, file_name=kinds[1], dtype=jnp.float16)
    for name, split in splits.items():
        target = train_states if name == "train" else english(split["caption"])
        said = in_chunks(lambda t: states_of(module, params, t), [tokenize(tokenizer, chinese_captions(split))])
        errors = unexplained(said, target, variance)
        print(json.dumps({name: {key: round(float(value), 4) for key, value in errors.items()}}))


if __name__ == "__main__":
    run_main(main)
