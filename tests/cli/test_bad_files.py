"""Bad files: text, checkpoints, tokenizers, and disks that are full or cannot be written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_btx.recipe import run_plan
from megatron_btx.recipe.load import load_recipe
from tests.bad import RUN, Bad, Commands, both, change
from tests.small import Exported, environ

TEXT = '{"text": "one two three"}\n'


def write(name: str, content: bytes) -> Callable[[Path], None]:
    """A data file with other content."""
    return lambda directory: (directory / "data" / name).write_bytes(content) and None


DATA = [
    Bad(
        "missing file",
        lambda directory: (directory / "data" / "math.jsonl").unlink(),
        ("domains.math.train", "data/math.jsonl does not exist", "correct the path"),
        RUN,
    ),
    Bad(
        "empty file",
        write("math.jsonl", b""),
        ("domains.math.train", "data/math.jsonl is empty", "fix:"),
        RUN,
    ),
    Bad(
        "blank lines only",
        write("math.jsonl", b"\n\n"),
        ("data/math.jsonl", "holds no document", "fix:"),
        RUN,
    ),
    Bad(
        "directory without JSONL",
        both(
            lambda directory: (directory / "texts").mkdir(),
            lambda directory: (directory / "texts" / "a.txt").write_text("a") and None,
            change("train: data/math.jsonl", "train: texts"),
        ),
        ("domains.math.train", "contains files of an unsupported type: a.txt", "fix:"),
        RUN,
    ),
    Bad(
        "not UTF-8",
        write("math.jsonl", TEXT.encode() + '{"text": "Zoë"}\n'.encode("latin-1")),
        ("data/math.jsonl:2", "is not UTF-8", "iconv"),
        RUN,
    ),
    Bad(
        "a line that is not JSON",
        write("math.jsonl", (TEXT + "one two\n").encode()),
        ("data/math.jsonl:2", "is not a JSON object", 'write one object a line: {"text": "..."}'),
        RUN,
    ),
    Bad(
        "a line that is no object",
        write("math.jsonl", (TEXT + TEXT + '["one"]\n').encode()),
        ("data/math.jsonl:3", "is a JSON list, not an object", "write one object a line"),
        RUN,
    ),
    Bad(
        "an object without text",
        write("web.jsonl", b'{"body": "one"}\n'),
        ("data/web.jsonl:1", "has no text under 'text'", "its keys: body", "text_key"),
        RUN,
    ),
    Bad(
        "text that is a number",
        write("web.jsonl", b'{"text": 1}\n'),
        ("data/web.jsonl:1", "has no text under 'text' (its type is int)", "fix:"),
        RUN,
    ),
]


@pytest.mark.parametrize("bad", DATA, ids=lambda bad: bad.name)
def test_bad_text(bad: Bad, small: Commands) -> None:
    small.refuse(bad)


def checkpoint(exported: Exported, directory: Path) -> Path:
    """A copy of the seed's checkpoint, to be damaged."""
    (source,) = (exported.run_dir / "seed" / "checkpoints").iterdir()
    return Path(shutil.copytree(source, directory / "given" / source.name))


def cut(pattern: str, size: int) -> Callable[[Path], None]:
    """Files of a checkpoint cut off after ``size`` bytes."""

    def edit(given: Path) -> None:
        for path in given.glob(pattern):
            os.truncate(path, size)

    return edit


def remove(name: str) -> Callable[[Path], None]:
    """A checkpoint without some of its files."""

    def edit(given: Path) -> None:
        for path in given.glob(name):
            path.unlink() if path.is_file() else shutil.rmtree(path)

    return edit


CHECKPOINTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing": (shutil.rmtree, ("does not exist", "correct the path")),
    "without manifest": (remove("manifest.json"), ("has no manifest.json", "fix: give")),
    "without metadata": (remove(".metadata"), ("is incomplete", "copy the checkpoint again")),
    "manifest cut off": (cut("manifest.json", 40), ("manifest.json: is damaged", "fix:")),
    "data cut off": (cut("*.distcp", 5000), (".distcp", "fix:")),
    "data missing": (remove("__0_0.distcp"), ("__0_0.distcp", "fix:")),
    "metadata cut off": (cut(".metadata", 50), (".metadata", "fix:")),
    "without its tokenizer": (
        remove("tokenizer"),
        ("comes without its tokenizer", "give the tokenizer"),
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_bad_checkpoint(case: str, exported: Exported, small: Commands) -> None:
    given = checkpoint(exported, small.directory)
    edit, words = CHECKPOINTS[case]
    seed = change("seed: {tokens: 6144, data: {web: 1}}", f"seed: {{from: {given}}}")
    recipe = both(lambda _: edit(given), seed, change("{vocab_size: 400}", "{}"))
    small.refuse(Bad(case, recipe, words, RUN))


def test_a_checkpoint_of_another_shape(exported: Exported, small: Commands) -> None:
    given = checkpoint(exported, small.directory)
    seed = change("seed: {tokens: 6144, data: {web: 1}}", f"seed: {{from: {given}}}")
    edit = both(seed, change("hidden_size: 32", "hidden_size: 64"))
    words = ("seed.from", "hidden_size: 32 there, 64 here", "change `model:`")
    small.refuse(Bad("seed", edit, words, RUN))


def test_an_expert_of_another_shape(exported: Exported, small: Commands) -> None:
    given = checkpoint(exported, small.directory)
    tokenizer = exported.run_dir / "prepare" / "tokenizer"
    edit = both(
        change("tokenizer: {vocab_size: 400}", f"tokenizer: {{path: {tokenizer}}}"),
        change("math: {tokens: 2048, data: {math: 0.9, web: 0.1}}", f"math: {{from: {given}}}"),
        change("num_layers: 2", "num_layers: 4"),
    )
    words = ("experts.math.from", "num_layers: 2 there, 4 here", "change `model:`")
    small.refuse(Bad("expert", edit, words, RUN))


def test_an_expert_with_a_tokenizer_of_its_own(exported: Exported, small: Commands) -> None:
    given = checkpoint(exported, small.directory)
    edit = change("math: {tokens: 2048, data: {math: 0.9, web: 0.1}}", f"math: {{from: {given}}}")
    words = ("experts.math.from", "has a tokenizer of its own", "`seed: {from: ...}`")
    small.refuse(Bad("expert", edit, words, RUN))


def test_a_tokenizer_larger_than_the_vocabulary(exported: Exported, small: Commands) -> None:
    tokenizer = exported.run_dir / "prepare" / "tokenizer" / "tokenizer.model"
    edit = change("{vocab_size: 400}", f"{{vocab_size: 300, path: {tokenizer}}}")
    words = ("tokenizer.vocab_size", "has 400 tokens, the vocabulary 300", "set `vocab_size: 400`")
    small.refuse(Bad("vocabulary", edit, words, RUN))


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        ("path: data/web.jsonl", ("data/web.jsonl: is not a SentencePiece model", "spm_train")),
        ("path: data/web.jsonl, type: huggingface", ("data/web.jsonl: is no tokenizer.json",)),
        ("path: config.json", ("config.json: is no tokenizer.json", "or a directory with one")),
        ("path: hub", ("hub/tokenizer.json: is not a tokenizer: expected",)),
    ],
)
def test_a_tokenizer_that_is_none(small: Commands, tokenizer: str, words: tuple[str, ...]) -> None:
    """One error, of the key that names the file."""
    (small.directory / "hub").mkdir()
    for name in ("hub/tokenizer.json", "config.json"):
        (small.directory / name).write_text('{"model_type": "llama"}')
    edit = change("{vocab_size: 400}", f"{{{tokenizer}}}")
    named = (f"error: tokenizer.path: {small.directory}/{words[0]}", *words[1:], "fix: ")
    small.refuse(Bad("tokenizer", edit, named, RUN))


def test_the_disk_is_known_to_be_too_small(disk: Callable[[str], Path], small: Commands) -> None:
    """It would hold what is left in the end, but not what is there on the way."""
    made = run_plan.plan(load_recipe(small.directory / "recipe.yaml"))
    where = disk(f"size={(made.total_disk_bytes + made.peak_disk_bytes) // 2}")
    edit = change("name: small", f"name: small\nrun_dir: {where}/run")
    words = (f"{where}/run", "no space left for the rest", "free some, give another `run_dir:`")
    small.refuse(Bad("small disk", edit, words, RUN))


@pytest.mark.parametrize("left", [0, 60_000])
def test_no_space_left_on_the_way(left: int, disk: Callable[[str], Path], small: Commands) -> None:
    """The disk fills up behind the check, at once or while text is tokenized; with room again, the
    run goes through."""
    where = disk("size=20m")
    change("name: small", f"name: small\nrun_dir: {where}/run")(small.directory)
    filler = small.directory / "fill.py"
    filler.write_text(
        "import os, sys\n"
        "from megatron_btx.cli.main import main\n"
        "from megatron_btx.pipeline import run_checks\n"
        "check = run_checks.check\n"
        "def full(*arguments):\n"
        "    check(*arguments)\n"
        f"    with open({str(where / 'fill')!r}, 'wb') as file:\n"
        f"        free = os.statvfs({str(where)!r})\n"
        f"        file.write(bytes(free.f_bavail * free.f_frsize - {left}))\n"
        "run_checks.check = full\n"
        "sys.exit(main(['run', 'recipe.yaml']))\n"
    )
    done = subprocess.run(
        [sys.executable, "fill.py"],
        cwd=small.directory,
        env=environ(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2, done.stderr
    assert "no space left on" in done.stderr
    assert str(where / "run") in done.stderr
    assert "fix: free some" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(where) == ["fill"]


def test_a_disk_that_cannot_be_written(disk: Callable[[str], Path], small: Commands) -> None:
    where = disk("size=10m,ro")
    edit = change("name: small", f"name: small\nrun_dir: {where}/run")
    words = (f"{where}/run", "read-only file system", "make it writable")
    small.refuse(Bad("read-only", edit, words, RUN))


@pytest.mark.parametrize("run_dir", ["taken", "taken/under/it"])
def test_a_run_dir_that_is_a_file(run_dir: str, small: Commands) -> None:
    (small.directory / "taken").write_text("")
    edit = change("name: small", f"name: small\nrun_dir: {run_dir}")
    small.refuse(Bad("file", edit, ("taken", "is not a directory", "run_dir:"), RUN))
