"""The documentation: blocks after a marker run, links and paths exist, commands have the flags that they use.

<!-- run --> before a block runs each of its commands, or its Python code, as it stands; only runs/ is put into a
temporary folder. A block without the marker says when it was last run, or which test covers it.
"""

import functools
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
from ml_collections import ConfigDict

from mlcm_jax.config import RENAMED, base

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
LINKED = [*PAGES, *sorted(ROOT.glob("examples/*/*.md"))]
MARKER = "<!-- run -->"
# When a block was run, that it was not, or what runs it: in the text of its section.
STATUS = re.compile(r"20\d\d-\d\d-\d\d|\b[Nn]ot (been )?(run|measured)\b|`tests/|<!-- begin: ")
PROGRAM = re.compile(r"\b(launch|benchmarks|examples/\w+)/\w+\.py\b")
FOLDERS = ("mlcm_jax", "launch", "configs", "docs", "examples", "tests", "benchmarks")
CODE = re.compile(
    r"^```(?P<language>\w*)\n(?P<fenced>[\s\S]*?)^```$|(?:(?<=\n\n)|(?<=-->\n)) {4}\S.*\n(?: {4,}\S.*\n)*", re.M
)
NO_FILES = {"configs/mine.py", "examples/emoji/.cache", "examples/s"}  # made by the reader; a unit


class Block(NamedTuple):
    """Code of a page. section: the text around it, from heading to heading."""

    page: Path
    line: int
    language: str
    code: str
    runs: bool
    section: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """Each command's words; what follows a # is left out."""
        joined = self.code.replace("\\\n", " ") if self.language == "sh" else ""
        return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    """Fenced blocks, and indented ones as commands."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in CODE.finditer(text):
        before = text[: match.start()]
        code = match["fenced"] or re.sub(r"^ {4}", "", match[0], flags=re.M)
        end = text.find("\n#", match.end())
        section = text[max(before.rfind("\n#"), 0) : end if end > 0 else len(text)]
        runs = before.rstrip().endswith(MARKER)
        found.append(Block(page, before.count("\n") + 1, match["language"] or "sh", code, runs, section))
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN = [block for block in BLOCKS if block.runs]


class Runner:
    """Runs commands of the pages, each once. folder: in place of runs/."""

    def __init__(self, launch, folder: Path):
        self.folder, self._launch, self._done = folder, launch, {}

    def __call__(self, words: list[str]) -> None:
        """words: of ``python launch/PROGRAM.py --flag=value``..."""
        python, path, *arguments = words
        program = re.fullmatch(r"launch/(\w+)\.py", path)
        assert program and python in ("python", ".venv/bin/python"), words
        if tuple(words) not in self._done:
            given = [re.sub(r"(?<==)runs/", f"{self.folder}/", word) for word in arguments]
            self._done[tuple(words)] = self._launch(program[1], *given)
        result = self._done[tuple(words)]
        assert result["status"] == 0, result["stderr"]
        written = [word.removeprefix("--out=runs/") for word in words if word.startswith("--out=runs/")]
        assert all((self.folder / path).exists() for path in written), result["stdout"]


@pytest.fixture(scope="module")
def runner(launch, tmp_path_factory):
    """The shipped student, written as docs/formats.md says, is there in place of the one that ``make train`` leaves."""
    run = Runner(launch, tmp_path_factory.mktemp("docs"))
    run(next(words for block in RUN for words in block.commands if "launch/convert.py" in words))
    (run.folder / "emoji").mkdir()
    (run.folder / "emoji" / "export").symlink_to(run.folder / "student")
    return run


@pytest.mark.parametrize("block", [b for b in RUN if b.language == "sh"], ids=str)
def test_commands_run(block, runner):
    for words in block.commands:
        if words[1] == "-c":
            exec(words[2], {})
        else:
            runner(words)


@pytest.mark.parametrize("block", [b for b in RUN if b.language == "python"], ids=str)
def test_python_runs(block, runner, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    exec(compile(block.code.replace('"runs/', f'"{runner.folder}/'), str(block), "exec"), {})


def test_blocks_run():
    """The marker is not lost when pages are rewritten."""
    assert len(RUN) >= 7 and {"sh", "python"} == {block.language for block in RUN}


@pytest.mark.parametrize("block", [b for b in BLOCKS if PROGRAM.search(b.code)], ids=str)
def test_a_block_that_is_not_run_says_when_it_was(block):
    assert block.runs or STATUS.search(block.section), f"{block}: put {MARKER} before it, or say when it was last run"


@functools.cache
def flags_of(program: str) -> set[str]:
    """The names of the absl or argparse flags in a program and in the modules that bring flags along."""
    shared = ("mlcm_jax/cli.py", "mlcm_jax/model_flags.py", "mlcm_jax/size_flags.py", "benchmarks/options.py")
    text = "".join((ROOT / name).read_text() for name in (program, *shared))
    return set(re.findall(r'(?:DEFINE_\w+|add_argument)\(\s*"(?:--)?(\w+)"', text))


@pytest.mark.parametrize("block", [b for b in BLOCKS if PROGRAM.search(b.code)], ids=str)
def test_flags_and_settings_exist(block):
    known = base()
    for words in block.commands:
        program = next((word for word in words if PROGRAM.fullmatch(word)), None)
        for word in words[words.index(program) + 1 :] if program else []:
            name = word.removeprefix("--").partition("=")[0]
            if not word.startswith("--") or word == "--":
                continue
            if name.startswith("config."):
                assert_setting(known, name.removeprefix("config."))
            elif "config" not in (name, name.removeprefix("no")):
                assert {name, name.removeprefix("no")} & flags_of(program), f"{program} has no flag --{name}"


def assert_setting(config: ConfigDict, name: str) -> None:
    assert name not in RENAMED, f"{name} is now {RENAMED[name]}"
    for part in name.split("."):
        assert part in config, f"config.{name} does not exist"
        config = config[part]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    for target in targets:
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name}: no heading #{anchor} in {linked.name}"
    named = re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w", text)
    missing = {path for path in named if path not in NO_FILES and not (ROOT / path).exists()}
    short = {path for path in re.findall(r"`([\w/]+/\w+\.py)`", text) if path.split("/")[0] not in FOLDERS}
    missing |= {path for path in short if not (ROOT / "mlcm_jax" / path).is_file()}
    assert not missing, f"{page.name} names {', '.join(sorted(missing))}"


def test_pages_that_code_names_exist():
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    named = {
        (page, file) for file in files for page in re.findall(r"docs/[\w.-]+?\.md", file.read_text(encoding="utf-8"))
    }
    missing = {f"{page} in {file.relative_to(ROOT)}" for page, file in named if not (ROOT / page).is_file()}
    assert named and not missing, missing


@functools.cache
def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_former_settings_are_not_used(page):
    text = page.read_text(encoding="utf-8")
    former = [name for name in RENAMED if re.search(rf"\b{re.escape(name)}\b", text)]
    assert not former, f"{page.name} uses former names: {', '.join(former)}"


def test_the_configuration_page_lists_every_setting():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    missing = [name for name in base() if f"`{name}`" not in text]
    assert not missing, missing


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
