"""Real text on every machine that can run this project: Python sources and English prose.

Code is the standard library's modules. Prose is pydoc's topics, the descriptions that packages
are shipped with, and the docstrings of packages we depend on, with everything that is not a
paragraph of English sentences taken out.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

PACKAGES = (
    "torch", "sympy", "numpy", "networkx", "megatron", "transformers", "mpmath", "wandb",
    "huggingface_hub", "pydantic", "setuptools", "pip", "jinja2", "fsspec", "rich", "yaml",
    "safetensors", "psutil", "tokenizers", "requests", "urllib3", "packaging", "click",
)  # fmt: skip
"""Packages that the project's dependencies install; a missing one is skipped."""

_SKIPPED = {
    "__pycache__", "site-packages", "dist-packages", "_bundled", "_vendor", "node_modules",
    "pydoc_data", "encodings", "idle_test", "__phello__",
}  # fmt: skip
_TESTS = {"test", "tests", "testing", "_test"}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that text is taken from; ``name`` identifies it on any machine."""

    name: str
    path: Path

    def order(self, seed: int) -> int:
        """A number in [0, 2^64) drawn from the name: the file's place, and its role."""
        return int.from_bytes(hashlib.sha256(f"{seed}/{self.name}".encode()).digest()[:8], "big")

    def read(self) -> str:
        """The file's text; empty if it cannot be read or is not UTF-8."""
        try:
            return self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return ""


def stdlib_sources(*, tests: bool = False) -> list[SourceFile]:
    """Modules of the running Python's standard library (``tests``: its test suite instead)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [
        SourceFile(f"python/{path.relative_to(root).as_posix()}", path)
        for path in _python_files(root)
        if bool(_TESTS & set(path.relative_to(root).parts)) is tests
    ]


def package_sources() -> list[SourceFile]:
    """Modules of those :data:`PACKAGES` that are installed, without their tests."""
    sources: list[SourceFile] = []
    for package in PACKAGES:
        spec = _find(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in _python_files(root):
            parts = path.relative_to(root).parts
            if not _TESTS & set(parts):
                sources.append(SourceFile("/".join((package, *parts)), path))
    return sources


def _find(package: str) -> ModuleSpec | None:
    """Where a package is. Not by importlib.util.find_spec: asked for pip, a hook of setuptools goes
    back to the standard library's distutils, and torch cannot be imported any more."""
    return PathFinder.find_spec(package)


def _python_files(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        return
    for path in sorted(root.iterdir()):
        if path.is_dir():
            if path.name not in _SKIPPED and not path.is_symlink():
                yield from _python_files(path)
        elif path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
            yield path


def code(text: str) -> str:
    """``text`` if it is a program, empty if it is a table or next to nothing."""
    sample = text[:20_000]
    if not 300 <= len(text) <= 400_000 or "\0" in text:
        return ""
    letters = sum(c.isalpha() for c in sample)
    digits = sum(c.isdigit() for c in sample)
    return text if letters > 0.4 * len(sample) and digits < 0.12 * len(sample) else ""


_STRINGS = re.compile(r'[rRuU]?("""|\'\'\')(.*?)\1', re.DOTALL)
_COMMENTS = re.compile(r"(?:^[ \t]*#[^\n]*\n){2,}", re.MULTILINE)
_COMMENT_MARK = re.compile(r"^[ \t]*#+ ?", re.MULTILINE)


def code_without_docstrings(text: str) -> str:
    """A program without its long strings, which the prose is made of."""
    return code(_STRINGS.sub('"..."', text))


class Prose:
    """Extracts paragraphs of English from documentation, each paragraph once."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def copy(self) -> Prose:
        """A copy that knows the paragraphs extracted so far."""
        other = Prose()
        other._seen = set(self._seen)
        return other

    def of_module(self, text: str) -> str:
        """The prose in a module's docstrings and comments, paragraphs apart by a blank line."""
        texts = [match[1] for match in _STRINGS.findall(text) if len(match[1]) > _SHORTEST]
        blocks = _COMMENTS.findall(text)
        texts += [_COMMENT_MARK.sub("", block) for block in blocks if len(block) > 2 * _SHORTEST]
        return self.of_texts(texts)

    def of_texts(self, texts: Iterable[str]) -> str:
        """The prose in ``texts``."""
        kept: list[str] = []
        for text in texts:
            for paragraph in _paragraphs(text):
                key = hashlib.blake2b(paragraph.lower().encode(), digest_size=12).digest()
                if key not in self._seen:
                    self._seen.add(key)
                    kept.append(paragraph)
        return "\n\n".join(kept) + "\n" if sum(map(len, kept)) >= 250 else ""


def documentation() -> Iterator[tuple[str, str]]:
    """(name, text) of Python's help topics and of the packages' own descriptions."""
    try:
        from pydoc_data.topics import topics

        for name, text in sorted(topics.items()):
            yield f"pydoc/{name}", text
    except ImportError:  # some distributions leave it out
        pass
    site = _find("numpy")
    if site is None or site.origin is None:
        return
    for metadata in sorted(Path(site.origin).parents[1].glob("*.dist-info/METADATA")):
        text = SourceFile("", metadata).read().partition("\n\n")[2]
        yield f"metadata/{metadata.parent.name.partition('-')[0]}", text


_FENCE = re.compile(r"^[ \t]*```.*?^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
_LITERAL = re.compile(r"^([ \t]*)(?:\.\. .*|[^\n]*)::[ \t]*\n(?:[ \t]*\n|\1[ \t]+[^\n]*\n)+", re.M)
_MARKUP = (
    ("`", re.compile(r":[\w:]+:`~?([^`<]+?)(?: *<[^>`]*>)?`"), r"\1"),
    ("](", re.compile(r"!?\[([^\]\n]*)\]\([^)\n]*\)"), r"\1"),
    ("`", re.compile(r"`+([^`\n]+)`+_*"), r"\1"),
    ("**", re.compile(r"\*\*(?=\S)([^*\n]+?)\*\*"), r"\1"),
    ("*", re.compile(r"(?<![\w*])\*(?=\w)([^*\n]+?)\*"), r"\1"),
)
_SHORTEST = 60
"""Characters of a paragraph."""
_PLAIN = re.compile(r"[^\W\d_]+|[ ,.'\-;:()?!]+")
_COMMON = {
    "the", "of", "to", "a", "an", "and", "is", "in", "that", "for", "it", "as", "be", "are",
    "with", "this", "by", "on", "or", "not", "if", "from", "can", "which", "will", "when",
    "at", "has", "have", "was", "but", "you", "we", "all", "any", "its", "no", "there",
    "than", "one", "used", "use", "may", "should", "must", "these", "into", "only", "other",
    "such", "how", "each", "they", "does", "do", "so", "then", "where", "what", "using",
    "between", "your",
}  # fmt: skip
_LIST_ITEM = re.compile(r"(?:[-*+•]|\(?\d+[.)])\s+")
_FIELD = re.compile(r"^[\w.*, ]{1,40}(?:\([^)]*\))? ?: ")


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of English sentences, each on one line, without markup."""
    first, _, rest = text.expandtabs().partition("\n")
    text = first.strip() + "\n" + textwrap.dedent(rest) + "\n"
    text = _LITERAL.sub("\n", _FENCE.sub("", text))
    for block in re.split(r"\n[ \t]*\n", text):
        if len(block) < _SHORTEST:
            continue
        for part in _items(block):
            if len(part) < _SHORTEST or "://" in part or "\\" in part:
                continue
            line = " ".join(part.split())
            for mark, pattern, replacement in _MARKUP:
                if mark in line:
                    line = pattern.sub(replacement, line)
            line = _FIELD.sub("", _LIST_ITEM.sub("", line, count=1), count=1)
            if _is_english(line):
                yield line


def _items(block: str) -> Iterator[str]:
    """A block's paragraphs: a list item or an indented description starts one of its own."""
    lines = block.split("\n")
    if any(">>>" in line or line.lstrip().startswith(("|", "+-", "..")) for line in lines):
        return
    gathered: list[str] = []
    indent = -1
    for line in lines:
        stripped = line.strip()
        here = len(line) - len(line.lstrip())
        new_item = bool(_LIST_ITEM.match(stripped)) or (here != indent and bool(gathered))
        if not stripped or not stripped.strip("=-~^*#_\"'`+.") or new_item:
            yield " ".join(gathered)
            gathered = []
        if stripped.strip("=-~^*#_\"'`+."):
            gathered.append(stripped)
            # The lines under a list item hang from its text, not from its mark.
            item = _LIST_ITEM.match(stripped)
            indent = here + (item.end() if item else 0)
    yield " ".join(gathered)


def _is_english(line: str) -> bool:
    if len(line) < _SHORTEST or line[-1] not in ".!?:)\"'" or not line[0].isupper():
        return False
    words = line.lower().split()
    if len(words) < 10 or sum(word in _COMMON for word in words) < 0.28 * len(words):
        return False
    return "==" not in line and len(_PLAIN.sub("", line)) < 0.05 * len(line)
