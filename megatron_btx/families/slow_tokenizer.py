"""``tokenizer.model`` opened by the ``sentencepiece`` library."""

from __future__ import annotations

import sentencepiece

from megatron_btx.errors import UserError


def open_slow(model: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model, whole: every piece is text.

    Args:
        model: the bytes of a ``.model`` file.
        where: names it in messages.

    Raises:
        UserError: it is none, or damaged.
    """
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
