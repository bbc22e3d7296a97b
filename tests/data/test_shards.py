"""Sharded preparation: the same bytes whoever does it, killed and gone on with; pairs in place."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from pyarrow import parquet

from megatron_btx.data import parallel, tokenize
from megatron_btx.data.domain_text import HELD_OUT, document_hash
from megatron_btx.data.heldout_sequences import held_out
from megatron_btx.data.mixture import stage_data
from megatron_btx.data.prepare import (
    begin,
    check,
    make_share,
    prepare,
    tokenized_split,
    train_pairs,
)
from megatron_btx.data.tokenizer import load_tokenizer
from megatron_btx.errors import UserError, UserErrors
from megatron_btx.pipeline.keys import Memo
from megatron_btx.recipe.load import digest
from megatron_btx.recipe.schema import Domain, Recipe, TokenizerBlock, Training
from tests.data.tasks import kill_second, marked
from tests.data.test_formats import TEXTS, WRITERS, write_pair
from tests.data.test_prepare import recipe_of, story, tree, write

Prepared = tuple[Recipe, Path]


@pytest.fixture
def tokenizer(prepared: Prepared) -> TokenizerBlock:
    return TokenizerBlock(path=str(prepared[1] / "prepare" / "tokenizer"))


def data_of(out: Path) -> dict[str, bytes]:
    """Its token files."""
    return {name: content for name, content in tree(out / "data").items() if "json" not in name}


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "a.jsonl"])
def test_each_format_gives_the_same_ids(
    tmp_path: Path, tokenizer: TokenizerBlock, name: str
) -> None:
    found = []
    for kind in ("a.jsonl", name):
        WRITERS[kind](tmp_path / kind)
        domains = {"a": Domain(train=(str(tmp_path / kind),))}
        prepare(recipe_of(domains, tokenizer=tokenizer), tmp_path / f"out-{kind}")
        found.append(data_of(tmp_path / f"out-{kind}"))
    assert found[0] == found[1]
    assert set(found[0]) == {f"a/{s}.{kind}" for s in ("train", "valid") for kind in ("bin", "idx")}


def corpus(directory: Path) -> dict[str, Domain]:
    """Small files together, large ones cut, tables, and compressed ones."""
    write(directory / "a" / "large.jsonl", story(1, 400))
    for number in range(30):
        write(directory / "a" / f"small-{number:02}.jsonl", story(number + 50, 3))
    table = pyarrow.table({"text": story(2, 300)})
    parquet.write_table(table, directory / "b.parquet", row_group_size=40)
    (directory / "c.jsonl.zst").write_bytes(
        pyarrow.compress(Path(write(directory / "c.jsonl", story(3))).read_bytes(), "zstd", True)
    )
    return {
        "a": Domain(train=(str(directory / "a"),), valid=(write(directory / "v", story(9, 30)),)),
        "b": Domain(train=(str(directory / "b.parquet"), str(directory / "c.jsonl.zst"))),
    }


def test_the_same_bytes_whatever_the_workers(
    tmp_path: Path, tokenizer: TokenizerBlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(corpus(tmp_path), tokenizer=tokenizer)
    pools = []
    pool = parallel.ProcessPoolExecutor
    monkeypatch.setattr(
        parallel, "ProcessPoolExecutor", lambda n, *a, **k: pools.append(n) or pool(n, *a, **k)
    )
    trees = []
    for number, (size, cores) in enumerate([(1 << 26, 2), (5_000, 1), (20_000, 2), (3_000, 3)]):
        monkeypatch.setattr(tokenize, "SHARD", size)
        monkeypatch.setattr(tokenize, "cores", lambda cores=cores: cores)
        prepare(recipe, tmp_path / f"out{number}")
        trees.append(tree(tmp_path / f"out{number}"))
    assert pools == [2, 3]  # small input needs no processes
    assert trees[1] == trees[0]
    assert trees[2] == trees[0]
    assert trees[3] == trees[0]
    indexed = IndexedDataset(str(tmp_path / "out0" / "data" / "a" / "train"))
    tokens = load_tokenizer(tmp_path / "out0" / "tokenizer")
    expected = story(1, 400) + [text for n in range(30) for text in story(n + 50, 3)]
    read = [tokens.decode(np.asarray(indexed[i])[:-1]) for i in range(len(indexed))]
    assert read == expected


PROGRAM = """
import pickle, sys
from megatron_btx.data import tokenize
from megatron_btx.data.prepare import prepare
if __name__ == "__main__":
    tokenize.SHARD, tokenize.cores = 4_000, lambda: 2
    prepare(pickle.load(open(sys.argv[1], "rb")), sys.argv[2])
"""


def finished_shards(out: Path) -> int:
    """Counted while they are made: unlike ``Path.rglob``, ``os.walk`` passes over a directory that
    has gone since it was listed."""
    shards = (files for place, _, files in os.walk(out) if Path(place).name.startswith(".shards"))
    return sum(name.endswith(".json") for files in shards for name in files)


def test_killed_and_run_again(
    tmp_path: Path, prepared: Prepared, tokenizer: TokenizerBlock
) -> None:
    """kill -9 at seeded moments of a preparation by processes: the bytes of one that was not, and
    no process left."""
    recipe = recipe_of(corpus(tmp_path), tokenizer=tokenizer)
    prepare(recipe, tmp_path / "whole")
    (tmp_path / "recipe").write_bytes(pickle.dumps(recipe))
    out, environment = tmp_path / "out", {**os.environ, "BTX_TEST_MARK": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "recipe"), str(out)]
    draw, kept = random.Random(5), 0
    for shards in sorted(draw.sample(range(2, 40), 2)):
        while True:
            process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
            while process.poll() is None and finished_shards(out) < shards:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            if process.wait() == -signal.SIGKILL:
                break
            shutil.rmtree(out)  # it ended before anybody looked: once more
        kept = max(kept, finished_shards(out))
    assert kept
    subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL, timeout=600)
    assert tree(out) == tree(tmp_path / "whole")
    deadline = time.monotonic() + 600
    while marked(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not marked(str(tmp_path))


def test_finished_shards_are_kept(
    tmp_path: Path, tokenizer: TokenizerBlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad line costs its own shard; text that changed costs all of its file's."""
    monkeypatch.setattr(tokenize, "SHARD", 4_000)
    monkeypatch.setattr(tokenize, "cores", lambda: 1)
    made: list[Any] = []
    make = tokenize.make
    recipe = recipe_of(corpus(tmp_path), tokenizer=tokenizer)
    calls = iter(range(1000))

    def failing(shard: Any) -> Any:
        if next(calls) == 20:
            raise UserError("x", "is broken")
        return (make(shard), made.append(shard))[0]

    monkeypatch.setattr(tokenize, "make", failing)
    with pytest.raises(UserError, match="is broken"):
        prepare(recipe, tmp_path / "out")
    assert len(made) == 20
    prepare(recipe, tmp_path / "out")
    assert len({(shard.place, shard.key) for shard in made}) == len(made)
    whole = len(made)
    made.clear()
    prepare(recipe, tmp_path / "again")
    assert len(made) == whole
    assert data_of(tmp_path / "out") == data_of(tmp_path / "again")


def test_errors_of_processes(
    tmp_path: Path, tokenizer: TokenizerBlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad line is named by file and line though a process met it in the middle of a file."""
    monkeypatch.setattr(tokenize, "SHARD", 4_000)
    monkeypatch.setattr(tokenize, "cores", lambda: 2)
    domains = corpus(tmp_path)
    file = tmp_path / "a" / "large.jsonl"
    whole = file.read_text().splitlines(keepends=True)
    whole[333] = '{"text": 3}\n'
    file.write_text("".join(whole))
    with pytest.raises(UserError, match="'text'") as error:
        prepare(recipe_of(domains, tokenizer=tokenizer), tmp_path / "out")
    assert error.value.where == f"{file}:334"


def test_the_cores_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the job asked for, where Slurm binds it to nothing, and never more than there are."""
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    there = len(os.sched_getaffinity(0))
    for asked, found in (("1", 1), (str(there + 5), there), ("0", there), ("x", there)):
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", asked)
        assert parallel.cores() == found


def test_a_killed_process_is_said() -> None:
    with pytest.raises(UserError, match="was killed"):
        list(parallel.run_all(kill_second, range(4), workers=2))


def test_keys_are_those_of_before(tmp_path: Path, tokenizer: TokenizerBlock) -> None:
    """Token files and stages that an earlier version finished stay finished."""
    file = Path(write(tmp_path / "a.jsonl", story(1)))
    domain = Domain(train=(str(file),), valid=(write(tmp_path / "v.jsonl", story(2, 30)),))
    facts = prepare(recipe_of({"a": domain}, tokenizer=tokenizer), tmp_path / "out")["domains"]

    def sha(content: Any) -> str:
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    stat = file.stat()
    text = sha([[[str(file), stat.st_size, stat.st_mtime_ns]], "text", False, "train"])
    tokens = load_tokenizer(tmp_path / "out" / "tokenizer").sha256
    assert facts["a"]["train"]["key"] == sha([text, tokens])
    content = json.loads((tmp_path / "out" / "data" / "a" / "train.json").read_text())
    assert list(content) == ["key", "documents", "tokens", "bytes", "sha256"]
    plain = {"train": ["a"], "valid": ["v"]}
    written = json.dumps(plain, separators=(",", ":")).encode()
    assert digest(Domain(train=("a",), valid=("v",))) == hashlib.sha256(written).hexdigest()


def pair_of(path: Path, documents: list[str], prepared: Prepared, dtype: Any = np.uint16) -> str:
    tokens = load_tokenizer(prepared[1] / "prepare" / "tokenizer")
    write_pair(path, [[*ids.tolist(), tokens.eos_id] for ids in tokens.encode(documents)], dtype)
    return str(path)


def domain_of_pairs(tmp_path: Path, prepared: Prepared, **more: Any) -> Domain:
    return Domain(
        train=tuple(
            pair_of(tmp_path / f"p{i}", story(i, 100 * i), prepared, dtype)
            for i, dtype in ((1, np.uint16), (2, np.int32))
        ),
        valid=tuple(pair_of(tmp_path / f"v{i}", story(i + 8, 11), prepared) for i in (0, 1)),
        **more,
    )


def test_pairs_are_read_where_they_lie(
    tmp_path: Path, prepared: Prepared, tokenizer: TokenizerBlock
) -> None:
    recipe = recipe_of({"a": domain_of_pairs(tmp_path, prepared)}, tokenizer=tokenizer)
    run_dir = tmp_path / "run"
    check(recipe)
    facts = prepare(recipe, run_dir / "prepare")["domains"]["a"]
    assert facts["train"]["documents"] == 300
    assert facts["train"]["bytes"] is None
    assert facts["valid"]["bytes"] == sum(len(t.encode()) for t in story(8, 11) + story(9, 11))
    assert not list(run_dir.rglob("*.bin"))
    assert train_pairs(run_dir, "a") == [tmp_path / "p1", tmp_path / "p2"]
    text = held_out(recipe, run_dir, 10**9)["a"]
    pairs = [IndexedDataset(str(tmp_path / f"v{i}")) for i in (0, 1)]
    tokens = np.concatenate([pair[i] for pair in pairs for i in range(len(pair))])
    length = recipe.model.seq_length
    assert len(text) == (len(tokens) - 1) // length
    for index in range(len(text)):
        part = tokens[index * length : (index + 1) * length + 1].tolist()
        assert text[index]["tokens"].tolist() + text[index]["labels"].tolist()[-1:] == part


@pytest.mark.parametrize(("weights", "share"), [((), 1 / 3), ((3.0, 1.0), 0.75)])
def test_pairs_are_blended(
    tmp_path: Path,
    prepared: Prepared,
    tokenizer: TokenizerBlock,
    weights: tuple[float, ...],
    share: float,
) -> None:
    """By tokens, or by weights; a second domain has its own part of the mixture."""
    domains = {
        "a": domain_of_pairs(tmp_path, prepared, weights=weights),
        "b": Domain(train=(write(tmp_path / "b.jsonl", story(3)),), valid=(write(
            tmp_path / "w.jsonl", story(4)),)),
    }  # fmt: skip
    block = Training(tokens=400 * 32, data={"b": 1.0, "a": 3.0}, global_batch_size=8)
    recipe = recipe_of(domains, tokenizer=tokenizer, seed=block)
    prepare(recipe, tmp_path / "run" / "prepare")
    stream = stage_data(recipe, "seed", tmp_path / "run")
    (phase,) = stream.groups[0]
    assert phase.domains == (1, 0, 0)
    parts = Counter(int(phase.dataset[index]["dataset_id"]) for index in range(phase.samples))
    assert abs(parts[0] - 100) <= 1
    pairs = [IndexedDataset(str(tmp_path / f"p{i}")) for i in (1, 2)]
    tokens = [int(pair.sequence_lengths.sum()) for pair in pairs]
    exact = tokens[0] / sum(tokens) if not weights else share
    assert abs(parts[1] - 300 * exact) <= 1
    assert {int(phase[i]["domains"]) for i in range(40)} == {0, 1}


def test_weights_of_text(tmp_path: Path, tokenizer: TokenizerBlock) -> None:
    """Each path of text with a weight becomes a pair of its own."""
    paths = tuple(write(tmp_path / f"{i}.jsonl", story(i, 50 * i)) for i in (1, 2, 3))
    valid = (write(tmp_path / "v.jsonl", story(9, 30)),)
    domain = Domain(train=paths, valid=valid, weights=(1.0, 1.0, 2.0))
    recipe = recipe_of({"a": domain}, tokenizer=tokenizer)
    summary = prepare(recipe, tmp_path / "out")
    assert summary["domains"]["a"]["train"]["documents"] == 300
    content = json.loads((tmp_path / "out" / "data" / "a" / "train.json").read_text())
    assert content["blend"] == [["train.0", 0.25], ["train.1", 0.25], ["train.2", 0.5]]
    plain = replace(domain, weights=())
    prepare(recipe_of({"a": plain}, tokenizer=tokenizer), tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out" / "data" / "a").iterdir()) == sorted(
        f"{split}.{kind}" for split in ("train", "valid") for kind in ("bin", "idx", "json")
    )


def test_a_path_without_tokens(tmp_path: Path, tokenizer: TokenizerBlock) -> None:
    """Is nothing to read in held-out text, and an error where training text has a weight."""
    texts = itertools.chain.from_iterable(story(i, 60) for i in itertools.count(1))
    kept = list(itertools.islice((text for text in texts if document_hash(text) % HELD_OUT), 12))
    paths = (write(tmp_path / "a.jsonl", story(3, 400)), write(tmp_path / "b.jsonl", kept))
    domain = Domain(train=paths, weights=(3.0, 1.0))
    recipe = recipe_of({"a": domain}, tokenizer=tokenizer)
    prepare(recipe, tmp_path / "run" / "prepare")
    split = tokenized_split(tmp_path / "run", "a", "valid")
    assert len(split.blend) == 2
    assert len(held_out(recipe, tmp_path / "run", 10**6)["a"]) > 0
    write(Path(paths[1]), [""])
    with pytest.raises(UserError, match=r"(?s)domains\.a\.weights.*b\.jsonl has a weight"):
        prepare(recipe, tmp_path / "run" / "prepare")


def test_pairs_without_held_out_text_are_split(
    tmp_path: Path, prepared: Prepared, tokenizer: TokenizerBlock
) -> None:
    documents = story(1, 400) + story(1, 200)
    domain = Domain(train=(pair_of(tmp_path / "p", documents, prepared, np.int32),))
    facts = prepare(recipe_of({"a": domain}, tokenizer=tokenizer), tmp_path / "out")["domains"]
    tokens = load_tokenizer(tmp_path / "out" / "tokenizer")
    sides = []
    for split in ("train", "valid"):
        indexed = IndexedDataset(str(tmp_path / "out" / "data" / "a" / split))
        assert indexed.index.dtype == np.uint16
        sides.append([tokens.decode(np.asarray(indexed[i])[:-1]) for i in range(len(indexed))])
    assert not set(sides[0]) & set(sides[1])
    assert Counter(sides[0] + sides[1]) == Counter(documents)
    assert facts["a"]["valid"]["bytes"] == sum(len(text.encode()) for text in sides[1])


def test_pairs_that_do_not_fit(
    tmp_path: Path, prepared: Prepared, tokenizer: TokenizerBlock
) -> None:
    good = pair_of(tmp_path / "good", story(1), prepared)
    write_pair(tmp_path / "bad", [[5, 2], [5, 600, 2]])
    write_pair(tmp_path / "open", [[5, 2], [5, 6]])
    for name, said in (("bad", "has the id 600 at place 2"), ("open", "ends with the id 6")):
        for train, valid in ((str(tmp_path / name), good), (good, str(tmp_path / name))):
            domain = Domain(train=(train,), valid=(valid,))
            with pytest.raises(UserError, match=said) as error:
                prepare(recipe_of({"a": domain}, tokenizer=tokenizer), tmp_path / "out")
            assert error.value.where == f"{tmp_path / name}.idx, document 2"
    (tmp_path / "bad.bin").write_bytes(b"xx")
    domain = Domain(train=(str(tmp_path / "bad"),), valid=(good,))
    with pytest.raises(UserErrors, match="ends behind the end"):
        check(recipe_of({"a": domain}, tokenizer=tokenizer))
    domain = Domain(train=(good,), valid=(pair_of(tmp_path / "v", story(2), prepared),))
    for do in (check, lambda recipe: prepare(recipe, tmp_path / "out2")):
        with pytest.raises(UserError, match=r"tokenizer\.path: has to be given"):
            do(recipe_of({"a": domain}))


def test_keys_of_pairs(tmp_path: Path, prepared: Prepared) -> None:
    """The content of both files counts, whichever way the pair is named."""
    pair = pair_of(tmp_path / "a", story(1), prepared)
    keys = [Memo().paths([name]) for name in (pair, f"{pair}.bin", f"{pair}.idx")]
    assert keys[0] == keys[1] == keys[2]
    assert [name for name, _ in keys[0]] == ["a.bin", "a.idx"]
    pair_of(tmp_path / "a", story(2), prepared)
    assert Memo().paths([pair]) != keys[0]


def test_evaluation_reads_the_same(tmp_path: Path, prepared: Prepared) -> None:
    """The sequences of `btx evaluate --data` are those of plain JSONL, of any format and of ids."""
    from megatron_btx.evaluate.packed_text import PackedText, read

    tokens = load_tokenizer(prepared[1] / "prepare" / "tokenizer")
    pair = Path(pair_of(tmp_path / "pair", TEXTS, prepared) + ".idx")
    files = [tmp_path / name for name in ("a.jsonl", "a.parquet", "a.jsonl.zst")]
    for file in files:
        WRITERS[file.name](file)
    texts = [
        PackedText(read([file], "text", tokens), tokens, 32, start_id=0, most=most)
        for most in (None, 1000)
        for file in (*files, pair)
    ]
    assert len(texts[0]) > 900 > 40 > len(texts[4])
    for number, text in enumerate(texts):
        one = texts[number // 4 * 4]
        assert text.size == one.size
        assert len(text) == len(one)
        assert all((text[i]["labels"] == one[i]["labels"]).all() for i in range(len(one)))
    both = PackedText(read([pair, files[0]], "text", tokens), tokens, 32, start_id=0)
    assert both.size.tokens == 2 * texts[0].size.tokens


def test_shares_of_an_array(
    tmp_path: Path, tokenizer: TokenizerBlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs of an array in any order, one of them cut off: the bytes of one job."""
    monkeypatch.setattr(tokenize, "SHARD", 4_000)
    monkeypatch.setattr(tokenize, "cores", lambda: 1)
    recipe, out = recipe_of(corpus(tmp_path), tokenizer=tokenizer), tmp_path / "out"
    prepare(recipe, tmp_path / "whole")
    begin(recipe, out)
    made: list[Any] = []
    make = tokenize.make

    def failing(shard: Any) -> Any:
        if len(made) == 11:
            raise UserError("x", "is broken")
        return (make(shard), made.append(shard.place))[0]

    monkeypatch.setattr(tokenize, "make", failing)
    with pytest.raises(UserError, match="is broken"):
        make_share(recipe, out, 2, 3)
    monkeypatch.setattr(tokenize, "make", lambda shard: (make(shard), made.append(shard.place))[0])
    shares = [make_share(recipe, out, number, 3)["shards"] for number in (1, 2, 0)]
    assert len(made) == len(set(made)) == sum(shares)
    assert max(shares) - min(shares) <= 1
    assert not list((out / "data").glob("*/*.bin"))
    monkeypatch.setattr(tokenize, "make", lambda shard: pytest.fail("every shard is there"))
    prepare(recipe, out)
    assert tree(out) == tree(tmp_path / "whole")
