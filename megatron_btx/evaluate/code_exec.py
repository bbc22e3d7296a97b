"""Answers that take more than a comparison of strings: boxed ones, and programs, which are run.

The tasks' YAML files name these functions. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError

SECONDS = 10.0
"""Of the processor, that a program may take."""
_CLOCK = 6
"""Times that on the clock: what a busy machine may make of it. What waits for ever ends then."""
_MEMORY = 2 << 30
_FILE = 1 << 20
_GRACE = 30.0
"""Seconds for the supervisor to start Python and to end what a program has started."""

_SUPERVISOR = str(Path(__file__).with_name("code_supervisor.py"))


def boxed_answer(item: Mapping[str, Any]) -> str:
    """What stands in the last ``\\boxed{}`` of an item's solution."""
    return boxed(item["solution"])


def boxed_match(item: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where the last boxed expressions are the same but for spaces, and not empty."""
    wanted, given = boxed(item["solution"]), boxed(results[0])
    same = bool(wanted) and "".join(wanted.split()) == "".join(given.split())
    return {"exact_match": float(same)}


def boxed(text: str) -> str:
    """The content of the last ``\\boxed{...}``, braces balanced; empty where there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return ""
    depth, first = 0, start + len("\\boxed{")
    for place in range(first - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[first:place]
    return ""


def humaneval_pass(item: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where the prompt and its continuation pass the item's tests."""
    program = f"{item['prompt']}{results[0]}\n\n{item['test']}\n\ncheck({item['entry_point']})\n"
    return {"pass_at_1": float(passes(program))}


def mbpp_pass(item: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where the program passes the item's assertions."""
    setup = item.get("test_setup_code") or ""
    program = "\n".join([setup, results[0], *item["test_list"], ""])
    return {"pass_at_1": float(passes(program))}


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a Python program runs to its last line and ends well, within ``seconds`` of the
    processor (six times that on the clock, so that no score depends on what else the machine does).

    It runs in a process and an empty directory of its own, without our environment, with limits on
    time, memory and the size of files; one that exits before its last line has failed. What it has
    started ends with it (:mod:`megatron_btx.evaluate.code_supervisor`). That keeps a careless
    program from doing harm, not a malicious one: run what you do not trust in a container without
    a network. On a job's other ranks nothing is run; the first one's results count.

    Raises:
        UserError: this is not Linux.
    """
    if not sys.platform.startswith("linux"):
        fix = "run it on Linux, or without the tasks that are scored by running programs"
        raise UserError("--allow-code-execution", "needs Linux's process control", fix)
    if os.environ.get("RANK", "0") != "0":
        return False
    with tempfile.TemporaryDirectory(prefix="btx-code-", ignore_cleanup_errors=True) as directory:
        path = Path(directory, "program.py")
        path.write_text(program, encoding="utf-8", errors="surrogatepass")
        clock = _CLOCK * seconds
        limits = [str(limit) for limit in (seconds, clock, _MEMORY, _FILE)]
        process = subprocess.Popen(
            [sys.executable, "-I", _SUPERVISOR, str(path), *limits],
            cwd=directory,
            env={"PATH": "", "HOME": directory, "TMPDIR": directory},
            stdin=subprocess.PIPE,  # which it watches: it ends with us
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(clock + _GRACE) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            assert process.stdin is not None
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
            process.kill()
            process.wait()
