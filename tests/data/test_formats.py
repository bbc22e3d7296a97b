"""Every format gives the documents of plain JSONL, and every damage is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from pyarrow import parquet

from megatron_btx.data.documents import find_files, read_documents
from megatron_btx.data.formats import Part, format_of, json_lines, token_pair
from megatron_btx.errors import UserError

TEXTS = [f"Document {i}.\nIts caf\u00e9 \U0001f600 holds {'words ' * (i % 50)}" for i in range(700)]


def lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": 1, "text": text}).encode() + b"\n" for text in texts)


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


def skipped(kind: int) -> bytes:
    """A frame of Zstandard that holds no data: what some writers keep about the file."""
    return bytes((kind, 0x2A, 0x4D, 0x18)) + (9).to_bytes(4, "little") + b"\n(a note)"


def table(texts: list[str], kind: Any = None) -> Any:
    return pyarrow.table({"id": list(range(len(texts))), "text": pyarrow.array(texts, kind)})


def write_parquet(path: Path) -> None:
    parquet.write_table(table(TEXTS), path, row_group_size=100, compression="zstd")


def write_arrow(path: Path, new: Callable[..., Any] = pyarrow.ipc.new_stream) -> None:
    whole = table(TEXTS, pyarrow.large_string())
    with new(str(path), whole.schema) as out:
        out.write_table(whole, max_chunksize=100)


def joined(compress: Callable[[bytes], bytes], between: bytes) -> bytes:
    """Two streams behind each other; ``between`` fills up an xz file."""
    return compress(lines(TEXTS[:300])) + between + compress(lines(TEXTS[300:])) + between


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_bytes(lines(TEXTS)),
    "a.json": lambda path: path.write_text(json.dumps([{"text": t} for t in TEXTS])),
    "b.json": lambda path: path.write_text(
        "\n".join(json.dumps({"text": t}, indent=1) for t in TEXTS)
    ),
    "c.json": lambda path: path.write_text(
        " \n[" + " ,\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in TEXTS) + "\n]\n"
    ),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(TEXTS))),
    "b.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress(lines(TEXTS[:300])) + gzip.compress(lines(TEXTS[300:]))
    ),
    "a.jsonl.zst": lambda path: path.write_bytes(zstd(lines(TEXTS[:9])) + zstd(lines(TEXTS[9:]))),
    "b.jsonl.zst": lambda path: path.write_bytes(
        skipped(0x50) + zstd(lines(TEXTS[:9])) + skipped(0x5F) * 2 + zstd(lines(TEXTS[9:]))
    ),
    "c.jsonl.zst": lambda path: path.write_bytes(
        skipped(0x5A) + zstd(lines(TEXTS)) + skipped(0x5A)
    ),
    "a.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(lines(TEXTS))),
    "b.jsonl.bz2": lambda path: path.write_bytes(joined(bz2.compress, b"")),
    "a.JSON.XZ": lambda path: path.write_bytes(lzma.compress(lines(TEXTS))),
    "b.jsonl.xz": lambda path: path.write_bytes(joined(lzma.compress, bytes(8))),
    "a.parquet": write_parquet,
    "a.arrow": write_arrow,
    "b.arrow": lambda path: write_arrow(path, pyarrow.ipc.new_file),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("lying", [False, True])
def test_as_plain_jsonl(tmp_path: Path, name: str, lying: bool) -> None:
    """By its content: the name may lie."""
    path = tmp_path / name
    WRITERS[name](path)
    if lying:
        path = path.rename(tmp_path / ("x.jsonl" if name != "a.jsonl" else "x.parquet"))
    assert list(read_documents(find_files([path], where="x"))) == TEXTS


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("size", [1, 999, 40_000, 1 << 30])
def test_parts_are_the_whole(tmp_path: Path, name: str, size: int) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    form = format_of(path)
    if size == 1 and name == "a.jsonl":
        path.write_bytes(lines(TEXTS[:5]))
    parts = form.split(path, size)
    found = [text for part in parts for _, text in form.read(part, "text")]
    assert found == (TEXTS[:5] if size == 1 and name == "a.jsonl" else TEXTS)
    if size == 40_000 and name in ("a.jsonl", "a.parquet"):
        assert len(parts) > 1


def test_places_are_named_from_any_part(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' * 20)
    for size in range(1, 60):
        places = [
            json_lines.where(part, place)
            for part in json_lines.split(path, size)
            for place, _ in json_lines.read(part, "text")
        ]
        assert places == [f"{path}:{2 * i + 1}" for i in range(20)]
    rows = tmp_path / "a.parquet"
    write_parquet(rows)
    form = format_of(rows)
    named = [
        form.where(part, place)
        for part in form.split(rows, 1)
        for place, _ in form.read(part, "text")
        if place % 30 == 7
    ]
    assert named == [f"{rows}, row {i + 1}" for i in range(700) if i % 100 % 30 == 7]


def bad_table(path: Path, column: Any) -> None:
    parquet.write_table(pyarrow.table({"text": column}), path)


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut.jsonl.zst": (lambda p: p.write_bytes(zstd(lines(TEXTS))[:-40]), "not a whole Zstandard"),
    "cut.jsonl.bz2": (lambda p: p.write_bytes(bz2.compress(lines(TEXTS))[:-40]), "whole bzip2"),
    "cut.jsonl.xz": (lambda p: p.write_bytes(lzma.compress(lines(TEXTS))[:-40]), "whole xz"),
    "behind.zst": (lambda p: p.write_bytes(zstd(lines(TEXTS)) + b"x" * 40), "whole Zstandard"),
    # The standard library's files end well here, and the second half of the text is lost.
    "behind.bz2": (lambda p: p.write_bytes(joined(bz2.compress, b"x" * 9)), "whole bzip2"),
    "behind.xz": (lambda p: p.write_bytes(joined(lzma.compress, b"x" * 12)), "whole xz"),
    "twice.jsonl": (
        lambda p: p.write_bytes(b'{"text": "a"}\n{"text": "a", "text": "b"}\n'),
        "twice.jsonl:2: has 2 texts under 'text'",
    ),
    "twice.json": (lambda p: p.write_bytes(b'[{"text": "a", "text": "b"}]'), "has 2 texts"),
    "cut.json": (lambda p: p.write_bytes(b'[{"text": "a"},\n {"text": '), "cut.json:2"),
    "open.json": (lambda p: p.write_bytes(b'[{"text": "a"}\n'), "list"),
    "behind.json": (lambda p: p.write_bytes(b'[{"text": "a"}] {"text": "b"}'), "list"),
    "comma.json": (lambda p: p.write_bytes(b'[{"text": "a"} {"text": "b"}]'), "list"),
    "deep.json": (lambda p: p.write_bytes(b"[" * 200_000), "list"),
    "digits.jsonl": (lambda p: p.write_bytes(b'{"text": ' + b"1" * 5000 + b"}"), "digits.jsonl:1"),
    "no.parquet": (lambda p: parquet.write_table(pyarrow.table({"body": ["a"]}), p), "body"),
    "int.parquet": (lambda p: bad_table(p, [1, 2]), "int64"),
    "null.parquet": (lambda p: bad_table(p, ["a", None]), "row 2"),
    "bytes.parquet": (lambda p: bad_table(p, [b"a", b"\xff"]), "row 2: is not UTF-8"),
}


def test_a_text_that_speaks_of_its_key(tmp_path: Path) -> None:
    """It stands once in the object, and elsewhere as often as it likes."""
    inner = json.dumps({"text": "a", "more": {"text": "b"}})
    records = [{"text": inner, "more": {"text": "c"}, "tags": ["text", "text"]}] * 2
    for name, content in (
        ("a.jsonl", "\n".join(map(json.dumps, records))),
        ("a.json", json.dumps(records)),
    ):
        (tmp_path / name).write_text(content)
        assert list(read_documents([tmp_path / name])) == [inner] * 2


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    write, said = DAMAGED[name]
    path = tmp_path / name
    write(path)
    with pytest.raises(UserError) as error:
        list(read_documents([path]))
    assert said in str(error.value)
    assert str(path) in str(error.value)
    assert error.value.fix


def test_marks_and_line_ends_of_windows(tmp_path: Path) -> None:
    """Byte order marks, also where files were joined, on blank lines too."""
    path, mark = tmp_path / "a.jsonl", b"\xef\xbb\xbf"
    path.write_bytes(mark + b'\r\n {"text": "a"}\r\n\r\n' + mark + b'{"text": "b"}\n' + mark)
    for size in (1, 7, 1 << 20):
        parts = json_lines.split(path, size)
        assert [text for part in parts for _, text in json_lines.read(part, "text")] == ["a", "b"]
    path.write_bytes(mark + b"\r\n")
    with pytest.raises(UserError, match="holds no document"):
        list(read_documents([path]))


def test_zstandard_without_a_checksum(tmp_path: Path) -> None:
    """Wherever it is cut off; in one frame or several."""
    path, text = tmp_path / "a.jsonl.zst", lines(TEXTS)
    half = text.index(b"\n", len(text) // 2) + 1
    for content in (zstd(text), zstd(text[:half]) + zstd(text[half:])):
        assert not content[4] & 4  # the flag of a checksum in the frame header (RFC 8878)
        path.write_bytes(content)
        assert list(read_documents([path])) == TEXTS
        ends = {0, len(zstd(text[:half]))}  # between two frames the file is whole
        for cut in sorted({*range(5, len(content), len(content) // 60), len(content) - 1} - ends):
            path.write_bytes(content[:cut])
            with pytest.raises(UserError, match="not a whole Zstandard file"):
                list(read_documents([path]))


@pytest.mark.parametrize("write", [write_parquet, write_arrow])
def test_damaged_tables(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """Cut anywhere, an error that names the file; never fewer documents without a word."""
    write(tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    for cut in range(9, len(whole) - 1, len(whole) // 40):
        (tmp_path / "a").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=str(tmp_path / "a")):
            list(read_documents([tmp_path / "a"]))


def test_gigabytes_of_blank_lines(tmp_path: Path) -> None:
    """Fast, in little memory, and a document behind them is found under its line."""
    path = tmp_path / "a.jsonl.gz"
    blank = gzip.compress(b"\n" * (1 << 24))
    path.write_bytes(blank * 32 + gzip.compress(b'{"text": "x"}\n'))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert list(json_lines.read(Part(path), "text")) == [((1 << 29) + 1, "x")]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    assert list(json_lines.read(Part(path, 0, 1 << 26), "text")) == []


def test_documents_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "MAX_RECORD", 4_000_000)
    monkeypatch.setattr("megatron_btx.data.formats.part.MAX_DOCUMENT", 100)
    good, bad = {"text": "a"}, {"text": "\u00e9" * 51}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    (tmp_path / "a.json").write_text(json.dumps([good, bad]))
    parquet.write_table(pyarrow.table({"text": ["a", bad["text"]]}), tmp_path / "a.parquet")
    (tmp_path / "long.jsonl").write_text(f'{json.dumps(good)}\n{{"text": "{"a" * 9_000_000}"}}\n')
    (tmp_path / "long.json").write_text(f'[{json.dumps(good)},\n{{"text": "{"a" * 9_000_000}"}}]')
    (tmp_path / "blank.jsonl").write_text(f"{json.dumps(good)}\n" + " " * 9_000_000)
    bad = {"a.jsonl": ":2", "a.json": ":1", "a.parquet": ", row 2", "long.jsonl": ":2",
           "long.json": ":2", "blank.jsonl": ":2"}  # fmt: skip
    for name, place in bad.items():
        with pytest.raises(UserError, match="are the most") as error:
            list(read_documents([tmp_path / name]))
        assert error.value.where == f"{tmp_path / name}{place}"


def test_what_a_directory_holds_is_read_or_refused(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.json.gz", "c.jsonl.zst", "d.json", "e.JSONL", "g.parquet"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("README.md", "LICENSE", "SHA256SUMS", "_SUCCESS", ".hidden", "dataset_infos.json"):
        (tmp_path / name).write_bytes(b"x")
    texts = ["citations.jsonl", "readmes.parquet", "changelog-2.jsonl.gz", "state.json"]
    for name in texts:
        (tmp_path / name).write_bytes(b"x")
    found = find_files([tmp_path], where="x")
    names = ["a.jsonl", "b.json.gz", "c.jsonl.zst", "d.json", "e.JSONL", "g.parquet"]
    assert [file.name for file in found] == sorted([*names, *texts], key=str)
    for name in ("a.txt", "b.csv", "c.tar", "d.jsonl.lz4", "e.bin", "f"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=f"type: {name}"):
            find_files([tmp_path], where="x")
        (tmp_path / name).unlink()
    for number in range(8):
        (tmp_path / f"{number}.txt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"0\.txt, .*4\.txt and 3 more"):
        find_files([tmp_path], where="x")


def test_no_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_bytes(b"x")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "link").symlink_to(tmp_path / "d")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.jsonl").symlink_to(tmp_path / "nothing")
    for path, said in (("a.jsonl", "not a regular file"), ("e", "link to a directory"),
                       ("f", "No such file"), ("f/a.jsonl", "No such file")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            find_files([tmp_path / path], where="x")
    with pytest.raises(UserError, match="not a regular file"):
        find_files(["/dev/zero"], where="x")


def test_ten_thousand_files(tmp_path: Path) -> None:
    for number in range(10_000):
        place = tmp_path / f"{number % 10}"
        place.mkdir(exist_ok=True)
        (place / f"{number:05}.jsonl").write_bytes(b'{"text": "%d"}\n' % number)
    files = find_files([tmp_path], where="x")
    expected = [str(n) for digit in range(10) for n in range(digit, 10_000, 10)]
    assert list(read_documents(files)) == expected


def test_what_datasets_saved(tmp_path: Path) -> None:
    """The library writes, pyarrow alone reads."""
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_dict({"text": TEXTS})
    whole.save_to_disk(str(tmp_path / "a"), num_shards=3)
    assert list(read_documents(find_files([tmp_path / "a"], where="x"))) == TEXTS
    (tmp_path / "a" / "cache-123.arrow").write_bytes(b"x")
    assert len(find_files([tmp_path / "a"], where="x")) == 3
    odd = whole.select(range(0, 700, 7)).shuffle(seed=3)
    odd.save_to_disk(str(tmp_path / "b"))
    assert list(read_documents(find_files([tmp_path / "b"], where="x"))) == odd["text"][:]
    datasets.DatasetDict({"train": whole, "test": odd}).save_to_disk(str(tmp_path / "c"))
    with pytest.raises(UserError, match="train"):
        find_files([tmp_path / "c"], where="x")
    assert list(read_documents(find_files([tmp_path / "c" / "train"], where="x"))) == TEXTS
    (tmp_path / "a" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(UserError, match="00001"):
        find_files([tmp_path / "a"], where="x")


def write_pair(prefix: Path, documents: list[list[int]], dtype: Any = np.uint16) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(np.array(ids, dtype), [len(ids)])
    builder.finalize(f"{prefix}.idx")


PAIR = [[5, 6, 7, 2], [8, 2], [9, 9, 9, 9, 9, 2], [3, 2]]


def test_pairs_that_megatron_wrote(tmp_path: Path) -> None:
    for dtype in (np.uint16, np.int32, np.uint8, np.int64):
        write_pair(tmp_path / "a", PAIR, dtype)
        (file,) = find_files([tmp_path / "a"], where="x")
        assert file == tmp_path / "a.idx"
        assert find_files([tmp_path], where="x") == [file]
        assert find_files([tmp_path / "a.bin"], where="x") == [file]
        pair = token_pair.TokenPair(file)
        assert [ids.tolist() for ids in pair.documents()] == PAIR
        assert [ids.tolist() for ids in pair.documents(1, 3)] == PAIR[1:3]
        assert pair.check_ids(2, 10) == 14
        parts = token_pair.split(file, 8)
        assert sum(pair.check_ids(2, 10, part.begin, part.end) for part in parts) == 14
    with pytest.raises(UserError, match="not text"):
        list(read_documents([file]))


def test_pairs_of_another_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pair(tmp_path / "a", PAIR)
    pair = token_pair.TokenPair(tmp_path / "a.idx")
    for block in (1 << 24, 5, 2, 1):
        monkeypatch.setattr(token_pair, "_BLOCK", block)
        with pytest.raises(UserError, match="has the id 9 at place 1;") as error:
            pair.check_ids(2, 9)
        assert error.value.where == f"{tmp_path / 'a.idx'}, document 3"
        with pytest.raises(UserError, match="ends with the id 2, not with.*0") as error:
            pair.check_ids(0, 10, 1)
        assert error.value.where == f"{tmp_path / 'a.idx'}, document 2"
    with pytest.raises(UserError, match="uint16 cannot hold the 128,256"):
        pair.check_ids(2, 128_256)


def test_damaged_pairs(tmp_path: Path) -> None:
    """An index that points beyond its .bin, and whatever else Megatron would believe."""
    write_pair(tmp_path / "a", PAIR)
    bin_, idx = (tmp_path / "a.bin").read_bytes(), (tmp_path / "a.idx").read_bytes()

    def said(bin_: bytes, idx: bytes) -> str:
        (tmp_path / "a.bin").write_bytes(bin_)
        (tmp_path / "a.idx").write_bytes(idx)
        with pytest.raises(UserError) as error:
            token_pair.TokenPair(tmp_path / "a.idx")
        return str(error.value)

    assert "document 3: ends behind the end" in said(bin_[:15], idx)
    assert "of which" in said(bin_ + b"xx", idx)
    assert "cut off" in said(bin_, idx[:-8])
    assert "pictures" in said(bin_, idx + bytes(4))
    assert "number format" in said(bin_, idx[:17] + b"\x06" + idx[18:])
    assert "not a Megatron index" in said(bin_, idx[:20])
    lengths = 34
    changed = bytearray(idx)
    changed[lengths : lengths + 4] = (0).to_bytes(4, "little")
    assert "document 1: has no ids" in said(bin_, bytes(changed))
    changed = bytearray(idx)
    changed[lengths + 16 + 8 : lengths + 16 + 16] = (99).to_bytes(8, "little")
    assert "document 2: begins at byte 99, not 8" in said(bin_, bytes(changed))
    write_pair(tmp_path / "b", PAIR)
    builder = IndexedDatasetBuilder(str(tmp_path / "b.bin"), dtype=np.uint16)
    builder.add_document(np.array([1, 2, 3, 2], np.uint16), [2, 2])
    builder.finalize(str(tmp_path / "b.idx"))
    with pytest.raises(UserError, match="several sequences"):
        token_pair.TokenPair(tmp_path / "b.idx")
