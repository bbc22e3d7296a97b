"""Bad input through the real command line: one clear error that names file, key and fix, exit code
2, and nothing left behind: the tree before and after is the same, byte for byte."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.small import Exported, btx, environ, tree_hash, write_small

TEXT = '{"text": "one two three"}\n'


def change(old: str, new: str) -> Callable[[Path], None]:
    """The recipe with ``new`` in place of ``old``."""

    def edit(directory: Path) -> None:
        recipe = directory / "recipe.yaml"
        text = recipe.read_text()
        assert old in text
        recipe.write_text(text.replace(old, new, 1))

    return edit


def write(name: str, content: bytes) -> Callable[[Path], None]:
    """A data file with other content."""
    return lambda directory: (directory / "data" / name).write_bytes(content) and None


def both(*edits: Callable[[Path], None]) -> Callable[[Path], None]:
    """One after the other."""

    def edit(directory: Path) -> None:
        for one in edits:
            one(directory)

    return edit


@dataclass(frozen=True)
class Bad:
    """A mistake, and what the error about it must say."""

    name: str
    edit: Callable[[Path], None]
    words: tuple[str, ...]
    """File or key, what is wrong, and how to mend it."""
    command: tuple[str, ...] = ("plan", "recipe.yaml")
    environment: dict[str, str] = field(default_factory=dict)


RUN = ("run", "recipe.yaml")
FINETUNE = "finetune: {tokens: 2048, data: {math: 1, web: 1}"
LAYOUT = FINETUNE + ", layout: "

KEYS = [
    Bad(
        "unknown key",
        change("experts:\n", "colour: red\nexperts:\n"),
        ("recipe.yaml:", "colour", "is not a key", "the keys here are: name, run_dir"),
    ),
    Bad(
        "misspelt key",
        change("hidden_size: 32", "hiden_size: 32"),
        ("recipe.yaml:", "model.hiden_size", "did you mean `hidden_size`?"),
    ),
    Bad(
        "key of another block",
        change("lr: 2e-3", "lr: 2e-3\n  num_layers: 3"),
        ("recipe.yaml:", "training.num_layers", "it belongs in `model.num_layers`"),
    ),
    Bad(
        "misspelt key of Megatron's",
        change(FINETUNE, FINETUNE + ", megatron: {transformer: {recompute_granularty: full}}"),
        ("recipe.yaml:", "recompute_granularty", "recompute_granularity"),
    ),
    Bad(
        "misspelt domain in a mixture",
        change("data: {web: 1}", "data: {wab: 1}"),
        ("recipe.yaml:", "seed.data.wab", "there is no domain wab", "did you mean `web`?"),
    ),
    Bad(
        "no YAML",
        change("model:", "model: {"),
        ("recipe.yaml", "YAML"),
    ),
    Bad(
        "no such recipe",
        lambda directory: (directory / "recipe.yaml").unlink(),
        ("recipe.yaml", "there is no such file", "give the path of a recipe"),
    ),
]

VALUES = [
    Bad(
        "text for a number",
        change("num_layers: 2", "num_layers: many"),
        ("recipe.yaml:", "model.num_layers", "'many', not a whole number", "fix: give"),
    ),
    Bad(
        "fraction for a count",
        change("num_layers: 2", "num_layers: 2.5"),
        ("recipe.yaml:", "model.num_layers", "2.5, not a whole number"),
    ),
    Bad(
        "word outside the choice",
        change("precision: fp32", "precision: fp16"),
        ("recipe.yaml:", "precision", "'fp16'", "choose fp32 or bf16"),
    ),
    Bad(
        "list for a block",
        change("seed: {tokens: 6144, data: {web: 1}}", "seed: [1, 2]"),
        ("recipe.yaml:", "seed", "is a list, not a block"),
    ),
    Bad(
        "negative learning rate",
        change("lr: 2e-3", "lr: -1"),
        ("recipe.yaml:", "lr", "out of range", "fix: give"),
    ),
    Bad(
        "no layers",
        change("num_layers: 2", "num_layers: 0"),
        ("recipe.yaml:", "model.num_layers", "is 0, out of range", "give at least 1"),
    ),
]

DIVISIONS = [
    Bad(
        "batch",
        change("global_batch_size: 8", "global_batch_size: 9"),
        ("recipe.yaml:", "global_batch_size", "9 is not divisible", "use a multiple of 4"),
    ),
    Bad(
        "batch by the layout",
        change("{tokens: 6144,", "{tokens: 6144, layout: {data_parallel_size: 3},"),
        ("recipe.yaml:", "global_batch_size", "(4 x 3)", "use a multiple of 12"),
    ),
    Bad(
        "heads",
        change("{tokens: 6144,", "{tokens: 6144, layout: {tensor_model_parallel_size: 8},"),
        ("recipe.yaml:", "seed.layout.tensor_model_parallel_size", "num_attention_heads (4)"),
    ),
    Bad(
        "FFN",
        both(
            change("ffn_hidden_size: 64", "ffn_hidden_size: 63"),
            change("{tokens: 6144,", "{tokens: 6144, layout: {tensor_model_parallel_size: 2},"),
        ),
        ("recipe.yaml:", "seed.layout.tensor_model_parallel_size", "model.ffn_hidden_size (63)"),
    ),
    Bad(
        "experts",
        change(FINETUNE, LAYOUT + "{data_parallel_size: 3, expert_model_parallel_size: 3}"),
        ("recipe.yaml:", "expert_model_parallel_size", "3 does not divide the 2 experts"),
    ),
    Bad(
        "layers",
        change("{tokens: 6144,", "{tokens: 6144, layout: {pipeline_model_parallel_size: 4},"),
        ("recipe.yaml:", "seed.layout.pipeline_model_parallel_size", "model.num_layers (2)"),
    ),
    Bad(
        "expert ranks by the world",
        change(FINETUNE, LAYOUT + "{expert_model_parallel_size: 2}"),
        ("recipe.yaml:", "finetune.layout.expert_model_parallel_size", "does not divide the world"),
    ),
]

LAYOUTS = [
    Bad(
        "computed wrongly: TP without ETP or EP",
        change(
            FINETUNE,
            LAYOUT + "{tensor_model_parallel_size: 2, expert_tensor_parallel_size: 1}",
        ),
        ("recipe.yaml:", "finetune.layout.expert_tensor_parallel_size", "drift", "use 2"),
    ),
    Bad(
        "computed wrongly: experts under TP without sequence parallelism",
        change(FINETUNE, LAYOUT + "{tensor_model_parallel_size: 2, sequence_parallel: false}"),
        ("recipe.yaml:", "finetune.layout.sequence_parallel", "remove it"),
    ),
    Bad(
        "not on gloo: EP with ETP",
        change(
            FINETUNE,
            LAYOUT + "{tensor_model_parallel_size: 2, expert_model_parallel_size: 2, "
            "data_parallel_size: 2}",
        ),
        ("finetune.layout.expert_tensor_parallel_size", "gloo", "set it to 1"),
        RUN,
    ),
    Bad(
        "context parallelism without Transformer Engine",
        change(FINETUNE, LAYOUT + "{context_parallel_size: 2}"),
        ("finetune.layout.context_parallel_size", "Transformer Engine", "set it to 1"),
        RUN,
    ),
    Bad(
        "more GPUs than there are",
        change(FINETUNE, LAYOUT + "{data_parallel_size: 2, expert_model_parallel_size: 2}"),
        ("finetune.layout", "2 ranks of a GPU each; this machine has 1", "btx stage"),
        RUN,
        {"CUDA_VISIBLE_DEVICES": "0"},
    ),
    Bad(
        "world size too large",
        lambda directory: None,
        ("seed", "1 rank(s), 4 were started", "btx plan"),
        ("stage", "recipe.yaml", "seed"),
        {"WORLD_SIZE": "4", "RANK": "0"},
    ),
    Bad(
        "world size that is no number",
        lambda directory: None,
        ("WORLD_SIZE", "'four'", "whole number"),
        ("stage", "recipe.yaml", "seed"),
        {"WORLD_SIZE": "four", "RANK": "0"},
    ),
    Bad(
        "rank outside the world",
        lambda directory: None,
        ("RANK", "3", "0 to 0"),
        ("stage", "recipe.yaml", "seed"),
        {"WORLD_SIZE": "1", "RANK": "3"},
    ),
]

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
        ("domains.math.train", "holds no .jsonl", "fix:"),
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
        ("data/web.jsonl:1", "'text' is a int", "fix:"),
        RUN,
    ),
]


def check(bad: Bad, directory: Path) -> None:
    """Make the mistake in ``directory``, run, and look at the answer and at what is left."""
    bad.edit(directory)
    before = tree_hash(directory)
    done = btx(*bad.command, cwd=directory, environment=bad.environment)
    assert done.returncode == 2, done.stdout + done.stderr
    for word in bad.words:
        assert word in done.stderr, f"{word!r} is not in: {done.stderr}"
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    assert not re.search(r"\x1b", done.stderr)
    assert done.stdout == ""
    assert tree_hash(directory) == before


@pytest.mark.parametrize(
    "bad", [*KEYS, *VALUES, *DIVISIONS, *LAYOUTS, *DATA], ids=lambda bad: bad.name
)
def test_bad_input(bad: Bad, tmp_path: Path) -> None:
    write_small(tmp_path)
    check(bad, tmp_path)


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
    "without metadata": (remove(".metadata"), ("is not whole", "copy the checkpoint again")),
    "manifest cut off": (cut("manifest.json", 40), ("manifest.json is damaged", "fix: give")),
    "data cut off": (cut("*.distcp", 5000), (".distcp", "fix:")),
    "data missing": (remove("__0_0.distcp"), ("__0_0.distcp", "fix:")),
    "metadata cut off": (cut(".metadata", 50), (".metadata", "fix:")),
    "without its tokenizer": (remove("tokenizer"), ("tokenizer/", "give the tokenizer")),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_bad_checkpoint(case: str, exported: Exported, tmp_path: Path) -> None:
    write_small(tmp_path)
    given = checkpoint(exported, tmp_path)
    edit, words = CHECKPOINTS[case]
    seed = change("seed: {tokens: 6144, data: {web: 1}}", f"seed: {{from: {given}}}")
    recipe = both(lambda _: edit(given), seed, change("{vocab_size: 400}", "{}"))
    check(Bad(case, recipe, words, RUN), tmp_path)


def test_a_checkpoint_of_another_shape(exported: Exported, tmp_path: Path) -> None:
    write_small(tmp_path)
    given = checkpoint(exported, tmp_path)
    seed = change("seed: {tokens: 6144, data: {web: 1}}", f"seed: {{from: {given}}}")
    edit = both(seed, change("hidden_size: 32", "hidden_size: 64"))
    words = ("seed.from", "hidden_size: 32 there, 64 here", "change `model:`")
    check(Bad("seed", edit, words, RUN), tmp_path)


def test_an_expert_of_another_shape(exported: Exported, tmp_path: Path) -> None:
    write_small(tmp_path)
    given = checkpoint(exported, tmp_path)
    tokenizer = exported.run_dir / "prepare" / "tokenizer"
    edit = both(
        change("tokenizer: {vocab_size: 400}", f"tokenizer: {{path: {tokenizer}}}"),
        change("math: {tokens: 2048, data: {math: 0.9, web: 0.1}}", f"math: {{from: {given}}}"),
        change("num_layers: 2", "num_layers: 4"),
    )
    words = ("experts.math.from", "num_layers: 2 there, 4 here", "change `model:`")
    check(Bad("expert", edit, words, RUN), tmp_path)


def test_an_expert_with_a_tokenizer_of_its_own(exported: Exported, tmp_path: Path) -> None:
    write_small(tmp_path)
    given = checkpoint(exported, tmp_path)
    edit = change("math: {tokens: 2048, data: {math: 0.9, web: 0.1}}", f"math: {{from: {given}}}")
    words = ("experts.math.from", "has a tokenizer of its own", "`seed: {from: ...}`")
    check(Bad("expert", edit, words, RUN), tmp_path)


def test_a_tokenizer_larger_than_the_vocabulary(exported: Exported, tmp_path: Path) -> None:
    write_small(tmp_path)
    tokenizer = exported.run_dir / "prepare" / "tokenizer" / "tokenizer.model"
    edit = change("{vocab_size: 400}", f"{{vocab_size: 300, path: {tokenizer}}}")
    words = ("tokenizer.vocab_size", "has 400 tokens, the vocabulary 300", "set `vocab_size: 400`")
    check(Bad("vocabulary", edit, words, RUN), tmp_path)


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    write_small(tmp_path)
    edit = change("{vocab_size: 400}", "{path: data/web.jsonl}")
    words = ("data/web.jsonl", "is not a SentencePiece model", "spm_train")
    check(Bad("tokenizer", edit, words, RUN), tmp_path)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Small disks of memory, mounted where a test may."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "btx-test", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"a disk of memory cannot be mounted here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_the_disk_is_known_to_be_too_small(disk: Callable[[str], Path], tmp_path: Path) -> None:
    where = disk("size=200k")
    write_small(tmp_path)
    edit = change("name: small", f"name: small\nrun_dir: {where}/run")
    words = (f"{where}/run", "no space left for the rest", "free some, give another `run_dir:`")
    check(Bad("small disk", edit, words, RUN), tmp_path)


@pytest.mark.parametrize("left", [0, 60_000])
def test_no_space_left_on_the_way(left: int, disk: Callable[[str], Path], tmp_path: Path) -> None:
    """The disk fills up behind the check, at once or while text is tokenized; with room again, the
    run goes through."""
    where = disk("size=20m")
    write_small(tmp_path)
    change("name: small", f"name: small\nrun_dir: {where}/run")(tmp_path)
    filler = tmp_path / "fill.py"
    filler.write_text(
        "import os, sys\n"
        "from megatron_btx import cli\n"
        "from megatron_btx.pipeline import inputs\n"
        "check = inputs.check\n"
        "def full(*arguments):\n"
        "    check(*arguments)\n"
        f"    with open({str(where / 'fill')!r}, 'wb') as file:\n"
        f"        free = os.statvfs({str(where)!r})\n"
        f"        file.write(bytes(free.f_bavail * free.f_frsize - {left}))\n"
        "inputs.check = full\n"
        "sys.exit(cli.main(['run', 'recipe.yaml']))\n"
    )
    done = subprocess.run(
        [sys.executable, "fill.py"],
        cwd=tmp_path,
        env=environ(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "no space left on" in done.stderr
    assert str(where / "run") in done.stderr
    assert "fix: free some" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(where) == ["fill"]


def test_a_disk_that_cannot_be_written(disk: Callable[[str], Path], tmp_path: Path) -> None:
    where = disk("size=10m,ro")
    write_small(tmp_path)
    edit = change("name: small", f"name: small\nrun_dir: {where}/run")
    words = (f"{where}/run", "read-only file system", "make it writable")
    check(Bad("read-only", edit, words, RUN), tmp_path)


def test_a_run_dir_that_is_a_file(tmp_path: Path) -> None:
    write_small(tmp_path)
    (tmp_path / "taken").write_text("")
    edit = change("name: small", "name: small\nrun_dir: taken")
    check(Bad("file", edit, ("taken", "is not a directory", "run_dir:"), RUN), tmp_path)
