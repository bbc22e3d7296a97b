"""The prepare stage: from text to files, killed and gone on with, and everything wrong with it."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_btx.data.prepare import check, prefix, prepare
from megatron_btx.data.tokenized import read_tokenized
from megatron_btx.data.tokenizer import load_tokenizer
from megatron_btx.errors import UserError, UserErrors
from megatron_btx.pipeline.keys import Memo, StageKeys
from megatron_btx.recipe.schema import Domain, Model, Recipe, TokenizerBlock, Training
from tests.data.conftest import TINY
from tests.data.oracle import texts
from tests.data.tasks import marked
from tests.families.tokenizers_made import qwen

Prepared = tuple[Recipe, Path]


def tree(directory: Path) -> dict[str, bytes]:
    """Every file of a prepared directory that says what it holds."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def write(path: Path, documents: Sequence[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    return str(path)


def story(seed: int, number: int = 120) -> list[str]:
    """Documents to be tokenized."""
    draw = random.Random(seed)
    words = ("the", "fox", "and", "hound", "ran", "over", "hills", "to", "see", "what", "it", "was")
    return [" ".join(draw.choices(words, k=60)) + f" {seed} {i}.\n" for i in range(number)]


def recipe_of(domains: dict[str, Domain], **changes: Any) -> Recipe:
    model = Model(
        num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, seq_length=32
    )
    data = dict.fromkeys(domains, 1.0)
    fields: dict[str, Any] = {
        "name": "t", "model": model, "domains": domains, "experts": {},
        "tokenizer": TokenizerBlock(vocab_size=300), "seed": Training(tokens=1, data=data),
        "finetune": Training(tokens=1, data=data),
    }  # fmt: skip
    return Recipe(**{**fields, **changes})


def test_what_is_there(prepared: Prepared) -> None:
    recipe, run_dir = prepared
    out = run_dir / "prepare"
    summary = json.loads((out / "data.json").read_text())
    tokenizer = load_tokenizer(out / "tokenizer")
    assert summary["tokenizer"] == {**tokenizer.describe(), "vocab_size": tokenizer.vocab_size}
    for name in recipe.domains:
        for split in ("train", "valid"):
            documents = texts(out / "corpus" / name / f"{split}.jsonl")
            facts = summary["domains"][name][split]
            indexed = IndexedDataset(str(prefix(run_dir, name, split)))
            assert facts["documents"] == len(documents) == len(indexed)
            assert facts["tokens"] == int(indexed.sequence_lengths.sum())
            assert facts["bytes"] == sum(len(text.encode()) for text in documents)
            assert facts["sources"] == [f"builtin: {name}"]
            assert indexed.index.dtype == np.uint16
            for index in (0, len(indexed) // 2, len(indexed) - 1):
                ids = np.asarray(indexed[index])
                assert ids[-1] == tokenizer.eos_id
                assert tokenizer.decode(ids[:-1]) == documents[index]
    assert not [path for path in out.rglob("*") if "tmp" in path.name]


def test_done_is_done(prepared: Prepared) -> None:
    recipe, run_dir = prepared
    before = {path: path.stat().st_mtime_ns for path in (run_dir / "prepare" / "data").rglob("*")}
    prepare(recipe, run_dir / "prepare")
    assert before == {
        path: path.stat().st_mtime_ns for path in (run_dir / "prepare" / "data").rglob("*")
    }


PROGRAM = """
import sys
from megatron_btx.data.prepare import prepare
from megatron_btx.recipe.load import load_recipe
recipe = load_recipe(sys.argv[1])
prepare(recipe, sys.argv[2])
"""


def test_killed_and_run_again(prepared: Prepared, tmp_path: Path) -> None:
    """kill -9 at seeded moments, the same bytes in the end, and no process left behind."""
    _, run_dir = prepared
    draw = random.Random(3)
    command = [sys.executable, "-c", PROGRAM, str(TINY), str(tmp_path)]
    environment = {**os.environ, "BTX_TEST_MARK": str(tmp_path)}
    kills = 0
    for _ in range(3):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.4, 2.5))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL, timeout=600)
    assert kills
    expected, found = tree(run_dir / "prepare"), tree(tmp_path)
    assert set(found) == set(expected)
    for name in expected:
        assert found[name] == expected[name], name
    deadline = time.monotonic() + 600
    while marked(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not marked(str(tmp_path))


def test_users_files(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as out:
        out.write("".join(json.dumps({"body": text}) + "\n" for text in story(2)))
    domains = {
        "a": Domain(train=(write(tmp_path / "a" / "1.jsonl", story(1)),),
                    valid=(write(tmp_path / "held.jsonl", story(9, 30)),)),
        "b": Domain(train=(str(tmp_path / "b.jsonl.gz"),), text_key="body"),
    }  # fmt: skip
    recipe = recipe_of(domains)
    check(recipe)
    summary = prepare(recipe, tmp_path / "out")
    facts = summary["domains"]
    assert facts["a"]["train"]["documents"] == 120
    assert facts["a"]["valid"]["documents"] == 30
    assert facts["a"]["valid"]["sources"] == [str(tmp_path / "held.jsonl")]
    b = {split: facts["b"][split]["documents"] for split in ("train", "valid")}
    assert sum(b.values()) == 120
    assert 0 < b["valid"] < 12


def test_only_what_changed_is_made_again(tmp_path: Path) -> None:
    domains = {
        name: Domain(train=(write(tmp_path / f"{name}.jsonl", story(i)),),
                     valid=(write(tmp_path / f"{name}-v.jsonl", story(i + 10, 20)),))
        for i, name in enumerate("abc")
    }  # fmt: skip
    recipe = recipe_of(domains, seed=Training(tokens=1, data={"a": 1.0}))
    prepare(recipe, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").rglob("*.bin")}
    write(tmp_path / "b.jsonl", story(77, 130))
    summary = prepare(recipe, tmp_path / "out")
    changed = [
        f"{path.parent.name}/{path.stem}"
        for path, when in before.items()
        if path.stat().st_mtime_ns != when
    ]
    assert changed == ["b/train"]
    assert summary["domains"]["b"]["train"]["documents"] == 130


def test_same_text_never_on_both_sides_of_a_split(tmp_path: Path) -> None:
    documents = story(4, 400) * 2
    recipe = recipe_of({"a": Domain(train=(write(tmp_path / "a.jsonl", documents),))})
    prepare(recipe, tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    sides = []
    for split in ("train", "valid"):
        indexed = IndexedDataset(str(tmp_path / "out" / "data" / "a" / split))
        sides.append({tokenizer.decode(np.asarray(indexed[i])[:-1]) for i in range(len(indexed))})
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == set(documents)


def test_given_and_inherited_tokenizers(prepared: Prepared, tmp_path: Path) -> None:
    theirs = load_tokenizer(prepared[1] / "prepare" / "tokenizer")
    domains = {"a": Domain(train=(write(tmp_path / "a.jsonl", story(1, 200)),))}
    theirs.save_huggingface(tmp_path / "hf")
    step = tmp_path / "seed" / "checkpoints" / "step_00000008"
    theirs.save(step / "tokenizer")
    (step / "manifest.json").write_text(json.dumps({"vocab_size": theirs.vocab_size}))
    seed = Training(from_=str(tmp_path / "seed"))
    kinds: dict[str, dict[str, Any]] = {
        "model": {"tokenizer": TokenizerBlock(path=str(tmp_path / "hf" / "tokenizer.model"))},
        "hf": {"tokenizer": TokenizerBlock(type="huggingface", path=str(tmp_path / "hf"))},
        "seed": {"seed": seed},
    }
    tokens = set()
    for name, changes in kinds.items():
        summary = prepare(recipe_of(domains, **changes), tmp_path / name)
        tokens.add(summary["domains"]["a"]["train"]["sha256"])
        kind = "huggingface" if name == "hf" else "sentencepiece"
        assert summary["tokenizer"]["type"] == kind
    assert len(tokens) == 1  # three ways to the same ids

    (step / "manifest.json").write_text(json.dumps({"vocab_size": 400}))
    with pytest.raises(UserError, match="512 tokens, the model's vocabulary 400"):
        prepare(recipe_of(domains, seed=seed), tmp_path / "small")
    (step / "manifest.json").write_text(json.dumps({"vocab_size": 512}))
    named = {"tokenizer": kinds["hf"]["tokenizer"], "seed": seed}  # the seed's, as it was exported
    prepare(recipe_of(domains, **named), tmp_path / "named")
    other = TokenizerBlock(type="huggingface", path=str(qwen(tmp_path / "qwen")))
    with pytest.raises(UserError, match="not the tokenizer that the seed"):
        prepare(recipe_of(domains, seed=seed, tokenizer=other), tmp_path / "other")
    (tmp_path / "bare" / "step_00000001").mkdir(parents=True)
    bare = Training(from_=str(tmp_path / "bare"))
    with pytest.raises(UserError, match="without its tokenizer"):
        prepare(recipe_of(domains, seed=bare), tmp_path / "none")


@pytest.mark.parametrize("given", ["", "tokenizer.json"])
def test_the_files_beside_a_tokenizer_are_a_part_of_it(tmp_path: Path, given: str) -> None:
    """Another end token in tokenizer_config.json: other tokens, and other keys of all stages."""
    place = qwen(tmp_path / "theirs")
    domains = {"a": Domain(train=(write(tmp_path / "a.jsonl", story(1, 200)),))}
    block = TokenizerBlock(type="huggingface", path=str(place / given))
    recipe = recipe_of(domains, tokenizer=block, seed=Training(tokens=1, data={"a": 1.0}))
    keys, ends, last = set(), [], []
    for end in ("<|endoftext|>", "<|im_end|>"):
        config = json.loads((place / "tokenizer_config.json").read_text())
        (place / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": end}))
        keys.add(StageKeys(recipe, Memo()).key("seed", "seed", {}))
        prepare(recipe, tmp_path / "out")
        ends.append(load_tokenizer(tmp_path / "out" / "tokenizer").eos_id)
        indexed = IndexedDataset(str(tmp_path / "out" / "data" / "a" / "train"))
        last.append(int(indexed[0][-1]))
    assert len(keys) == 2
    assert last == ends
    assert ends[0] != ends[1]


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    domains = {
        "a": Domain(train=(str(tmp_path / "none.jsonl"), )),
        "b": Domain(train=(str(tmp_path / "empty.jsonl"), )),
        "c": Domain(train=(str(tmp_path / "latin.jsonl"), ), valid=(str(tmp_path / "nix"), )),
    }  # fmt: skip
    recipe = recipe_of(domains, tokenizer=TokenizerBlock(path=str(tmp_path / "no.model")))
    before = tree(tmp_path)
    with pytest.raises(UserErrors) as error:
        check(recipe)
    said = str(error.value)
    for part in ("domains.a.train", "domains.b.train", "latin.jsonl:1", "domains.c.valid",
                 "tokenizer.path"):  # fmt: skip
        assert part in said
    assert len(error.value.errors) == 5
    with pytest.raises(UserErrors, match=r"(?s)domains.a.train.*domains.b.train.*domains.c.valid"):
        prepare(recipe, tmp_path / "out")
    assert tree(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_too_little_text(tmp_path: Path) -> None:
    domains = {"a": Domain(train=(write(tmp_path / "a.jsonl", story(1)),),
                           valid=(write(tmp_path / "v.jsonl", ["short"]),))}  # fmt: skip
    with pytest.raises(UserError, match="less than one sequence") as error:
        prepare(recipe_of(domains), tmp_path / "out")
    assert error.value.where == "domains.a.valid"
    with pytest.raises(UserError, match="pieces"):
        prepare(recipe_of(domains, tokenizer=TokenizerBlock(vocab_size=30_000)), tmp_path / "out2")


def test_a_bad_line_leaves_no_half_written_files(tmp_path: Path) -> None:
    file = Path(write(tmp_path / "a.jsonl", story(1)))
    domains = {"a": Domain(train=(str(file),), valid=(write(tmp_path / "v.jsonl", story(2, 30)),))}
    recipe = recipe_of(domains)
    prepare(recipe, tmp_path / "out")
    where = tmp_path / "out" / "data" / "a" / "train"
    old = read_tokenized(where)
    good = file.read_text()
    file.write_text(good + "broken\n")
    with pytest.raises(UserError, match=r"a\.jsonl:121"):
        prepare(recipe, tmp_path / "out")
    assert read_tokenized(where) == old  # what is whole stays until its successor is
    assert not [path for path in tmp_path.rglob("*") if "tmp" in path.name]
    file.write_text(good + json.dumps({"text": ""}) + "\n" + json.dumps({"text": "new text"}))
    facts = prepare(recipe, tmp_path / "out")["domains"]["a"]["train"]
    assert facts["documents"] == 121  # without tokens, a document is left out
    piece = read_tokenized(where)
    assert piece is not None
    assert piece != old
    assert read_tokenized(where, piece.key) == piece
    assert read_tokenized(where, "another") is None
    assert not list((tmp_path / "out" / "data" / "a").glob(".*"))
