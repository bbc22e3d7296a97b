"""Model cards: the README.md of a Hugging Face directory, as the hub reads it, and beside it
``verification.json``. Every figure in either stands in a file of the run or the mix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_btx.errors import UserError
from megatron_btx.files import read_json
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.count import parameters
from megatron_btx.weights.directory import add_files, as_json

CARD, VERIFICATION = "README.md", "verification.json"
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
"""A directory of the hub's cache, which says the model's name there."""


_CHECKED = "## Checked"


@dataclass(frozen=True, kw_only=True)
class CardModel:
    """A model that another was made of."""

    name: str
    what: str
    """``expert 0``, ``the seed``, ..."""
    path: str
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Of its files, where they were hashed."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Something that was checked: how it came out, and the command that checks it."""

    claim: str
    figure: Mapping[str, Any]
    command: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card says."""

    title: str
    method: str
    """A paragraph."""
    architecture: Architecture
    models: Sequence[CardModel]
    sections: Mapping[str, str] = field(default_factory=dict)
    """Heading -> Markdown."""
    claims: Sequence[Claim] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    code: str | None = None

    def files(self) -> dict[str, bytes]:
        """README.md and verification.json."""
        claims = {"claims": [asdict(claim) for claim in self.claims]}
        return {CARD: self.text().encode(), VERIFICATION: as_json(claims)}

    def text(self) -> str:
        """The README.md."""
        parts = [f"---\n{self._metadata()}---", f"# {one_line(self.title)}", self.method]
        parts += ["## Model", self._model(), "## Made of", self._models()]
        for heading, body in self.sections.items():
            parts += [f"## {heading}", body]
        if self.claims:
            parts += [_CHECKED, _claims(self.claims)]
        parts += ["## Versions", self._versions()]
        return "\n\n".join(parts) + "\n"

    def _metadata(self) -> str:
        tags = ["megatron-btx"]
        if self.architecture.experts:
            tags += ["moe", "branch-train-mix"]
        found: dict[str, Any] = {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": tags,
        }
        if bases := list(filter(None, (hub_id(model.path) for model in self.models))):
            found |= {"base_model": bases, "base_model_relation": "merge"}
        return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)

    def _model(self) -> str:
        counts, shape = parameters(self.architecture), self.architecture.model
        facts = {
            "parameters": f"{counts.total_true_vocab:,}",
            "active a token": f"{counts.active:,}",
            "layers": str(shape.num_layers),
            "hidden size": str(shape.hidden_size),
            "vocabulary": f"{self.architecture.vocab_size:,}",
        }
        if (routing := self.architecture.routing) is not None:
            facts["experts"] = ", ".join(
                f"{place}: {cell(name)}" for place, name in enumerate(self.architecture.experts)
            )
            facts["routing"] = f"{routing.type}, {routing.moe_router_topk} a token"
            if routing.type != "topk":
                facts["routing"] = routing.type
        return table(("", ""), facts.items())

    def _models(self) -> str:
        rows = [(m.name, m.what, hub_id(m.path) or _shown(m.path)) for m in self.models]
        text = table(("model", "what it is", "from"), rows)
        hashed = [
            f"- {cell(model.name)}, {cell(name)}: `{digest}`"
            for model in self.models
            for name, digest in model.sha256.items()
        ]
        return "\n".join([text, "\nSHA-256 of their files:\n", *hashed] if hashed else [text])

    def _versions(self) -> str:
        said = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return said + (f"; code {self.code}" if self.code else "")


def record(directory: Path, claim: Claim) -> None:
    """Put a claim into a model's verification.json and its card, in the place of an earlier one.

    Raises:
        UserError: it has no verification.json, or a damaged one.
    """
    where = directory / VERIFICATION
    if not where.is_file():
        what = "has no verification.json: no Hugging Face directory that was written here"
        raise UserError(str(directory), what, "leave --record away")
    try:
        known = [Claim(**one) for one in read_json(where)["claims"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(str(where), f"damaged: {error!r}", "write the model again") from error
    claims = [one for one in known if one.claim != claim.claim] + [claim]
    content = {"claims": [asdict(one) for one in claims]}
    files = {VERIFICATION: as_json(content)}
    if (directory / CARD).is_file():
        text = (directory / CARD).read_text(encoding="utf-8")
        before, heading, rest = text.partition(f"{_CHECKED}\n\n")
        _, end, after = rest.partition("\n\n## ")
        if heading and end:
            files[CARD] = f"{before}{heading}{_claims(claims)}{end}{after}".encode()
    add_files(directory, files)


def hub_id(path: str) -> str | None:
    """A model's name on the Hugging Face Hub, where its path is one of the hub's cache."""
    found = (_CACHED.fullmatch(part) for part in Path(path).parts)
    return next((f"{match[1]}/{match[2]}" for match in found if match), None)


def _shown(path: str) -> str:
    """A path without what it says of its author's machine."""
    return Path(path).name if Path(path).is_absolute() else path


def engines(llama_cpp: Sequence[str]) -> dict[str, str]:
    """The section about engines that do not compute a model; none where all do.

    Args:
        llama_cpp: why it does not (families/llama_cpp.py).
    """
    if not llama_cpp:
        return {}
    lines = "\n".join(f"- {line}" for line in llama_cpp)
    return {"Engines": f"llama.cpp does not compute this model:\n\n{lines}"}


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """As Markdown."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def cell(text: str) -> str:
    """A text inside a table: on one line, and nothing in it is Markdown's or HTML's."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", one_line(str(text)))


def one_line(text: str) -> str:
    """Without line breaks and other control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _claims(claims: Sequence[Claim]) -> str:
    rows = [
        (one.claim, ", ".join(f"{k} {_short(v)}" for k, v in one.figure.items()), one.command)
        for one in claims
    ]
    return table(("claim", "figure", "command"), rows) + f"\n\nThe same in `{VERIFICATION}`."
