"""The built-in corpora: disjoint, clean, the same again, and really what they are called."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import sympy

from megatron_btx.data.builtin import mathematics
from megatron_btx.data.builtin import text as builtin_text
from megatron_btx.data.builtin.algebra import check
from megatron_btx.data.builtin.corpora import NAMES, Corpus, write_builtin
from megatron_btx.errors import UserError
from tests.data.oracle import shared, texts

BYTES = 300_000
Corpora = dict[str, dict[str, list[str]]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus")
    written = write_builtin(path, dict.fromkeys(NAMES, BYTES), seed=7)
    for name, corpus in written.items():
        assert corpus == Corpus(*_measure(path / name / "train.jsonl"),
                                *_measure(path / name / "valid.jsonl"))  # fmt: skip
    return path


def _measure(path: Path) -> tuple[int, int]:
    documents = texts(path)
    return len(documents), sum(len(text.encode()) for text in documents)


@pytest.fixture(scope="module")
def corpora(directory: Path) -> Corpora:
    return {
        name: {split: texts(directory / name / f"{split}.jsonl") for split in ("train", "valid")}
        for name in NAMES
    }


def test_sizes(corpora: Corpora) -> None:
    for name in NAMES:
        train = sum(len(text.encode()) for text in corpora[name]["train"])
        valid = sum(len(text.encode()) for text in corpora[name]["valid"])
        assert 0.9 * BYTES < train <= BYTES, name
        assert 0.08 * BYTES < valid <= 0.1 * BYTES, name


def test_no_run_of_13_words_is_in_training_and_held_out_text(corpora: Corpora) -> None:
    train = itertools.chain.from_iterable(corpora[name]["train"] for name in NAMES)
    valid = itertools.chain.from_iterable(corpora[name]["valid"] for name in NAMES)
    assert shared(train, valid) == set()


def test_seed_and_experts_have_no_document_in_common(corpora: Corpora) -> None:
    everything = [
        text for name in NAMES for split in ("train", "valid") for text in corpora[name][split]
    ]
    assert len(set(everything)) == len(everything)


def test_each_file_has_one_role() -> None:
    from megatron_btx.data.builtin.corpora import _ROLES, _role

    sources = builtin_text.stdlib_sources() + builtin_text.package_sources()
    assert len({source.name for source in sources}) == len(sources)
    roles = [_role(source.order(7)) for source in sources]
    for role, share in _ROLES.items():
        sigma = (share * (1 - share) / len(roles)) ** 0.5
        assert abs(roles.count(role) / len(roles) - share) < 6 * sigma
    assert roles != [_role(source.order(8)) for source in sources]


def test_the_same_again_in_another_process_with_forks(directory: Path, tmp_path: Path) -> None:
    """Here torch is loaded and the corpora are made one by one; there they are made by children."""
    program = (
        "import sys\n"
        "from megatron_btx.data.builtin.corpora import NAMES, write_builtin\n"
        f"write_builtin({str(tmp_path)!r}, dict.fromkeys(NAMES, {BYTES}), seed=7)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)
    files = sorted(path.relative_to(directory) for path in directory.rglob("*.jsonl"))
    assert len(files) == 2 * len(NAMES)
    for file in files:
        assert (tmp_path / file).read_bytes() == (directory / file).read_bytes(), file


def test_another_seed_draws_other_documents(directory: Path, tmp_path: Path) -> None:
    write_builtin(tmp_path, {"math": 20_000, "code": 60_000}, seed=8)
    for name in ("math", "code"):
        ours, theirs = (texts(path / name / "valid.jsonl") for path in (tmp_path, directory))
        assert len(set(ours) & set(theirs)) < len(ours) / 2  # one may be drawn by both


def test_prose_is_english(corpora: Corpora) -> None:
    text = "\n".join(corpora["prose"]["train"])
    words = text.lower().split()
    common = sum(word in {"the", "of", "to", "a", "and", "is", "in", "that"} for word in words)
    assert common > 0.18 * len(words)
    for mark in (">>>", "def ", "import numpy", "::", "```", "+---", "==="):
        assert text.count(mark) < len(text) / 20_000, mark
    assert all(line[-1] in ".!?:)\"'" for line in text.splitlines() if line)


def test_code_is_python(corpora: Corpora) -> None:
    defs = sum(text.count("def ") + text.count("import ") for text in corpora["code"]["train"])
    assert defs > 100
    pieces = corpora["code"]["valid"]  # held-out files are never cut
    for text in pieces:
        compile(text, "held-out", "exec", dont_inherit=True)


def test_general_is_a_mix(corpora: Corpora) -> None:
    sizes = {"math": 0, "code": 0, "prose": 0}
    for text in corpora["general"]["train"]:
        last = text.splitlines()[-1]
        math = re.match(r"(Answer: |The answer is |So the result is |Result: )", last)
        code = re.search(r"^(def|class|from|import) |^    return|^    self", text, re.MULTILINE)
        sizes["math" if math else "code" if code else "prose"] += len(text)
    total = sum(sizes.values())
    assert all(0.2 < size / total < 0.45 for size in sizes.values()), sizes


@pytest.mark.parametrize("family", mathematics.FAMILIES, ids=lambda family: family.__name__[1:])
def test_every_kind_of_problem_holds_and_varies(family: object) -> None:
    random = Random("test")
    problems = [family(random) for _ in range(60)]  # type: ignore[operator]
    assert len(set(problems)) > 55
    assert all(80 < len(problem) < 2500 for problem in problems)


def test_products_in_the_text_are_true(corpora: Corpora) -> None:
    """What a reader would check: the equations between whole numbers, worked out by SymPy."""
    number = r"\(?-?\d+\)?"
    equation = re.compile(rf"{number}(?: [*+-] {number})+ = -?\d+")
    checked = 0
    for problem in corpora["math"]["valid"]:
        for clause in re.split(r"[:,;] |\.\s|\n", problem):
            if equation.fullmatch(clause):
                left, right = clause.split(" = ")
                assert sympy.sympify(left) == sympy.Integer(right), clause
                checked += 1
    assert checked > 40


def test_a_wrong_solution_is_caught() -> None:
    with pytest.raises(AssertionError, match="is not SymPy's"):
        check(41, sympy.Integer(6) * 7)


def test_problems_are_named_by_their_seed() -> None:
    def first(name: str) -> list[str]:
        return list(itertools.islice(mathematics.problems(name), 20))

    assert first("a") == first("a")
    assert not set(first("a")) & set(first("b"))


def test_unknown_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="poetry"):
        write_builtin(tmp_path, {"poetry": 1000}, seed=0)
    assert not list(tmp_path.iterdir())


def test_a_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "none")})
    with pytest.raises(UserError, match="without the text"):
        write_builtin(tmp_path / "out", {"code": 10_000}, seed=0)


def test_looking_for_packages_leaves_setuptools_importable() -> None:
    """find_spec("pip") would bring back the standard library's distutils (before Python 3.12), and
    torch, which imports setuptools, would not load any more."""
    program = (
        "from megatron_btx.data.builtin.text import package_sources\n"
        "assert package_sources()\n"
        "try:\n"
        "    import distutils.core\n"
        "except ImportError:\n"
        "    pass\n"
        "import setuptools\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)
