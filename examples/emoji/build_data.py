"""Fetch the emoji packages, build the data set, and write the captions, the held-out names and the tokenizer.

python examples/emoji/build_data.py --data_dir=DATA
"""

from collections import Counter
from pathlib import Path

from absl import flags
from emoji_dataset import chinese, dataset, names, prompts, sources, tokenizer

from mlcm_jax.cli import run_main
from mlcm_jax.errors import UserError

HERE = Path(__file__).resolve().parent

_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that the data set is written to.", required=True)
_CACHE_DIR = flags.DEFINE_string("cache_dir", str(HERE / ".cache"), "Folder of the downloaded npm packages.")
_OUT_DIR = flags.DEFINE_string("out_dir", str(HERE), "Folder of prompts/, tokenizer/ and heldout_names.txt.")


def build_all(data_dir: Path, cache_dir: Path, out_dir: Path) -> None:
    """Do every step, from the download to the tokenizer, and print what was made."""
    packages_dir = sources.fetch_packages(cache_dir)
    dataset.build(data_dir, packages_dir)
    splits = {split: dataset.load_split(data_dir, split) for split in dataset.SPLITS}

    prompts.write_lines(out_dir / "heldout_names.txt", sorted(set(splits["heldout"]["name"])))
    prompts.write_prompts(splits["train"], out_dir / "prompts")
    chinese.write_chinese_prompts(splits["train"], out_dir / "prompts")
    tokenizer.train_tokenizer(splits["train"]["caption"], out_dir / "tokenizer")
    captions = [caption for split in splits.values() for caption in split["caption"]]
    length = tokenizer.longest(captions, out_dir / "tokenizer")
    if length > tokenizer.MODEL_MAX_LENGTH:
        raise UserError(f"A caption has {length} tokens: raise MODEL_MAX_LENGTH from {tokenizer.MODEL_MAX_LENGTH}.")

    emojis = names.read_emojis(sources.names_file(packages_dir))
    official = sum(one.from_fallback for one in emojis)
    print(f"names: {len({one.name for one in emojis})}; images named by emoji.json instead of CLDR: {official}")
    for split, rows in splits.items():
        counts = Counter(rows["style"])
        styles = ", ".join(f"{style} {counts[style]}" for style in sources.STYLES)
        print(f"{split}: {len(rows['caption'])} images ({styles}), {len(set(rows['name']))} names")
    print(f"longest caption: {length} tokens of {tokenizer.MODEL_MAX_LENGTH}")


def main():
    build_all(*(Path(flag.value).expanduser() for flag in (_DATA_DIR, _CACHE_DIR, _OUT_DIR)))


if __name__ == "__main__":
    run_main(main)
