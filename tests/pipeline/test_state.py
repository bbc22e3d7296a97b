"""What a run directory says of its stages."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from megatron_btx.pipeline import state


@pytest.mark.parametrize("sign", ["metrics.jsonl", "progress.json", "log/attempt-1.log"])
def test_a_killed_attempt_counts_until_its_last_sign(tmp_path: Path, sign: str) -> None:
    """Whatever it wrote last: a log is silent while its stage trains."""
    (tmp_path / "log").mkdir()
    state.log_file(tmp_path, 1).touch()
    state.begin(tmp_path, 1, world_size=1)
    (tmp_path / sign).touch()
    os.utime(tmp_path / sign, (0, time.time() + 100))
    state.log_file(tmp_path, 2).touch()  # as a batch script does before the attempt is noted
    state.begin(tmp_path, 2, world_size=1)
    assert 99 < state.seconds(tmp_path) < 105


def test_a_stage_that_was_never_begun_took_no_time(tmp_path: Path) -> None:
    assert state.seconds(tmp_path) == 0


def test_the_line_of_a_killed_process_is_left_out(tmp_path: Path) -> None:
    lines = [json.dumps({"attempt": 1, "time": time.time() - 50, "world_size": 1}), '{"att']
    (tmp_path / "attempts.jsonl").write_text("\n".join(lines))
    assert 49 < state.seconds(tmp_path) < 55
