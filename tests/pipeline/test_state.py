"""What a run directory says of its stages."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.data.tokenized import TokenizedSplit, write_tokenized
from megatron_btx.errors import UserError
from megatron_btx.pipeline import state
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.keys import Memo
from megatron_btx.pipeline.slurm import run_jobs, status
from megatron_btx.train import metrics
from megatron_btx.train.goodput import read_attempts
from tests.bad import PAGE, fill


@pytest.mark.parametrize("sign", ["metrics.jsonl", "progress.json", "log/attempt-1.log"])
def test_a_killed_attempt_counts_until_its_last_sign(tmp_path: Path, sign: str) -> None:
    """Whatever it wrote last: a log is silent while its stage trains."""
    (tmp_path / "log").mkdir()
    state.log_file(tmp_path, 1).touch()
    before = time.time()
    state.begin(tmp_path, 1, world_size=1)
    (tmp_path / sign).touch()
    os.utime(tmp_path / sign, (0, before + 100))
    state.log_file(tmp_path, 2).touch()  # as a batch script does before the attempt is noted
    state.begin(tmp_path, 2, world_size=1)
    assert state.seconds(tmp_path) == pytest.approx(100, abs=time.time() - before)


def test_a_stage_that_was_never_begun_took_no_time(tmp_path: Path) -> None:
    assert state.seconds(tmp_path) == 0


def test_the_line_of_a_killed_process_is_left_out(tmp_path: Path) -> None:
    begun = time.time() - 50
    lines = [json.dumps({"attempt": 1, "time": begun, "world_size": 1}), '{"att']
    (tmp_path / "attempts.jsonl").write_text("\n".join(lines))
    assert 50 <= state.seconds(tmp_path) <= time.time() - begun


TORN = '{"attempt": 1, "time": 100.0, "world_size": 1, "job": "7"}\n{"attempt": 2, "ti'
"""A disk was full while the second start was noted."""


def test_what_follows_a_torn_line_is_not_lost(tmp_path: Path) -> None:
    journal = tmp_path / "attempts.jsonl"
    journal.write_text(TORN)
    state.begin(tmp_path, 3, world_size=1, job="8")
    state.begin(tmp_path, 4, world_size=1, job="8")
    assert [line["attempt"] for line in read_attempts(tmp_path)] == [1, 3, 4]
    assert journal.read_text().startswith(TORN + "\n{")


@pytest.mark.parametrize("line", ["[1]", "7", '{"attempt": "1", "time": 5}', '{"time": 5}', "\0\0"])
def test_a_line_that_is_no_start_is_none(tmp_path: Path, line: str) -> None:
    (tmp_path / "attempts.jsonl").write_text(f"{TORN}\n{line}\n")
    assert [record["job"] for record in read_attempts(tmp_path)] == ["7"]


def test_a_full_disk_leaves_a_journal_as_it_was(
    tmp_path: Path, disk: Callable[[str], Path]
) -> None:
    place = disk("nr_blocks=16")
    state.begin(place, 1, world_size=1)
    before = (place / "attempts.jsonl").read_bytes()
    fill(place)
    with pytest.raises(OSError, match="No space"):
        state.begin(place, 2, world_size=1, note="x" * 2 * PAGE)
    assert (place / "attempts.jsonl").read_bytes() == before


def test_a_torn_last_line_of_the_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr\n{"kind": "train", "step": 2}\n7')
    assert [record["step"] for record in metrics.read(path)] == [1, 2]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"seed": 5}', '{"seed": {"job": '])
def test_a_damaged_list_of_jobs_knows_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.json").write_text(content)
    assert run_jobs.submitted(tmp_path) == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"%s": 5}', b"\xff\xfe"])
def test_a_damaged_memo_is_asked_anew(tmp_path: Path, content: bytes) -> None:
    text, memo = tmp_path / "text", tmp_path / "fingerprints.json"
    text.write_text("words")
    memo.write_bytes(content.replace(b"%s", str(text).encode()))
    assert Memo(memo).file(text) == Memo().file(text)


def test_a_memo_that_finds_no_room_stops_nobody(
    tmp_path: Path, disk: Callable[[str], Path]
) -> None:
    text, place = tmp_path / "text", disk("size=64k")
    text.write_text("words")
    fill(place)
    memo = Memo(place / "fingerprints.json")
    memo.file(text)
    memo.save()
    assert [path.name for path in place.iterdir()] == ["filler"]


@pytest.mark.parametrize("reached", ["first rename", "second rename"])
def test_a_killed_claim_forgets_no_model(tmp_path: Path, reached: str) -> None:
    """What the recipe of before made comes back, wherever the process was that shelved it."""
    of = {key: Stage(name="seed", kind="seed", key=key) for key in ("a" * 64, "b" * 64)}
    first, second = of.values()
    for stage in (first, second):
        state.claim(tmp_path, stage)
        state.begin(tmp_path / "seed", 1, 1)
        state.finish(tmp_path / "seed", stage, {})
    # what it does for the first one again, to the kill
    os.rename(tmp_path / "seed", tmp_path / "old" / f"seed-{'b' * 12}")
    if reached == "second rename":
        (shelved,) = (tmp_path / "old").glob(f"seed-{'a' * 12}*")
        os.rename(shelved, tmp_path / "seed")
    state.claim(tmp_path, first)
    assert state.done(tmp_path, first) is not None
    state.claim(tmp_path, second)
    assert state.done(tmp_path, second) is not None


@pytest.mark.parametrize(
    "entry", [{"finished": "x"}, {"finished": math.nan}, {"seconds": 1e300}, {"versions": []}]
)
def test_a_damaged_record_is_named(tmp_path: Path, entry: dict[str, Any]) -> None:
    stage = Stage(name="seed", kind="seed", key="k")
    state.claim(tmp_path, stage)
    state.begin(tmp_path / "seed", 1, 1)
    state.finish(tmp_path / "seed", stage, {})
    path = tmp_path / "seed" / "done.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    with pytest.raises(UserError, match=rf"done\.json: is damaged: `{next(iter(entry))}`"):
        state.done(tmp_path, stage)


def test_token_files_that_were_removed_are_made_again(tmp_path: Path) -> None:
    """Where a stage is left that reads them, whoever is asked; also those of a run linked to."""
    prepare = Stage(name="prepare", kind="prepare", key="k")
    seed = Stage(name="seed", kind="seed", key="s", needs=("prepare",))
    run_dir, other = tmp_path / "run", tmp_path / "other"
    for place in (run_dir, other):
        (place / "prepare" / "data" / "a").mkdir(parents=True)
        (place / "prepare" / "tokenizer").mkdir()
        (place / "prepare" / "tokenizer" / "made.json").write_text("{}")
        for split in ("train", "valid"):
            prefix = place / "prepare" / "data" / "a" / split
            write_tokenized(
                prefix, TokenizedSplit(key="x", documents=1, tokens=4, bytes=9, sha256="f")
            )
            for kind in ("bin", "idx"):
                prefix.with_suffix(f".{kind}").write_bytes(bytes(8))
        state.claim(place, prepare)
        state.begin(place / "prepare", 1, 1)
        state.finish(place / "prepare", prepare, {"domains": {"a": {"train": {}, "valid": {}}}})
    ids = run_dir / "prepare" / "data" / "a" / "valid.bin"
    both = (prepare, seed)
    assert state.left(run_dir, both) == (seed,)
    for lose in (ids.unlink, lambda: ids.write_bytes(bytes(7))):
        lose()
        assert state.left(run_dir, both) == state.missing(run_dir, both) == both
        assert state.missing(run_dir, (prepare,)) == state.left(run_dir, (prepare,)) == (prepare,)
        word, why = state.statuses(run_dir, both)["prepare"]
        assert (word, "no longer there" in why) == ("removed", True)
        ids.write_bytes(bytes(8))
    ids.unlink()
    state.claim(run_dir, seed)
    state.begin(run_dir / "seed", 1, 1)
    state.finish(run_dir / "seed", seed, {})
    assert state.left(run_dir, both) == ()  # nobody reads them any more
    assert {name: word for name, (word, _) in state.statuses(run_dir, both).items()} == {
        "prepare": "done",
        "seed": "done",
    }
    state.claim(run_dir, prepare)
    assert not (run_dir / "prepare" / "done.json").exists()

    linked = tmp_path / "linked"
    linked.mkdir()
    assert state.link_shared(linked, both, [str(other)]) == {"prepare": other / "prepare"}
    (other / "prepare" / "tokenizer" / "made.json").unlink()
    assert state.missing(linked, both) == both
    state.claim(linked, prepare)
    assert not (linked / "prepare").is_symlink()
    assert (other / "prepare" / "done.json").exists()


def test_how_a_stage_stands(tmp_path: Path) -> None:
    """The words of `btx run --dry-run` and `btx status`."""
    directory = tmp_path / "seed"

    def stands(key: str = "a") -> tuple[str, str]:
        return state.statuses(tmp_path, (Stage(name="seed", kind="seed", key=key),))["seed"]

    assert stands() == ("not started", "")
    state.claim(tmp_path, Stage(name="seed", kind="seed", key="a"))
    assert stands() == ("not started", "")
    state.begin(directory, 1, 1)
    assert stands() == ("interrupted", "")
    (directory / "checkpoints" / "step_00000004").mkdir(parents=True)
    assert stands() == ("interrupted", "goes on from step_00000004")
    (directory / "stopped.json").write_text("{}")
    assert stands() == ("stopped", "goes on from step_00000004")
    (directory / "error.json").write_text('{"message": "no memory\\nat all"}')
    assert stands() == ("failed", "no memory")
    for name in ("error.json", "stopped.json"):
        (directory / name).unlink()
    state.finish(directory, Stage(name="seed", kind="seed", key="a"), {})
    assert stands() == ("done", "")
    (directory / "checkpoints" / "step_00000004").rmdir()
    assert stands() == ("done", "its checkpoints were removed")
    word, why = stands("b")
    assert (word, "has changed" in why) == ("out of date", True)


def test_what_holds_no_checkpoint_is_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was thinned out since: something here may start from it."""
    stage = Stage(name="seed", kind="seed", key="a")
    other, run_dir = tmp_path / "other", tmp_path / "run"
    state.claim(other, stage)
    state.begin(other / "seed", 1, 1)
    state.finish(other / "seed", stage, {})
    assert state.find_shared(run_dir, stage, [str(other)]) is None
    (other / "seed" / "checkpoints" / "step_00000004").mkdir(parents=True)
    assert state.find_shared(run_dir, stage, [str(other)]) == other / "seed"
    for here, seen in ((tmp_path, "other/seed"), (other / "seed" / "log", f"{other}/seed")):
        monkeypatch.chdir(here)
        (row,) = status.rows(run_dir, (stage,), [str(other)])
        assert (row.state, row.note) == ("shared", f"from {seen}")
