"""``config.json`` as a two-way table: every field that changes what a model computes is mapped or
asserted, the harmless ones are declared, and any other is an error.

A part reads its keys into fields of our ``Model`` and writes them from it. That the two agree is
checked: what is written is read again and compared (family.py), so that a family is only used for a
model that it computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_btx.errors import UserError
from megatron_btx.families.hf_routing import HFRouting
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.count import resolved
from megatron_btx.recipe.fields import UTMOST, Range
from megatron_btx.recipe.typed import BAD, Reader
from megatron_btx.recipe.yaml_tree import Node, tree_of
from megatron_btx.weights.manifest import TOKENS, no_token

OTHER = "convert a model whose config.json has no such value"

_IGNORED = {
    "where the model comes from": """
        architectures model_type _name_or_path name_or_path model_name transformers_version
        _commit_hash unsloth_version unsloth_fixed is_llama_config transformers.js_config
    """,
    "how it is run, not what it computes": """
        torch_dtype dtype use_cache return_dict output_hidden_states output_attentions torchscript
        _attn_implementation _attn_implementation_autoset attn_implementation
        chunk_size_feed_forward use_bfloat16 is_encoder_decoder is_decoder pruned_heads
        add_cross_attention tie_encoder_decoder cross_attention_hidden_size problem_type
        id2label label2id finetuning_task task_specific_params tf_legacy_loss
        gradient_checkpointing use_reentrant_checkpointing
    """,
    "tokens and generation": """
        bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id prefix
        decoder_start_token_id tokenizer_class max_length min_length do_sample
        temperature top_k top_p typical_p repetition_penalty length_penalty
        num_beams num_beam_groups num_return_sequences diversity_penalty
        no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids early_stopping
        exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
        forced_bos_token_id forced_eos_token_id remove_invalid_values output_scores
        return_dict_in_generate
    """,
    "training alone": """
        output_router_logits router_aux_loss_coef neftune_noise_alpha
        attention_dropout resid_pdrop embd_pdrop
    """,
    "products in pieces: another rounding": "pretraining_tp",
    "how long the texts of training were; nothing reads it": "max_sequence_length",
}
"""Reason -> keys that change nothing of what a model computes from tokens."""
HARMLESS = frozenset(key for keys in _IGNORED.values() for key in keys.split())
"""Those keys. An unknown one that is null, false or empty counts as absent."""


@dataclass
class ConfigReading:
    """A ``config.json`` being read."""

    config: Mapping[str, Any]
    where: str
    """Its path, for errors."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of our ``Model`` found so far."""
    experts: tuple[str, ...] = ()
    gates: HFRouting | None = None
    errors: list[UserError] = field(default_factory=list)
    known: set[str] = field(default_factory=lambda: set(HARMLESS))
    keys: dict[str, str] = field(default_factory=dict)
    """Fields of our ``Model`` -> the key that says it, for errors about its type or range."""

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, absent or null: ``default``. Whoever computes with it asks for a
        type; what only becomes a field of the model is looked at with that."""
        self.known.add(key)
        value = self.config.get(key)
        return default if value is None else value

    def typed(self, hint: Any, key: str, default: Any, *, low: int = 0, high: int = UTMOST) -> Any:
        """The value of a key, of a type, a number from ``low`` to ``high``; absent, or after noting
        that it is something else: ``default``."""
        if self.take(key) is None:
            return default
        node = self.node(key, self.config[key])
        reader = Reader(strict=True)
        value = reader.value(hint, [node], key)
        wrong = Range(low, high).problem(value) if hint is int and value is not BAD else None
        if wrong is not None:
            value = reader.error(node, *wrong)
        self.errors += [error for _, error in reader.errors]
        return default if value is BAD else value

    def node(self, key: str, value: Any) -> Node:
        """A value with its place."""
        return tree_of(value, Path(self.where), key)

    def need(self, key: str) -> Any:
        """The value of a key that must be there."""
        value = self.take(key)
        if value is None:
            self.refuse(f"{key} is missing", "copy the model's own config.json")
        return value

    def refuse(self, what: str, fix: str = OTHER) -> None:
        """Note what is wrong."""
        self.errors.append(UserError(self.where, what, fix))

    def tokens(self) -> None:
        """Note every special token that is no id, nor a list of some: they go into the result."""
        for key in TOKENS:
            if (wrong := no_token(key, self.config.get(key))) is not None:
                self.refuse(f"{key} {wrong[0]}", wrong[1])

    def unknown(self) -> None:
        """Note every unknown field."""
        for key, value in self.config.items():
            empty = value is None or value is False or value in ("", [], {})
            if key not in self.known and not empty:
                what = f"{key} is {value!r}: a field that this converter does not know"
                fix = "if it changes nothing that the model computes, remove it from a copy of the"
                self.refuse(what, f"{fix} directory's config.json")


class ConfigPart(Protocol):
    """Some keys of ``config.json``, both ways."""

    def read(self, reading: ConfigReading) -> None:
        """Put what the keys say into ``reading.model``, or note what is wrong with them."""

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """The keys of an architecture. What they cannot say is found out by reading them again."""


@dataclass(frozen=True)
class Field:
    """A key that is a field of our ``Model``."""

    key: str
    ours: str
    required: bool = False
    default: Any = None
    """What an absent key means; ``None``: our own default."""
    nullable: bool = False
    """Whether null, unlike an absent key, means our own default."""

    def read(self, reading: ConfigReading) -> None:
        """The value as it is."""
        if self.nullable and self.key in reading.config and reading.take(self.key) is None:
            return
        value = reading.need(self.key) if self.required else reading.take(self.key, self.default)
        if value is not None:
            reading.model[self.ours] = value
            reading.keys[self.ours] = self.key

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """With what follows from other fields filled in."""
        value = getattr(resolved(architecture.model), self.ours)
        return {} if value is None else {self.key: value}


@dataclass(frozen=True)
class Fixed:
    """A key of one value, the only one that Megatron computes."""

    key: str
    value: Any
    also: tuple[Any, ...] = ()
    """Other words for the same, which are read and not written."""

    def read(self, reading: ConfigReading) -> None:
        """Absent, it has that value."""
        found = reading.take(self.key, self.value)
        if found != self.value and found not in self.also:
            reading.refuse(f"{self.key} is {found!r}; only {self.value!r} is supported")

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """The value."""
        return {self.key: self.value}


@dataclass(frozen=True)
class Stated:
    """A key that no implementation reads and some makers write: it must say what is computed
    anyway. It is not written."""

    key: str
    value: Any

    def read(self, reading: ConfigReading) -> None:
        """Nothing else than the value."""
        found = reading.take(self.key, self.value)
        if found != self.value:
            reading.refuse(f"{self.key} is {found!r}; only {self.value!r} is computed")

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class OwnCode:
    """``auto_map``: the makers' own code, where it is that of ``transformers``. It is not
    written."""

    names: Mapping[str, str]
    """Auto class -> module and class in the makers' directory."""

    def read(self, reading: ConfigReading) -> None:
        """Each class by its name, without the repository that it would be loaded from."""
        found = reading.typed(dict[str, str], "auto_map", {})
        for auto, name in found.items():
            own = name.rpartition("--")[2]
            if self.names.get(auto) != own:
                what = f"auto_map names {own} as its {auto}, which is not known to be "
                fix = "remove auto_map from a copy of the directory's config.json if the weights "
                reading.refuse(f"{what}transformers' own class", f"{fix}are of transformers' class")

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class Unread:
    """A key that changes nothing of what a model of this family computes, whatever it says; in
    others it may. It is not written."""

    key: str

    def read(self, reading: ConfigReading) -> None:
        """Nothing."""
        reading.known.add(self.key)

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class Always:
    """A field of our ``Model`` that all models of the family have and no key names."""

    ours: str
    value: Any

    def read(self, reading: ConfigReading) -> None:
        """The value."""
        reading.model[self.ours] = self.value

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class Tied:
    """``tie_word_embeddings``, of which ours is the opposite."""

    absent: bool = False
    """What ``transformers`` takes for an absent one."""

    def read(self, reading: ConfigReading) -> None:
        """The opposite."""
        tied = reading.typed(bool, "tie_word_embeddings", self.absent)
        reading.model["untie_embeddings_and_output_weights"] = not tied

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """The opposite."""
        tied = not architecture.model.untie_embeddings_and_output_weights
        return {"tie_word_embeddings": tied}
