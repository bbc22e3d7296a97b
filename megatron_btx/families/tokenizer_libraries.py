"""A tokenizer's file opened by its library: ``tokenizer.json`` by ``tokenizers``, completed as by
``transformers``, and ``tokenizer.model`` by ``sentencepiece``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_btx.errors import UserError, UserErrors, capped
from megatron_btx.families.tokenizer_settings import CONFIG, TokenizerSettings

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

_AGAIN = "copy or download the tokenizer's files again, all of them"


def open_fast(path: Path, settings: TokenizerSettings) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json``, without truncation and padding.

    Added tokens of ``tokenizer_config.json`` and special ones that tokenizer.json has in its
    vocabulary only are added, in the order of ``TokenizersBackend.__init__`` of ``transformers`` 5.

    Raises:
        UserErrors: no library, a damaged file, or tokens are named that it does not have.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            str(path),
            "a Hugging Face tokenizer needs the `tokenizers` library",
            "pip install 'megatron-btx[hf]'",
        ) from error
    with no_panic(str(path)):
        found = tokenizers.Tokenizer.from_file(str(path))
        found.no_padding()
        found.no_truncation()
        _complete(found, settings, path)
        _check_space(found, settings)
    found.encode_special_tokens = bool(settings.flag("split_special_tokens"))
    return found


@contextmanager
def no_panic(where: str) -> Iterator[None]:
    """Whatever the library raises over a damaged file as one error: it has no types of its own, and
    its panics are no ``Exception``."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        fix = "give a model's tokenizer.json, or download it again"
        raise UserError(where, f"is not a tokenizer: {said}", fix) from error


def _complete(found: Tokenizer, settings: TokenizerSettings, path: Path) -> None:
    from tokenizers import AddedToken

    vocabulary = found.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise UserError(str(path), "has an empty vocabulary", _AGAIN)
    wrong = [
        UserError(
            str(settings.directory),
            f"a token {token.content!r} is named"
            + (f" with the id {token.id}" if token.id is not None else "")
            + f", which tokenizer.json has {_as(vocabulary.get(token.content))}",
            "write both anew: transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
        for token in settings.tokens
        if vocabulary.get(token.content) is None
        or token.id not in (None, vocabulary[token.content])
    ]
    if wrong:
        raise UserErrors(capped(wrong))
    here = found.get_added_tokens_decoder().values()
    same, known = {repr(token) for token in here}, {token.content for token in here}
    special = {token.content for token in settings.named.values()}
    more = []
    for token in sorted(settings.added, key=lambda each: each.id or 0):
        made = AddedToken(token.content, **token.flags)
        if repr(made) not in same:
            made.special = made.special or token.content in special
            more.append(made)
            known.add(token.content)
    for token in (*settings.named.values(), *settings.extra):
        if token.content not in known:
            more.append(AddedToken(token.content, **{**token.flags, "special": True}))
            known.add(token.content)
    if more:
        found.add_tokens(more)


def _check_space(found: Tokenizer, settings: TokenizerSettings) -> None:
    """That tokenizer.json puts a space before a text where tokenizer_config.json says so, and else
    not: where they differ, the one counts in some classes and versions, the other in others."""
    said = settings.flag("add_prefix_space")
    first = found.encode("a", add_special_tokens=False).tokens[:1]
    if said is not None and first and first[0].startswith(("\u2581", "\u0120")) != said:
        raise UserError(
            str(settings.directory / CONFIG),
            f"add_prefix_space is {said}, and tokenizer.json does the contrary",
            "keep the one that the model was trained with in a copy of the files",
        )


def _as(id_: int | None) -> str:
    return "not" if id_ is None else f"as {id_}"


def begin_token(tokenizer: Tokenizer, where: str) -> int | None:
    """What a tokenizer puts before a text: asked of itself, by encoding a text with its special
    tokens and without; ``None``: nothing.

    Raises:
        UserError: it puts several there, or changes the text.
    """
    text = "a"
    with no_panic(where):
        plain = tokenizer.encode(text, add_special_tokens=False).ids
        whole = tokenizer.encode(text, add_special_tokens=True).ids
    starts = [
        at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain
    ]
    if not plain or not starts or starts[0] > 1:
        what = f"{text!r} is {plain}, with special tokens {whole}: at most one can stand in front"
        raise UserError(where, what, "give a tokenizer of a causal language model")
    return whole[0] if starts[0] == 1 else None


def open_slow(model: bytes, where: str) -> SentencePieceProcessor:
    """A SentencePiece model, whole: every piece is text.

    Args:
        model: the bytes of a ``.model`` file.
        where: names it in messages.

    Raises:
        UserError: it is none, or damaged.
    """
    import sentencepiece

    try:
        if not model:
            raise RuntimeError
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces = [processor.id_to_piece(at) for at in range(processor.vocab_size())]
    except (RuntimeError, ValueError) as error:  # the latter: text that is no UTF-8
        raise UserError(
            where, "is not a SentencePiece model", "give a `.model` file that spm_train wrote"
        ) from error
    if len(set(pieces)) < len(pieces) or not pieces:
        raise UserError(where, "is damaged: its pieces are not unlike each other", "copy it again")
    return processor
