"""Users' text: files and directories, read as a stream of documents.

Every defect is a :class:`UserError` that names the file and the line or row, so that it can be
found in a corpus of a thousand shards.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from megatron_btx.data.formats import Part, format_of
from megatron_btx.data.formats.compression import COMPRESSIONS
from megatron_btx.data.formats.part import index_file, is_prefix
from megatron_btx.errors import UserError
from megatron_btx.files import read_json

_JSON = tuple(
    json + compressed
    for json in (".jsonl", ".ndjson", ".json")
    for compressed in ("", *(suffix for kind in COMPRESSIONS for suffix in kind.suffixes))
)
SUFFIXES = (*_JSON, ".parquet", ".arrow", ".idx")
"""Endings of the files that are read from a directory, in any case. How a file is read is decided
by its content, not its name. The ``.idx`` of a Megatron pair stands for both files."""

_COMPANIONS = re.compile(
    r"(readme|licen[cs]e|notice|copying|authors|citation|changelog).*|.*\.(md|rst|log)"
    r"|_success|_metadata|_common_metadata|.*\.(md5|sha1|sha256|sha512|crc|sig|asc|lock)"
    r"|(md5|sha1|sha256|sha512)sums?(\.txt)?|checksums?(\.txt)?"
)
"""Files in a data directory that hold no text and are skipped, as hidden files are; unless they are
tables or lines of text by their endings: ``citations.jsonl`` may well be a corpus."""
_OF_DATASETS = re.compile(r"dataset_infos?\.json|dataset_dict\.json|cache-.*\.arrow")
"""Likewise, what the library ``datasets`` writes beside its data; and its state.json."""


def find_files(paths: Sequence[str | Path], *, where: str) -> list[Path]:
    """The files that ``paths`` (files, directories, prefixes of Megatron pairs) stand for.

    Args:
        paths: in their order; the files of a directory, searched recursively, are in the order of
            their names. Of a directory that ``datasets`` saved, the files in its state.json.
        where: the recipe's key, for messages.

    Raises:
        UserError: a path is missing or not a regular file, a file is empty, or a directory has
            no file that is read, or one that is neither read nor skipped.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += _in_directory(path, where)
        elif is_prefix(path):
            files.append(index_file(path))
        elif os.path.lexists(path):
            files.append(path)
        else:
            raise UserError(where, f"{path} does not exist", "correct the path")
    for file in files:
        _check_file(file, where)
    return files


def read_documents(files: Sequence[Path], text_key: str = "text") -> Iterator[str]:
    """The documents of ``files`` in order.

    Raises:
        UserError: naming file and line or row, if something is not text; for a file without
            documents; and for a Megatron pair, which holds ids.
    """
    for file in files:
        count = 0
        for _, text in format_of(file).read(Part(file), text_key):
            yield text
            count += 1
        if not count:
            raise no_document(file)


def no_document(file: Path) -> UserError:
    """The error for a file without documents."""
    return UserError(str(file), "holds no document", "remove it, or write documents to it")


def _check_file(file: Path, where: str) -> None:
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(
            where, f"{file} cannot be read ({error.strerror})", "make it readable, or remove it"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(where, f"{file} is not a regular file", "write the text to one")
    if status.st_size == 0:
        raise UserError(where, f"{file} is empty", "remove it, or write documents to it")
    if not os.access(file, os.R_OK):
        raise UserError(where, f"{file} may not be read", "change its permissions")


def _in_directory(directory: Path, where: str) -> list[Path]:
    found: list[Path] = []
    others: list[Path] = []
    for file in sorted(_walk(directory, where)):
        if not _is_companion(file):
            (found if file.name.lower().endswith(SUFFIXES) else others).append(file)
    if others:
        names = ", ".join(str(file.relative_to(directory)) for file in others[:5])
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise UserError(
            where,
            f"{directory} contains files of an unsupported type: {names}{more}",
            f"remove them, or name the files to read (supported: {', '.join(SUFFIXES)})",
        )
    if not found:
        raise UserError(
            where,
            f"the directory {directory} holds no file of a supported type: {', '.join(SUFFIXES)}",
            "name a directory with such files, or the files themselves",
        )
    return _as_saved(directory, found, where)


def _is_companion(file: Path) -> bool:
    """Whether a file is skipped: it says something of others, or belongs to an ``.idx``."""
    name = file.name.lower()
    if name == "state.json" and _is_saved(file.parent):
        return True
    if name.endswith(SUFFIXES) and not name.endswith(".json"):
        return _OF_DATASETS.fullmatch(name) is not None
    known = _COMPANIONS.fullmatch(name) or _OF_DATASETS.fullmatch(name)
    return known is not None or (name.endswith(".bin") and is_prefix(file))


def _is_saved(place: Path) -> bool:
    """Whether ``datasets.save_to_disk`` wrote a directory."""
    return all((place / name).is_file() for name in ("state.json", "dataset_info.json"))


def _walk(directory: Path, where: str) -> Iterator[Path]:
    """Every file below that is not hidden. A link to a directory is an error."""

    def fail(error: OSError) -> None:
        raise UserError(
            where, f"{error.filename} cannot be read ({error.strerror})", "make it readable"
        )

    for place, directories, names in os.walk(directory, onerror=fail):
        directories[:] = [name for name in directories if not name.startswith(".")]
        for name in directories:
            if Path(place, name).is_symlink():
                raise UserError(
                    where,
                    f"{Path(place, name)} is a link to a directory, which is not followed",
                    "name that directory itself",
                )
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _as_saved(directory: Path, found: list[Path], where: str) -> list[Path]:
    """Files with those of ``datasets.save_to_disk`` directories as their state.json lists them."""
    listed: dict[Path, list[Path]] = {}
    for place in dict.fromkeys([directory, *(file.parent for file in found)]):
        if (place / "dataset_dict.json").is_file():
            splits = read_json(place / "dataset_dict.json").get("splits")
            raise UserError(
                where,
                f"{place} is a DatasetDict with the splits {splits}",
                "give the directory of one split",
            )
        state = read_json(place / "state.json") if _is_saved(place) else {}
        if "_data_files" not in state:
            continue
        if state.get("_indices_data_files"):
            raise UserError(
                where, f"{place} is a selection of rows", "save it anew: flatten_indices() first"
            )
        try:
            listed[place] = [place / str(entry["filename"]) for entry in state["_data_files"]]
        except (TypeError, KeyError) as error:
            raise UserError(where, f"{place}/state.json is damaged", "save it again") from error
    here = [file for file in found if file.parent not in listed]
    saved = list(chain.from_iterable(listed.values()))
    wrong = {file for file in found if file.parent in listed} ^ set(saved)
    if wrong:
        raise UserError(
            where,
            f"{min(wrong)}: the directory and its state.json list different files",
            "save the data set again",
        )
    return here + saved
