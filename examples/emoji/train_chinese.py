"""Train Chinese text encoders: examples/emoji/train_chinese.py --data_dir=DIR --teacher=DIR --workdir=DIR --out=DIR.

They learn, from pairs of captions, to say in Chinese what the teacher's English encoders say: the same pooled state,
and the same state at every token position. Any UNet that was trained with the English ones then draws from Chinese,
and so does any student distilled from it. The causal mask lets a position see only the characters before it, so the
first positions stay guesses; from the end of the Chinese caption on (most of the 24) a position knows all of it.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from batches import Batches
from emoji_dataset.chinese import SPELLINGS, chinese_captions, end_forms, train_chinese_tokenizer
from emoji_dataset.dataset import EmojiSplit, load_split
from recipe import CHINESE, config_flag
from text_states import ENCODERS, TOKENIZERS, EnglishEncoders, in_chunks, spread, states_of, unexplained
from training import run, start

from mlcm_jax import rng
from mlcm_jax.cli import run_main
from mlcm_jax.errors import UserError
from mlcm_jax.hub.load import read_json
from mlcm_jax.hub.pipeline import WEIGHT_FILES, Network
from mlcm_jax.hub.save import save_params
from mlcm_jax.hub.tokenizer import load_tokenizer
from mlcm_jax.models.clip import CLIPTextModel
from mlcm_jax.sampling.conditioning import tokenize

DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that build_data.py wrote.", required=True)
TEACHER = flags.DEFINE_string("teacher", None, "Folder with the English text encoders and tokenizers.", required=True)
WORKDIR = flags.DEFINE_string("workdir", "runs/emoji_chinese", "Checkpoints and metrics.")
OUT = flags.DEFINE_string("out", None, "Folder for the Chinese text encoders and tokenizers.", required=True)
CONFIG = config_flag(CHINESE)


def chinese_network(english: Network, vocab: dict[str, int], key: jax.Array) -> Network:
    """The English encoder with token embeddings for another vocabulary: new ones but for start and end."""
    bos, eos = len(vocab) - 2, len(vocab) - 1
    ids = {"vocab_size": len(vocab), "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}
    config = {**english.config, **ids}
    params = jax.tree.map(jnp.asarray, english.params)
    embedding = params["text_model"]["embeddings"]["token_embedding"]
    old = embedding["embedding"]
    new = jax.random.normal(key, (len(vocab), old.shape[1])) * old.std() + old.mean(axis=0)
    embedding["embedding"] = new.at[bos:].set(old[english.config["bos_token_id"] :])
    return Network(CLIPTextModel.from_config(config), params, config)


def tie(params, row_of: np.ndarray):
    """The parameters with one embedding for a character wherever it stands: row i becomes row ``row_of[i]``."""
    embeddings = params["text_model"]["embeddings"]
    token_embedding = {"embedding": embeddings["token_embedding"]["embedding"][row_of]}
    embeddings = {**embeddings, "token_embedding": token_embedding}
    return {**params, "text_model": {**params["text_model"], "embeddings": embeddings}}


def make_loss(networks: list[Network], row_of: np.ndarray, variance: dict[str, float]):
    def loss_fn(params, batch, key):
        tokens, target = batch
        params = [tie(p, row_of) for p in params]
        errors = unexplained(states_of(networks, params, [tokens, tokens]), target, variance)
        return sum(errors.values()), errors

    return loss_fn


def spelt_tokens(tokenizer, split: EmojiSplit) -> np.ndarray:
    """Token ids [spelling, row, position] of the Chinese captions; raises UserError when one would be cut."""
    captions = [chinese_captions(split, spelling) for spelling in range(len(SPELLINGS))]
    longest = max(len(ids) for some in captions for ids in tokenizer(some, verbose=False).input_ids)
    if longest > tokenizer.model_max_length:
        raise UserError(f"A Chinese caption has {longest} tokens, more than {tokenizer.model_max_length}: shorten it.")
    return np.stack([tokenize(tokenizer, some) for some in captions])


def main():
    config, out = CONFIG.value, Path(OUT.value)
    splits = {split: load_split(DATA_DIR.value, split) for split in ("train", "heldout")}
    train = splits["train"]
    english = EnglishEncoders(Path(TEACHER.value))
    targets = {name: english(split["caption"]) for name, split in splits.items()}
    variance = spread(targets["train"])

    train_chinese_tokenizer(chinese_captions(train), out / TOKENIZERS[0])
    shutil.copytree(out / TOKENIZERS[0], out / TOKENIZERS[1], dirs_exist_ok=True)
    tokenizer, vocab = (
        load_tokenizer(out / TOKENIZERS[0], "CLIPTokenizer"),
        read_json(out / TOKENIZERS[0] / "vocab.json"),
    )
    row_of = np.arange(len(vocab))
    for end, inner in end_forms(vocab).items():
        row_of[end] = inner
    keys = jax.random.split(rng.stream(config.seed, "init", 0))
    chinese = [chinese_network(n, vocab, key) for n, key in zip(english.networks, keys, strict=True)]
    tokens = spelt_tokens(tokenizer, train)
    batches = Batches(train, seed=config.seed, batch_size=config.batch_size)

    def batch(step: int):
        rows = batches.indices(step)
        spelling = np.random.default_rng([config.seed, step, 1]).integers(len(SPELLINGS), size=len(rows))
        return tokens[spelling, rows], jax.tree.map(lambda a: a[rows], targets["train"])

    state, step = start([n.params for n in chinese], make_loss(chinese, row_of, variance), config)
    trained = [tie(p, row_of) for p in run(state, step, batch, config, Path(WORKDIR.value)).ema]
    finished = [Network(n.module, p, n.config) for n, p in zip(chinese, trained, strict=True)]
    for part, network in zip(ENCODERS, finished, strict=True):
        file_name = WEIGHT_FILES["transformers"]
        save_params(network.params, network.config, out / part, file_name=file_name, dtype=jnp.float16)
    for name, split in splits.items():
        rows = tokenize(tokenizer, chinese_captions(split))
        said = in_chunks(lambda t: states_of(finished, [n.params for n in finished], [t, t]), [rows])
        errors = unexplained(said, targets[name], variance)
        print(json.dumps({name: {key: round(float(value), 4) for key, value in errors.items()}}))


if __name__ == "__main__":
    run_main(main)
