"""Tasks through lm-eval, of models whose answers are known: a bigram table, and one for which every
token is as likely."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_btx.errors import UserError
from megatron_btx.evaluate import code_exec
from megatron_btx.evaluate.model_spec import Subject
from megatron_btx.recipe.schema import Layout
from megatron_btx.report.table import tasks_table
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
    # of 1, 0, 0, 1, 1: the sample standard deviation over sqrt(5)
    assert found["tasks"]["arc_easy"]["stderr"] == pytest.approx(math.sqrt(0.3 / 5))
    mmlu = found["tasks"]["mmlu"]
    within = (2 * 0.5 / 2 * 1 + 3 * (1 / 3) / 3 * 2) / 3  # of the subjects' 1, 0 and 1, 0, 0
    assert mmlu["stderr"] == pytest.approx(math.sqrt(within / 5))
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


def _bits_per_byte(path: Path, context: str, answer: str) -> float:
    """Of an answer, by ``transformers``: contexts lose their beginning before 33 tokens; an answer
    that is longer goes through the model by 16 tokens, each behind as many as there is room for."""
    spoken = made.tokenizer()
    before, ids = (spoken.encode([text])[0].tolist() for text in (context, f"{context} {answer}"))
    ids, first = [spoken.eos_id, *ids], 1 + len(before)
    step = 16 if len(ids) - first > 32 else 32
    nats = 0.0
    for start in range(first, len(ids), step):
        end = min(start + step, len(ids))
        begin = max(0, end - 33)
        log_probs = made.log_probs(path, ids[begin : end - 1])
        nats -= sum(log_probs[place - begin - 1, ids[place]].item() for place in range(start, end))
    return nats / math.log(2) / len(answer.encode())


def test_bits_per_byte_of_the_right_answers(here: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Against ``transformers``, each item counting the same: of a choice, of what follows the right
    choice, of the first of several answers, of a whole solution, longer than the model's context
    too. Of a model for which every token is as likely it is known without any."""
    pytest.importorskip("transformers")
    names = ("arc_easy", "winogrande", "nq_open", "gsm8k")
    tasks = asked(tmp_path, *names)
    long = {"question": "é?", "answer": f"{made.TEXTS['x'][0]}\n#### 7"}
    with Path(tasks[3]["files"][0]).open("a") as file:
        file.write(json.dumps(long) + "\n")
    wanted = {
        "arc_easy": [("Question: Q: how many?\nAnswer:", gold) for gold in "78877"],
        "winogrande": [("A: x A:", "#### 7"), *[("A: y loop", "#### 7")] * 3],
        "nq_open": [
            ("Answer these questions:\n\nQ: how many?\nA:", answer)
            for answer in ("six", "eight", "the #### 7")
        ],
        "gsm8k": [
            (f"Question: {item['question']}\nAnswer:", item["answer"])
            for item in (*ITEMS["gsm8k"], long)
        ],
    }
    (found,) = ranks.run(ranks_side.tasks, 1, one(here / "a"), Layout(), tasks)
    for name, pairs in wanted.items():
        each = [_bits_per_byte(here / "a", *pair) for pair in pairs]
        bits = found["tasks"][name]["metrics"]["bits_per_byte"]
        assert bits == pytest.approx(statistics.fmean(each), rel=1e-4), name
    table = tasks_table({"a": found})
    assert "answers' bits/byte" in table
    assert f"{found['tasks']['gsm8k']['metrics']['bits_per_byte']:.3f}" in table
    (found,) = ranks.run(ranks_side.tasks, 1, one(here / "uniform"), Layout(), tasks[:1])
    spoken = made.tokenizer()
    tokens = len(spoken.encode(["A: 7"])[0]) - len(spoken.encode(["A:"])[0])
    bits = found["tasks"]["arc_easy"]["metrics"]["bits_per_byte"]
    assert bits == pytest.approx(tokens * math.log2(spoken.vocab_size))


def test_a_right_answer_must_be_there(here: Path, ranks: Ranks, tmp_path: Path) -> None:
    (task,) = asked(tmp_path, "winogrande")
    Path(task["files"][0]).write_text(json.dumps({**ITEMS["winogrande"][0], "answer": "3"}))
    with pytest.raises(AssertionError, match="the right answer 2 is none of 2 choices"):
        ranks.run(ranks_side.tasks, 1, one(here / "uniform"), Layout(), [task])


def test_shots_and_limit(here: Path, ranks: Ranks, tmp_path: Path) -> None:
    (task,) = asked(tmp_path, "gsm8k", num_fewshot=1, limit=1)
    (found,) = ranks.run(ranks_side.tasks, 1, one(here / "bigram"), Layout(), [task])
    entry = found["tasks"]["gsm8k"]
    assert (entry["shots"], entry["items"], entry["score"], entry["cut"]) == (1, 1, 1.0, 0)


def test_contexts_that_are_cut_are_counted(here: Path, ranks: Ranks, tmp_path: Path) -> None:
    (task,) = asked(tmp_path, "mmlu")  # 32 tokens are what this model takes
    (found,) = ranks.run(ranks_side.tasks, 1, one(here / "a"), Layout(), [task])
    assert found["tasks"]["mmlu"]["cut"] == 4 * 5  # each choice of each item
    whole = {**found, "tasks": {"mmlu": {**found["tasks"]["mmlu"], "cut": 0}}}
    assert "\nmmlu: 20 contexts were longer" in tasks_table({"a": found, "b": found})
    assert "\nmmlu (b, c): 20 contexts" in tasks_table({"a": whole, "b": found, "c": found})


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


KWARGS: list[tuple[dict[str, Any], dict[str, Any] | str]] = [
    ({"until": ["\n", ""], "max_gen_toks": 5}, {"until": ("\n",), "max_new_tokens": 5}),
    ({"until": "x", "max_new_tokens": 7}, {"until": ("x",), "max_new_tokens": 7}),
    ({"max_tokens": 9, "temperature": 0.5}, {"max_new_tokens": 9, "temperature": 0.5}),
    ({"do_sample": False, "temperature": 0.5, "top_k": 50, "top_p": 0.9}, {"temperature": 0.0}),
    ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
    ({"do_sample": True, "temperature": 0.7, "top_k": 0}, {"temperature": 0.7, "top_p": 1.0}),
    ({"do_sample": True, "temperature": 0.7, "top_k": 50}, "top_k (50) is not done here"),
    ({"repetition_penalty": 1.2}, "repetition_penalty (1.2) is not done here"),
    ({"num_beams": 4}, "num_beams (4) is not done here"),
    ({"num_beams": 1, "repetition_penalty": 1.0}, {"temperature": 0.0}),
]


@pytest.mark.parametrize(("given", "wanted"), KWARGS, ids=str)
def test_generation_kwargs_are_followed_or_refused(
    given: dict[str, Any], wanted: dict[str, Any] | str
) -> None:
    """Read as lm-eval reads them, under all of its names."""
    from megatron_btx.evaluate.lm_eval_adapter import Harness

    harness = Harness(SimpleNamespace(seq_length=192))
    if isinstance(wanted, str):
        with pytest.raises(UserError) as caught:
            harness._decoding(given)
        assert wanted in str(caught.value)
        return
    found = asdict(harness._decoding(given))
    assert wanted.items() <= found.items()


def test_a_task_is_asked_once(here: Path, ranks: Ranks, tmp_path: Path) -> None:
    (task,) = asked(tmp_path, "nq_open")
    with pytest.raises(AssertionError, match="--tasks nq_open: is given twice"):
        ranks.run(ranks_side.tasks, 1, one(here / "uniform"), Layout(), [task, task])


def test_mistakes_are_told_all_at_once(here: Path, ranks: Ranks, tmp_path: Path) -> None:
    (task,) = asked(tmp_path, "humaneval")
    (others,) = asked(tmp_path, "nq_open")
    wrong = [
        task,
        {**task, "task": "arc"},
        {**task, "task": "gsm8k", "files": []},
        {**others, "task": "mmlu"},
        {**others, "task": str(tmp_path / "mine.yaml"), "shots": others["files"], "files": []},
    ]
    (tmp_path / "mine.yaml").write_text(TASK.format(more="test_split: test"))
    with pytest.raises(AssertionError) as raised:
        ranks.run(ranks_side.tasks, 1, one(here / "uniform"), Layout(), wrong)
    for words in (
        "add --allow-code-execution",
        "there is no such task",
        "has no items",
        "its items do not fit",
        "--tasks mine: is given examples alone",
    ):
        assert words in str(raised.value)


def test_programs_are_run_with_limits() -> None:
    assert code_exec.passes("print('x' * 10_000)")
    assert not code_exec.passes("raise SystemExit(1)")
    assert not code_exec.passes("while True: pass", seconds=0.3)
    assert code_exec.passes("import time; time.sleep(1.5)", seconds=1)  # as on a busy machine
    assert not code_exec.passes("x = bytearray(3 << 30)")
    assert not code_exec.passes("import os; assert 'PYTEST_CURRENT_TEST' not in os.environ; 1/0")
    assert code_exec.passes("import os; assert 'PYTEST_CURRENT_TEST' not in os.environ")


@pytest.mark.parametrize(
    "early",
    [
        "from sys import exit; exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "quit()",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import atexit, os; atexit.register(os._exit, 0); 1/0",
        "import os\nif os.fork(): os._exit(0)",
        "x = '''",
        "\0",
        "'\ud800'",
    ],
)
def test_a_program_that_ends_early_has_failed(early: str) -> None:
    """Its tests, which come behind it, never ran."""
    item = {"prompt": "", "test": TEST.format(7), "entry_point": "seven"}
    good = "def seven():\n    return 7\n"
    assert code_exec.humaneval_pass(item, [good]) == {"pass_at_1": 1.0}
    assert code_exec.humaneval_pass(item, [good + early]) == {"pass_at_1": 0.0}
    assert code_exec.mbpp_pass({"test_list": ["assert False"]}, [early]) == {"pass_at_1": 0.0}


DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), file=open({pid!r}, "w"), flush=True)
        time.sleep(600)
    os._exit(0)
while not os.path.exists({pid!r}): time.sleep(0.01)
while not open({pid!r}).read().endswith("\\n"): time.sleep(0.01)
{rest}
"""


@pytest.mark.parametrize(("rest", "ends"), [("", True), ("while True: pass", False)])
def test_nothing_that_a_program_started_outlives_it(tmp_path: Path, rest: str, ends: bool) -> None:
    """Forked twice, in a session of its own."""
    pid = tmp_path / "pid"
    program = DAEMON.format(pid=str(pid), rest=rest)
    assert code_exec.passes(program, seconds=60 if ends else 3) is ends
    assert not Path("/proc", pid.read_text().strip() or "0").exists()


GADGET = "{{{{ cycler.__init__.__globals__.os.system('touch {file}') }}}}"
TASK = """
task: mine
dataset_path: json
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["7", "8"]
doc_to_target: 0
{more}
"""
CODE = {
    "a template": 'description: "' + GADGET + '"',
    "a template of the text": 'fewshot_delimiter: ""\ndoc_to_text: "' + GADGET + '"',
    "a function": "process_docs: !function evil.function",
    "an included function": "include: more.yaml",
    "a metric": "metric_list: [{{metric: ./evil}}]",
    "a pickle": "dataset_path: pandas\ntest_split: test\n"
    "dataset_kwargs: {{data_files: {{test: {file}.pkl}}}}",
}


@pytest.mark.parametrize("kind", CODE)
def test_a_task_file_that_runs_code_needs_consent(
    here: Path, ranks: Ranks, tmp_path: Path, kind: str
) -> None:
    """Nothing is run without it; with it, all of it is."""
    done, task = tmp_path / "done", tmp_path / "mine.yaml"
    (tmp_path / "evil.py").write_text(f"open({str(done)!r}, 'w')\ndef function(docs): return docs")
    (tmp_path / "more.yaml").write_text("process_docs: !function evil.function\n")
    task.write_text(TASK.format(more=CODE[kind].format(file=done)))
    (one_task,) = asked(tmp_path, "nq_open")
    mine = {**one_task, "task": str(task)}
    if kind == "a pickle":
        mine["files"] = []
    with pytest.raises(AssertionError, match="add --allow-code-execution"):
        ranks.run(ranks_side.tasks, 1, one(here / "uniform"), Layout(), [mine])
    assert not done.exists()
    if "a template" in kind or "function" in kind:
        mine["allow_code"] = True
        (found,) = ranks.run(ranks_side.tasks, 1, one(here / "uniform"), Layout(), [mine])
        assert found["tasks"]["mine"]["items"] == 3
        assert done.exists()


@pytest.mark.parametrize(
    ("text", "items", "words"),
    [
        ("a: [" * 3000, None, "is no YAML"),
        ("- 1", None, "is no mapping"),
        ("include: mine.yaml", None, "includes itself"),
        ("include: none.yaml", None, "there is no such file"),
        ("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
         "c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c]\n"
         "e: [*d, *d, *d, *d, *d, *d, *d, *d, *d, *d, *d, *d, *d, *d, *d]\n", None, "is too large"),
        (None, "", "its items do not fit"),
        (None, "\n\n", "its items do not fit"),
        (None, '{"question": "?"}\n{"question": 1', "its items do not fit"),
        (None, '{"other": "?"}\n', "its items do not fit"),
        (None, '{"question": "?"}\n', "no number is called 'none'"),
    ],
)  # fmt: skip
def test_damaged_task_files_and_items(
    here: Path, ranks: Ranks, tmp_path: Path, text: str | None, items: str | None, words: str
) -> None:
    task = tmp_path / "mine.yaml"
    task.write_text(text or TASK.format(more="metadata: {score: none}"))
    (mine,) = asked(tmp_path, "nq_open")
    if items is not None:
        Path(mine["files"][0]).write_text(items)
    with pytest.raises(AssertionError, match=words):
        ranks.run(
            ranks_side.tasks, 1, one(here / "uniform"), Layout(), [{**mine, "task": str(task)}]
        )


def test_the_standard_error_is_the_metrics_own(here: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Of a mean of fractions their sample standard deviation, of a median by bootstrap."""
    (tmp_path / "part.py").write_text(
        "def score(doc, results):\n    return {'fraction': doc['share'], 'middle': doc['share']}\n"
    )
    task, items = tmp_path / "mine.yaml", tmp_path / "items.jsonl"
    listed = "{metric: fraction, aggregation: mean}, {metric: middle, aggregation: median}"
    entry = {"files": [str(items)], "shots": [], "num_fewshot": 0, "limit": None}
    shares = [0.1, 0.2, 0.4, 0.9]
    items.write_text("".join(json.dumps({"question": "?", "share": s}) + "\n" for s in shares))
    for score in ("fraction", "middle"):
        task.write_text(
            TASK.format(more=f"process_results: !function part.score\nmetric_list: [{listed}]\n"
                        f"metadata: {{score: {score}}}")
        )  # fmt: skip
        asked_for = {**entry, "task": str(task), "allow_code": True}
        (found,) = ranks.run(ranks_side.tasks, 1, one(here / "uniform"), Layout(), [asked_for])
        stderr = found["tasks"]["mine"]["stderr"]
        if score == "fraction":
            assert stderr == pytest.approx(statistics.stdev(shares) / 2)
        else:  # the medians of all 256 resamples of 4
            medians = [sorted(draw)[2] for draw in itertools.product(shares, repeat=4)]
            assert stderr == pytest.approx(statistics.pstdev(medians), rel=0.15)


def test_boxed_answers() -> None:
    assert code_exec.boxed("so \\boxed{1} and \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}"
    assert code_exec.boxed("nothing") == ""
    item = {"solution": "\\boxed{x + 1}"}
    assert code_exec.boxed_match(item, ["it is \\boxed{x+1}"]) == {"exact_match": 1.0}
    assert code_exec.boxed_match(item, ["it is x+1"]) == {"exact_match": 0.0}
