"""Users' JSONL: what is read, and every way in which it can be wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_btx.data.documents import find_files, read_documents
from megatron_btx.errors import UserError


def write(path: Path, *documents: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    return path


def test_files_and_directories_in_order(tmp_path: Path) -> None:
    write(tmp_path / "d" / "b.jsonl", "2")
    write(tmp_path / "d" / "sub" / "c.jsonl", "3")
    with gzip.open(tmp_path / "d" / "a.jsonl.gz", "wt", encoding="utf-8") as out:
        out.write('{"text": "1\u00e9"}\n\n{"text": "1b"}')
    write(tmp_path / "first.jsonl", "0")
    (tmp_path / "d" / "README.md").write_text("not text")
    files = find_files([tmp_path / "first.jsonl", tmp_path / "d"], where="x")
    assert list(read_documents(files)) == ["0", "1\u00e9", "1b", "2", "3"]


def test_another_key_and_other_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"id": 1, "body": "caf\u00e9 \\ud83d\\ude00"}\n', encoding="utf-8")
    assert list(read_documents([path], "body")) == ["caf\u00e9 \U0001f600"]


def test_it_streams(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "one", "two")
    with path.open("a") as out:
        out.write("broken\n")
    documents = read_documents([path])
    assert next(documents) == "one"
    assert next(documents) == "two"
    with pytest.raises(UserError):
        next(documents)


BAD = {
    "not UTF-8": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', 2, "UTF-8"),
    "no JSON": (b'{"text": "a"}\n\n{"text": "b"\n', 3, "not a JSON object"),
    "a list": (b'{"text": "a"}\n["text"]\n', 2, "list"),
    "a string": (b'"text"\n', 1, "str"),
    "other key": (b'{"content": "a"}\n', 1, "content"),
    "no string": (b'{"text": 3}\n', 1, "int"),
    "null": (b'{"text": null}\n', 1, "NoneType"),
    "half a pair": (b'{"text": "a"}\n{"text": "\\ud800"}\n', 2, "surrogate"),
    "nested": (b"[" * 100_000 + b"\n", 1, "JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_named(tmp_path: Path, name: str) -> None:
    content, line, said = BAD[name]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_documents([path]))
    assert error.value.where == f"{path}:{line}"
    assert said in error.value.what
    assert error.value.fix


def test_broken_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    for name, content in (("cut", whole[:-20]), ("bad", whole[:30] + b"x" * 99)):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a whole gzip") as error:
            list(read_documents([path]))
        assert str(path) in str(error.value)


def test_missing_empty_and_nothing_in_it(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "dir").mkdir()
    for path, said in (
        ("none", "does not exist"),
        ("empty.jsonl", "empty"),
        ("dir", "holds no file"),
    ):
        with pytest.raises(UserError, match=said) as error:
            find_files([tmp_path / path], where="domains.math.train")
        assert error.value.where == "domains.math.train"
        assert str(tmp_path / path) in error.value.what
    with pytest.raises(UserError, match="no document"):
        list(read_documents([tmp_path / "blank.jsonl"]))
