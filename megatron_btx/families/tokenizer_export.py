"""A SentencePiece BPE model as the ``tokenizer.json`` of Hugging Face's ``tokenizers``.

Written here rather than by ``transformers``' converter, which would add a space in front of every
text, and rebuilds Llama tokenizers with settings of its own. Tests compare the ids.
"""

from __future__ import annotations

import json
from typing import Any

import sentencepiece

from megatron_btx.errors import UserError

_SPACE = "\u2581"


def huggingface_files(
    model: bytes, *, bos_id: int | None, eos_id: int, begin_id: int | None
) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and tokenizer.model that give the same ids.

    Args:
        model: the bytes of a SentencePiece model.
        bos_id: its begin token, by name.
        eos_id: its end token.
        begin_id: what is put before a text where special tokens are asked for.

    Raises:
        UserError: the model is not BPE with byte fallback and without normalisation.
    """
    add_prefix = _add_dummy_prefix(model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    count = pieces.vocab_size()
    unknown = pieces.id_to_piece(pieces.unk_id())
    special = [i for i in range(count) if pieces.is_control(i) or pieces.is_unknown(i)]
    steps: list[dict[str, Any]] = [_replace(" ", _SPACE)]
    back: list[dict[str, Any]] = [_replace(_SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if add_prefix:
        steps.insert(0, {"type": "Prepend", "prepend": _SPACE})
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, pieces.id_to_piece(i)) for i in special],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": _template(begin_id, pieces),
        "decoder": {"type": "Sequence", "decoders": back},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {pieces.id_to_piece(i): i for i in range(count)},
            "merges": _merges(pieces),
        },
    }
    names = {"bos_token": bos_id, "eos_token": eos_id, "pad_token": pieces.pad_id()}
    config = {
        # Any other class would be rebuilt from the vocabulary with the class's own settings.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": begin_id is not None,
        "add_eos_token": False,
        # llama.cpp's converter has no other place to learn this from, and assumes a space.
        "add_prefix_space": add_prefix,
        # SentencePiece never makes a special token of text that is spelt like one.
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        "unk_token": unknown,
        **{name: pieces.id_to_piece(i) for name, i in names.items() if i is not None and i >= 0},
    }
    return {
        "tokenizer.json": _json(tokenizer),
        "tokenizer_config.json": _json(config),
        "tokenizer.model": model,
    }


def _template(
    begin_id: int | None, pieces: sentencepiece.SentencePieceProcessor
) -> dict[str, Any] | None:
    """The token before a text, as ``TemplateProcessing`` puts it there."""
    if begin_id is None:
        return None
    token = pieces.id_to_piece(begin_id)
    parts = [
        [{"SpecialToken": {"id": token, "type_id": at}}, {"Sequence": {"id": name, "type_id": at}}]
        for at, name in enumerate("AB")
    ]
    return {
        "type": "TemplateProcessing",
        "single": parts[0],
        "pair": parts[0] + parts[1],
        "special_tokens": {token: {"id": token, "ids": [begin_id], "tokens": [token]}},
    }


def _merges(pieces: sentencepiece.SentencePieceProcessor) -> list[list[str]]:
    """Every way in which two pieces make a third, in the order in which SentencePiece would.

    It joins the neighbours that make the piece of the highest score, the leftmost first.
    """
    normal = {
        pieces.id_to_piece(i): pieces.get_score(i)
        for i in range(pieces.vocab_size())
        if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i))
    }
    ranked = sorted((piece for piece in normal if len(piece) > 1), key=lambda p: -normal[p])
    return [
        [piece[:at], piece[at:]]
        for piece in ranked
        for at in range(1, len(piece))
        if piece[:at] in normal and piece[at:] in normal
    ]


def _add_dummy_prefix(model: bytes) -> bool:
    """Whether a space goes in front of a text; refuses what cannot be expressed exactly."""
    try:
        from sentencepiece import sentencepiece_model_pb2 as schema
    except ImportError as error:
        raise UserError(
            "export", "reading a SentencePiece model needs protobuf", "pip install protobuf"
        ) from error
    proto = schema.ModelProto.FromString(model)  # type: ignore[attr-defined]  # made at run time
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    wrong = [
        text
        for text, is_so in (
            ("it is not BPE", trainer.model_type != trainer.BPE),
            ("it has no byte fallback", not trainer.byte_fallback),
            ("it normalises text", bool(normalizer.precompiled_charsmap)),
            ("it removes spaces", normalizer.remove_extra_whitespaces),
            ("it puts spaces behind words", trainer.treat_whitespace_as_suffix),
            ("it leaves spaces as they are", not normalizer.escape_whitespaces),
            ("it has user-defined pieces", any(p.type == p.USER_DEFINED for p in proto.pieces)),
        )
        if is_so
    ]
    if wrong:
        raise UserError(
            "tokenizer",
            f"this SentencePiece model cannot be written exactly for transformers: "
            f"{', '.join(wrong)}",
            "give the tokenizer as a Hugging Face directory (type: huggingface)",
        )
    return bool(normalizer.add_dummy_prefix)


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def _added(id_: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id_, "content": content, **flags, "special": True}


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
