"""Make everything that README.md and docs/ say of the emoji models again: python examples/emoji/reproduce.py.

Data, students, evaluations, tables between their markers, and images, each a part of its own. Run again, it goes on
where it stopped: a part whose results are there is left as it is (delete them to repeat it). --dry_run prints the
commands. Needs `pip install -e .[emoji,judge]`, npm, and some 20 hours of 2 CPU cores, most of them for the ablation
and the comparison of methods (--skip=ablation,methods); the teacher is taken as it is.
"""

import dataclasses
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import results_tables
from absl import flags

from configs.emoji_full import GUIDANCE_SCALE, LCM_STEPS_AT_EQUAL_WORK, get_config
from mlcm_jax.cli import run_main
from mlcm_jax.errors import UserError
from mlcm_jax.training.stages import read_stages

ROOT = Path(__file__).resolve().parents[2]
TEACHER = "examples/emoji/teacher"
DEFAULT_GUIDANCE_SCALE = 7.5  # of configs/emoji.py

OUT = flags.DEFINE_string("out", "runs/reproduce", "Folder of all that is made on the way.")
PARTS = flags.DEFINE_list("parts", [], "Names of the parts to make; none: all of them.")
SKIP = flags.DEFINE_list("skip", [], "Names of parts to leave out.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands, and whether their results are there.")


@dataclasses.dataclass(frozen=True)
class Part:
    """A step of the whole. results: what it leaves; commands: argument lists after "python", or functions."""

    name: str
    results: Sequence[Path]
    commands: Sequence[Sequence[str] | Callable[[], None]]

    def is_done(self) -> bool:
        return bool(self.results) and all(result.exists() for result in self.results)


def train(config: str, workdir: Path, *settings: str) -> list[str]:
    return ["launch/train.py", f"--config={config}", f"--workdir={workdir}", *settings]


def features(out: Path) -> str:
    return f"--features=efficientnet={out / 'efficientnet'},clip=examples/emoji/scorer"


def evaluate(out: Path, folder: Path, model: Path, *settings: str) -> list[str]:
    """The measurement of a model against the real images of the first 512 captions of prompts/eval.txt."""
    return [
        "launch/evaluate.py",
        f"--model={model}",
        f"--data={out / 'real.npy'}",
        "--data_matches_prompts",
        features(out),
        "--scorers=clip-guard=examples/emoji/guard",
        f"--out={folder}",
        *settings,
    ]


def against_teacher(guidance_scale: float) -> list[str]:
    return [f"--baseline={TEACHER}", f"--baseline_guidance_scale={guidance_scale}", "--steps=1,2,3,4,8,25"]


def real_images(out: Path, prompts: str, n: int) -> list[str]:
    program = ["examples/emoji/real_images.py", f"--data_dir={out / 'data'}"]
    return [*program, f"--prompts=examples/emoji/prompts/{prompts}.txt", f"--num_images={n}"]


def data_parts(out: Path) -> list[Part]:
    """The data set, what is measured against, LCM's latents, and the feature extractor's weights."""
    real, train_images = out / "real.npy", out / "real_train.npy"
    latents = out / "latents.safetensors"
    convert = ["launch/convert_efficientnet.py", f"--out={out / 'efficientnet'}"]
    encode = ["launch/encode.py", f"--model={TEACHER}", f"--images={train_images}", f"--out={latents}"]
    return [
        Part("data", [out / "data" / "emoji"], [["examples/emoji/build_data.py", f"--data_dir={out / 'data'}"]]),
        Part(
            "images_of_captions",
            [real, train_images],
            [
                [*real_images(out, "eval", 512), f"--out={real}"],
                [*real_images(out, "train", 5153), f"--out={train_images}"],
            ],
        ),
        Part("latents", [latents], [encode]),
        Part("feature_extractor", [out / "efficientnet"], [convert]),
    ]


def default_parts(out: Path) -> list[Part]:
    """`make train`'s student and its measurement."""
    workdir, folder = out / "default", out / "default_eval"
    measured = evaluate(out, folder, workdir / "export", *against_teacher(DEFAULT_GUIDANCE_SCALE))
    return [
        Part("default_student", [workdir / "export"], [train("configs/emoji.py", workdir)]),
        Part("default_evaluation", [folder / "results.json"], [measured]),
    ]


def full_parts(out: Path) -> list[Part]:
    """The shipped student and its measurement."""
    workdir, lora = out / "full", out / "lora"
    export = ["launch/export.py", f"--workdir={workdir}", "--format=lora", f"--out={lora}"]
    measured = evaluate(out, out / "full_eval", workdir / "export", *against_teacher(GUIDANCE_SCALE))
    return [
        Part("student", [workdir / "export", lora], [train("configs/emoji_full.py", workdir), export]),
        Part("shipped", [], [lambda: ship(lora)]),
        Part("full_evaluation", [out / "full_eval" / "results.json"], [measured]),
    ]


def unguided_parts(out: Path) -> list[Part]:
    """The teacher sampled like its student: without guidance, with the same scheduler. It is the untrained student."""
    folder = out / "unguided_eval"
    settings = ["--guidance_scale=1", "--scheduler=LCMScheduler", "--steps=1,2,3,4,8,25", "--diversity_prompts=0"]
    measured = evaluate(out, folder, Path(TEACHER), *settings)
    return [Part("unguided_evaluation", [folder / "results.json"], [measured])]


def ship(lora: Path) -> None:
    """Put the finished LoRA where launch/sample.py finds it. Raises UserError before the part student has made it."""
    if not lora.is_dir():
        raise UserError(f"{lora} is missing: make the part student first.")
    for file in lora.iterdir():
        (ROOT / "examples/emoji/student" / file.name).write_bytes(file.read_bytes())


def stage_parts(out: Path) -> list[Part]:
    """The paper's stages on trajectories, without distribution matching, one after the other."""
    config, workdir, parts = "configs/emoji_full.py:two_segments", out / "two_segments", []
    for number, stage in enumerate(read_stages(get_config("two_segments")), 1):
        student, folder = out / "stages" / str(number), out / "stage_evals" / str(number)
        to_end = train(config, workdir, f"--config.num_steps={stage.end}")
        export = ["launch/export.py", f"--workdir={workdir}", "--format=diffusers", f"--out={student}"]
        measured = evaluate(out, folder, student, "--steps=1,2,4,8", "--diversity_prompts=0")
        parts += [
            Part(f"stage_{number}", [student], [to_end, export]),
            Part(f"stage_{number}_evaluation", [folder / "results.json"], [measured]),
        ]
    return parts


def lcm_parts(out: Path) -> list[Part]:
    """LCM with as much work as the full recipe, which is more examples, and with as many examples."""
    parts = []
    for name, num_steps in {"lcm": LCM_STEPS_AT_EQUAL_WORK, "lcm_equal_examples": get_config().num_steps}.items():
        workdir, folder = out / name, out / f"{name}_eval"
        settings = {"num_steps": num_steps, "guidance_scale": GUIDANCE_SCALE, "latents": out / "latents.safetensors"}
        trained = train("configs/emoji_ablation.py:lcm", workdir, *(f"--config.{k}={v}" for k, v in settings.items()))
        measured = evaluate(out, folder, workdir / "export", "--steps=1,2,4,8", "--diversity_prompts=0")
        parts += [
            Part(name, [workdir / "export"], [trained]),
            Part(f"{name}_evaluation", [folder / "results.json"], [measured]),
        ]
    return parts


def benchmark_parts(out: Path) -> list[Part]:
    """The rows of docs/ablation.md and the methods of docs/methods.md, which their programs write there."""
    return [_benchmark(out, name) for name in ("ablation", "methods")]


def _benchmark(out: Path, name: str) -> Part:
    command = [f"benchmarks/{name}.py", f"--data={out / 'real.npy'}", f"--latents={out / 'latents.safetensors'}"]
    done = out / name / "done"
    return Part(name, [done], [[*command, features(out), f"--out={out / name}", "--docs"], lambda: done.touch()])


def report_parts(out: Path) -> list[Part]:
    """What readers see; made each time, as it takes no time."""
    return [
        Part("tables", [], [lambda: results_tables.write_all(out, ROOT)]),
        Part("images", [], [lambda: copy_images(out)]),
    ]


def copy_images(out: Path) -> None:
    """The grids of docs/."""
    sources = {"emoji": out / "default/samples/final.png", "student": out / "full_eval/grid.png"}
    for name, source in sources.items():
        results_tables.copy_image(source, ROOT / "docs" / f"{name}.png")


def all_parts(out: Path) -> list[Part]:
    """Every part, in order."""
    makers = (
        data_parts,
        default_parts,
        full_parts,
        unguided_parts,
        stage_parts,
        lcm_parts,
        benchmark_parts,
        report_parts,
    )
    return [part for make in makers for part in make(out)]


def chosen_parts(parts: Sequence[Part]) -> list[Part]:
    """Those of --parts without those of --skip; raises UserError for a name that is none."""
    names = [part.name for part in parts]
    if unknown := [name for name in (*PARTS.value, *SKIP.value) if name not in names]:
        raise UserError(f"There is no part {unknown[0]!r}: use some of those that --dry_run lists.")
    return [part for part in parts if part.name in (PARTS.value or names) and part.name not in SKIP.value]


def make(part: Part) -> None:
    """Run a part's commands; raises UserError where one fails."""
    start = time.monotonic()
    for command in part.commands:
        if callable(command):
            command()
            continue
        print("+", shlex.join(["python", *command]), flush=True)
        if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
            raise UserError(f"The part {part.name} failed: read its message above, and run this command again.")
    print(f"== {part.name}: {time.monotonic() - start:.0f} s", flush=True)


def main():
    for part in chosen_parts(all_parts(Path(OUT.value))):
        if DRY_RUN.value:
            print(f"{part.name}: {'done' if part.is_done() else 'to do'}")
            for command in part.commands:
                print("   ", command.__name__ if callable(command) else shlex.join(["python", *command]))
        elif part.is_done():
            print(f"== {part.name}: there already", flush=True)
        else:
            make(part)


if __name__ == "__main__":
    run_main(main)
