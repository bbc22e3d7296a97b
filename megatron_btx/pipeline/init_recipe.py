"""``btx init --seed``: checkpoints and text looked at, and a recipe written for them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_btx.data.documents import find_files, read_documents
from megatron_btx.data.formats import format_of, json_lines
from megatron_btx.data.formats.compression import compression_of
from megatron_btx.data.formats.token_pair import TokenPair
from megatron_btx.data.tokenizer import Tokenizer, given_tokenizer, tokenizer_of
from megatron_btx.errors import UserError, UserErrors, collect_errors, errors_of
from megatron_btx.families.open_checkpoint import open_checkpoint
from megatron_btx.files import written
from megatron_btx.pipeline import graph, import_checkpoint
from megatron_btx.recipe import check_paths
from megatron_btx.recipe.load import parse_recipe
from megatron_btx.recipe.schema import Model
from megatron_btx.recipe.starter import Start, Text, compose
from megatron_btx.weights.find_checkpoint import find_checkpoint

SAMPLE = 1 << 20
"""Characters of a file of text that are tokenized to estimate how many tokens it has."""
LONGEST = 4096
"""Of a training sequence, unless another length is asked for: the paper's."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line says."""

    out: Path
    name: str
    seed: Path
    experts: Mapping[str, Path | None]
    train: Mapping[str, Sequence[Path]]
    valid: Mapping[str, Sequence[Path]]
    tokenizer: Path | None
    align_vocab: bool
    gpus: int
    gpu_bytes: float
    seq_length: int | None


def begin(asked: Asked, wrong: Sequence[UserError] = ()) -> str:
    """Write the recipe; its text.

    Args:
        asked: for what.
        wrong: of the command line, which is told with whatever else is.

    Raises:
        UserErrors: a checkpoint, a text or their fit is wrong; nothing is written.
    """
    model, tokenizer = _seed(asked, wrong)
    start = Start(
        name=asked.name,
        model=model,
        seed=asked.seed,
        experts=dict(asked.experts),
        domains=_domains(asked, tokenizer),
        tokenizer=asked.tokenizer,
        align_vocab=asked.align_vocab,
        gpus=asked.gpus,
        gpu_bytes=asked.gpu_bytes,
        cores=len(os.sched_getaffinity(0)),
    )
    text = compose(start, asked.out)
    recipe = parse_recipe(text, asked.out)
    try:
        import_checkpoint.check_export(recipe)
    except UserError:
        text = compose(replace(start, exported=False), asked.out)
        recipe = parse_recipe(text, asked.out)
    check_paths.files(recipe)
    import_checkpoint.check_all(recipe, graph.build(recipe))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with written(asked.out) as file:
        file.write(text)
    return text


def _seed(asked: Asked, wrong: Sequence[UserError]) -> tuple[Model, Tokenizer]:
    """The seed's model, as it is trained on here, and its tokenizer; all else that is asked is
    looked at too, so that everything wrong with it is told at once."""
    errors = list(wrong)
    if os.path.lexists(asked.out):
        fix = "move it away, or give another --out"
        errors.append(UserError(str(asked.out), "exists already", fix))
    if not wrong:  # what could not be read is no name that is missing
        with collect_errors(errors):
            _check_names(asked)
    with collect_errors(errors):
        model = _model(asked)
    with collect_errors(errors):
        tokenizer = _tokenizer(asked)
    for name, path in asked.experts.items():
        with collect_errors(errors), errors_of(f"--expert {name}"):
            if path is not None:
                find_checkpoint(path, dense=name)
    for flag, texts in (("--data", asked.train), ("--valid", asked.valid)):
        for name, paths in texts.items():
            with collect_errors(errors):
                find_files(paths, where=f"{flag} {name}")
    if errors:
        raise UserErrors(list({str(error): error for error in errors}.values()))
    return model, tokenizer


def _model(asked: Asked) -> Model:
    seed = open_checkpoint(asked.seed, "seed", dense=True)
    if seed.architecture.experts:
        what = f"{asked.seed} is a mixture of experts"
        raise UserError("--seed", what, "give the dense model that the experts were branched from")
    model = seed.architecture.model
    length = asked.seq_length or min(model.max_position_embeddings or model.seq_length, LONGEST)
    longest = model.max_position_embeddings or model.seq_length
    return replace(model, seq_length=length, max_position_embeddings=longest)


def _check_names(asked: Asked) -> None:
    errors = []
    if not asked.experts:
        fix = "--expert code=DIR takes a checkpoint, --expert code trains one on --data code=FILE"
        errors.append(UserError("--expert", "is missing", fix))
    if not asked.train:
        errors.append(UserError("--data", "is missing", "give text: --data code=code.jsonl ..."))
    for name, taken in asked.experts.items():
        if taken is None and name not in asked.train:
            what = f"{name} has neither a checkpoint nor text to be trained on"
            errors.append(UserError("--expert", what, f"{name}=DIR, or --data {name}=FILE"))
    for name in asked.valid:
        if name not in asked.train:
            errors.append(UserError("--valid", f"{name} has no --data", f"--data {name}=FILE"))
    if errors:
        raise UserErrors(errors)


def _tokenizer(asked: Asked) -> Tokenizer:
    if asked.tokenizer is not None:
        return given_tokenizer(asked.tokenizer)
    return tokenizer_of(find_checkpoint(asked.seed, dense="seed"))


def _domains(asked: Asked, tokenizer: Tokenizer) -> dict[str, Text]:
    found, errors = {}, list[UserError]()
    for name, paths in asked.train.items():
        with collect_errors(errors):
            files = find_files(paths, where=f"--data {name}")
            found[name] = Text(
                train=tuple(paths),
                valid=tuple(asked.valid.get(name, ())),
                tokens=sum(_tokens(file, tokenizer) for file in files),
            )
    if errors:
        raise UserErrors(errors)
    return found


def _tokens(file: Path, tokenizer: Tokenizer) -> int:
    """How many a file has: a pair's own count, else its text's bytes over the bytes of a token at
    its beginning."""
    if file.suffix == ".idx":
        return int(TokenPair(file).lengths.sum())
    documents = read_documents([file])
    texts = list(_beginning(documents))
    tokens = sum(len(ids) + 1 for ids in tokenizer.encode(texts))
    read = sum(len(text.encode()) for text in texts)
    if format_of(file) is json_lines and compression_of(file) is None:
        rest = max(0, file.stat().st_size - read) if next(documents, None) is not None else 0
    else:  # the size of such a file says little of its text's
        rest = sum(len(text.encode()) for text in documents)
    return round(tokens * (1 + rest / read))


def _beginning(documents: Iterator[str]) -> Iterator[str]:
    seen = 0
    while seen < SAMPLE and (text := next(documents, None)) is not None:
        yield text
        seen += len(text)
