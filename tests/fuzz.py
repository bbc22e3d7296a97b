"""Seeded damage to files of every kind that a user may hand us.

``damage(path, seed)`` changes one file in one way; the same seed, the same way. JSON, YAML and
JSON lines are changed as trees (types, ranges, nesting, sizes, doubled and unknown keys) and as
text; everything else as bytes, its headers and archives' directories among them; and anything may
turn into something that is no file.
"""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 1e9, 10**12, -(10**30), 0.5, 1e-300, float("nan"), float("inf"),
    "", "x", "7", "false", "\x1b[31mred", "a\nb", "\u202egnp", "../../etc", "z" * 300_000,
    [], [1], [[]], {}, {"a": {"b": []}}, [None] * 5000,
)  # fmt: skip
LITERALS = (
    "9" * 5000,
    "1e999",
    "NaN",
    "[" * 100_000,
    '{"a":' * 50_000,
    "\x00",
    "'",
    "*a",
    "&a [*a]",
)


def damage(path: Path, seed: int) -> str:
    """Change the file; what was done, in words."""
    r = random.Random(f"{path.name}/{seed}")
    if r.random() < 0.08:
        return _replace(path, r)
    if path.suffix in (".json", ".jsonl", ".yaml"):
        (change,) = r.choices((_tree, _text, _bytes), (6, 2, 1))
        return change(path, r)
    if path.suffix == ".safetensors" and r.random() < 0.6:
        return _safetensors(path, r)
    return _bytes(path, r)


def _replace(path: Path, r: random.Random) -> str:
    """Something that is no file of its kind."""
    path.unlink()
    kind = r.choice(("nothing", "empty", "directory", "fifo", "zero", "loop", "noise"))
    if kind == "empty":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "noise":
        path.write_bytes(r.randbytes(3000))
    return f"{kind} in its place"


def _tree(path: Path, r: random.Random) -> str:
    """One value, key or item of a JSON or YAML tree."""
    import yaml

    lines = path.read_text(encoding="utf-8").splitlines()
    at = r.randrange(len(lines)) if path.suffix == ".jsonl" else 0
    text = lines[at] if path.suffix == ".jsonl" else path.read_text(encoding="utf-8")
    tree = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    places = list(_places(tree))
    if not places:
        return _text(path, r)
    holder, key = r.choice(places)
    kind = r.choice(("value", "value", "value", "remove", "key", "wrap"))
    if kind == "value":
        holder[key] = r.choice(VALUES)
    elif kind == "remove":
        del holder[key]
    elif kind == "key" and isinstance(holder, dict):
        holder[r.choice(("unknown", "", "\x1b[2J", "k" * 1000, str(key) + "s"))] = holder[key]
    else:
        holder[key] = [holder[key]]
    text = json.dumps(tree)  # which is YAML too
    if path.suffix == ".jsonl":
        lines[at] = text
        text = "\n".join(lines) + "\n"
    path.write_text(text, encoding="utf-8")
    return f"{kind} at {str(key)[:40]!r}: {text[:80]!r}"


def _places(tree: Any) -> Any:
    """Every (holder, key) of a tree."""
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


def _text(path: Path, r: random.Random) -> str:
    """The text itself: cut, doubled, or with a strange word in it."""
    text = path.read_text(encoding="utf-8")
    at = r.randrange(len(text) + 1)
    kind = r.choice(("cut", "double", "word", "utf-16", "mark"))
    changed = {
        "cut": text[:at],
        "double": text[:at] + text[max(0, at - 60) :],
        "word": text[:at] + r.choice(LITERALS) + text[at:],
        "utf-16": text,
        "mark": "\ufeff" + text,
    }[kind]
    path.write_text(changed, encoding="utf-16" if kind == "utf-16" else "utf-8")
    return f"{kind} at {at}"


def _bytes(path: Path, r: random.Random) -> str:
    """Bytes: cut, cleared, flipped, doubled, or with others in between."""
    data = bytearray(path.read_bytes())
    at, size = r.randrange(len(data) + 1), r.randrange(1, 400)
    kind = r.choice(("cut", "clear", "flip", "insert", "end", "length"))
    if kind == "cut":
        del data[at:]
    elif kind == "clear":
        data[at : at + size] = bytes(len(data[at : at + size]))
    elif kind == "flip" and data:
        for _ in range(r.choice((1, 1, 8, 64))):
            data[r.randrange(len(data))] ^= 1 << r.randrange(8)
    elif kind == "insert":
        data[at:at] = r.randbytes(size)
    elif kind == "end":  # where an archive has its directory
        data[-min(size, len(data)) :] = r.randbytes(min(size, len(data)))
    else:
        data[at : at + 8] = struct.pack("<Q", r.choice((0, 1 << 31, 1 << 40, (1 << 64) - 1)))
    path.write_bytes(bytes(data))
    return f"{kind} at {at}"


def _safetensors(path: Path, r: random.Random) -> str:
    """The header: its length, or one value of it."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    if r.random() < 0.2:
        path.write_bytes(
            struct.pack("<Q", r.choice((0, 1, length - 1, 1 << 27, 1 << 62))) + data[8:]
        )
        return "length of the header"
    header = json.loads(data[8 : 8 + length])
    holder, key = r.choice(list(_places(header)))
    if r.random() < 0.2:
        del holder[key]
    else:
        holder[key] = r.choice((*VALUES, [0, 1 << 50], [-8, 8], "F64", "I4", [1 << 40, 1 << 40]))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return f"header at {str(key)[:60]!r}"
