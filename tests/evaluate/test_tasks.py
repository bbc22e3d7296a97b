"""Tasks through lm-eval, of models whose answers are known: a bigram table, and one for which every
token is as likely."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.evaluate import code_exec
from megatron_btx.evaluate.model_spec import Subject
from megatron_btx.recipe.schema import Layout
from tests.evaluate import made, ranks_side
from tests.ranks import Ranks

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'megatron-btx[eval]'")

DP2 = Layout(data_parallel_size=2)
TEST = "def check(candidate):\n    assert candidate() == {}\n"
ITEMS: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [
        {"question": "Q: how many?", "choices": {"text": ["7", "8"], "label": ["A", "B"]}}
        | {"answerKey": key}
        for key in ("A", "B", "B", "A", "A")
    ],
    "mmlu": [
        {"question": "how many?", "subject": subject, "choices": list("2345"), "answer": gold}
        for subject, gold in (("one", 0), ("one", 3), ("two", 0), ("two", 1), ("two", 2))
    ],
    "nq_open": [
        {"question": "how many", "answer": ["six", "# 7."]},
        {"question": "how many", "answer": ["eight"]},
        {"question": "how many", "answer": ["the #### 7"]},
    ],
    "gsm8k": [
        {"question": "Q: how many?", "answer": "Some.\n#### 7"},
        {"question": "Q: how many more?", "answer": "None.\n#### 17"},
    ],
    "humaneval": [
        {"prompt": "def seven():\n", "entry_point": "seven", "test": TEST.format(7)},
        {"prompt": "def eight():\n", "entry_point": "eight", "test": TEST.format(8)},
    ],
    "winogrande": [
        {"sentence": "A: _ #### 7", "option1": "x A:", "option2": "y loop", "answer": gold}
        for gold in ("1", "2", "2", "2")
    ],
}  # fmt: skip
for item in ITEMS["humaneval"]:
    item["canonical_solution"] = "    return 7"


def asked(root: Path, *names: str, **more: Any) -> list[dict[str, Any]]:
    """Tasks with their items written out."""
    found = []
    for name in names:
        path = root / f"{name}.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS[name]))
        one = {"task": name, "files": [str(path)], "shots": [], "num_fewshot": 0, "limit": None}
        found.append({**one, "allow_code": False, **more})
    return found


def one(path: Path) -> Subject:
    return Subject(name="one", models={"model": path})


@pytest.mark.parametrize("layout", [Layout(), DP2])
def test_a_uniform_model_scores_at_chance(
    here: Path, ranks: Ranks, tmp_path: Path, layout: Layout
) -> None:
    """Choices of as many tokens are a tie, which the first wins: the share of items whose first
    choice is right."""
    tasks = asked(tmp_path, "arc_easy", "mmlu")
    found = ranks.run(ranks_side.tasks, layout.world_size, one(here / "uniform"), layout, tasks)[0]
    assert found["tasks"]["arc_easy"]["score"] == pytest.approx(3 / 5)
    assert found["tasks"]["arc_easy"]["stderr"] == pytest.approx(math.sqrt(0.6 * 0.4 / 5))
    mmlu = found["tasks"]["mmlu"]
    assert (mmlu["score"], mmlu["items"], mmlu["shots"]) == (pytest.approx(2 / 5), 5, 0)
    assert found["average"] == pytest.approx(0.5)


def test_a_model_that_knows(here: Path, ranks: Ranks, tmp_path: Path) -> None:
    names = ("nq_open", "gsm8k", "humaneval", "winogrande")
    tasks = asked(tmp_path, *names, allow_code=True)
    (found,) = ranks.run(ranks_side.tasks, 1, one(here / "bigram"), Layout(), tasks)
    scores = {name: entry["score"] for name, entry in found["tasks"].items()}
    assert scores["nq_open"] == pytest.approx(2 / 3)  # punctuation and articles do not count
    assert scores["gsm8k"] == 0.5
    assert scores["humaneval"] == 0.5
    assert scores["winogrande"] == 0.25  # behind "A:" the end of the sentence is likely
    assert found["tasks"]["humaneval"]["metric"] == "pass_at_1"


def test_shots_and_limit(here: Path, ranks: Ranks, tmp_path: Path) -> None:
    (task,) = asked(tmp_path, "gsm8k", num_fewshot=1, limit=1)
    (found,) = ranks.run(ranks_side.tasks, 1, one(here / "bigram"), Layout(), [task])
    entry = found["tasks"]["gsm8k"]
    assert (entry["shots"], entry["items"], entry["score"], entry["cut"]) == (1, 1, 1.0, 0)


def test_contexts_that_are_cut_are_counted(here: Path, ranks: Ranks, tmp_path: Path) -> None:
    (task,) = asked(tmp_path, "mmlu")  # 32 tokens are what this model takes
    (found,) = ranks.run(ranks_side.tasks, 1, one(here / "a"), Layout(), [task])
    assert found["tasks"]["mmlu"]["cut"] == 4 * 5  # each choice of each item


def test_whole_texts(here: Path, ranks: Ranks) -> None:
    """``loglikelihood_rolling``: the end token before the text, windows of 32 with all the context
    that they can have, against ``transformers``."""
    pytest.importorskip("transformers")
    texts = [made.TEXTS["x"][0], "loop"]
    (found,) = ranks.run(ranks_side.rolling, 1, one(here / "a"), texts)
    spoken = made.tokenizer()
    for text, total in zip(texts, found, strict=True):
        ids = [spoken.eos_id, *spoken.encode([text])[0].tolist()]
        wanted = 0.0
        for place in range(1, len(ids)):
            # whole windows, but for the last, which reaches back to be whole too
            start = (place - 1) // 32 * 32
            start = min(start, max(0, len(ids) - 33))
            log_probs = made.log_probs(here / "a", ids[start : start + 32])
            wanted += log_probs[place - 1 - start, ids[place]].item()
        assert total == pytest.approx(wanted, abs=1e-3)


def test_mistakes_are_told_all_at_once(here: Path, ranks: Ranks, tmp_path: Path) -> None:
    (task,) = asked(tmp_path, "humaneval")
    (others,) = asked(tmp_path, "nq_open")
    wrong = [
        task,
        {**task, "task": "arc"},
        {**task, "task": "gsm8k", "files": []},
        {**others, "task": "mmlu"},
    ]
    with pytest.raises(AssertionError) as raised:
        ranks.run(ranks_side.tasks, 1, one(here / "uniform"), Layout(), wrong)
    for words in (
        "add --allow-code-execution",
        "there is no such task",
        "has no items",
        "its items do not fit",
    ):
        assert words in str(raised.value)


def test_programs_are_run_with_limits() -> None:
    assert code_exec.passes("print('x' * 10_000)")
    assert not code_exec.passes("raise SystemExit(1)")
    assert not code_exec.passes("while True: pass", seconds=0.3)
    assert not code_exec.passes("x = bytearray(3 << 30)")
    assert not code_exec.passes("import os; assert 'PYTEST_CURRENT_TEST' not in os.environ; 1/0")
    assert code_exec.passes("import os; assert 'PYTEST_CURRENT_TEST' not in os.environ")


def test_boxed_answers() -> None:
    assert code_exec.boxed("so \\boxed{1} and \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}"
    assert code_exec.boxed("nothing") == ""
    item = {"solution": "\\boxed{x + 1}"}
    assert code_exec.boxed_match(item, ["it is \\boxed{x+1}"]) == {"exact_match": 1.0}
    assert code_exec.boxed_match(item, ["it is x+1"]) == {"exact_match": 0.0}
