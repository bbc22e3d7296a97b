"""Which checkpoint a path stands for: the one rule wherever a checkpoint is taken. And which files
of a Hugging Face directory are the model, and what a directory without any is instead. Imports no
torch.

The order of files is that of ``transformers`` (``_get_resolved_checkpoint_files`` of 4.57 and 5):
``model.safetensors``, else the shards of ``model.safetensors.index.json``, else nothing that is
safe to read. A file of another name is never taken for weights: ``consolidated.safetensors`` is
the same model under its maker's names, ``adapter_model.safetensors`` a part of one.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path, PurePosixPath

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.files import newest_step, read_json

_MARKS = (".metadata", "config.json", "manifest.json", "mp_rank_*")
"""Files of which every checkpoint has one: Megatron's, Hugging Face's, ours (should its
``.metadata`` be missing, whoever reads it says so)."""

_GIVE = "give a step_XXXXXXXX directory, a stage's directory of a run, or a Hugging Face model's"


def find_checkpoint(path: str | Path, dense: str | None = None) -> Path:
    """The checkpoint that a path stands for.

    Args:
        path: a checkpoint (Megatron's of one step, or a Hugging Face directory), which is itself;
            or a stage's directory of a run, which stands for its last step.
        dense: where only a dense model will do, what it is to be: ``seed``, or an expert's name.

    Raises:
        UserError: there is none. Of a run's directory it says which stages it holds that would do.
    """
    is_local, path = str(path).startswith("./"), Path(path)
    if is_checkpoint(path):
        return path
    if (newest := newest_step(path)) is not None:
        return newest
    is_run = (path.parent / "recipe.yaml").is_file() and any(path.parent.glob("*/stage.json"))
    if path.is_symlink() and not path.exists():
        what = f"is a link to {path.readlink()}, where nothing is"
        again = f"put that back, or run again, which links or trains it anew: btx run {path.parent}"
        raise UserError(str(path), what, again if is_run else "put that back, or remove the link")
    if not path.exists() and is_run:
        raise _no_stage(path)
    if not path.exists():
        hub = None if is_local else foreign(path)
        raise hub or UserError(str(path), "does not exist", _GIVE)
    if (path / "recipe.yaml").is_file():
        raise _run(path, dense)
    if (path / "done.json").is_file():
        if path.name == "mix":  # which plans alone (pipeline/graph.py)
            what = "is a stage that writes no weights: the finetuning mixes them"
            raise UserError(str(path), what, f"give {path.with_name('finetune')}")
        again = f"put it back, or remove {path / 'done.json'} and run again to train it anew"
        if path.is_symlink():
            again = f"put it back there, or remove the link {path} and run again to train it anew"
        raise UserError(str(path), "is a finished stage, and holds no checkpoint any more", again)
    theirs = sorted(path.glob("iter_???????"))  # Megatron-LM's
    inside = path.is_file() and is_checkpoint(path.parent)
    near = path.parent if inside else theirs[-1] if theirs else None
    what = "not a checkpoint (no .metadata and no config.json), and holds no checkpoint"
    unread = UserError(str(path), what, f"give {near}" if near else _GIVE)
    raise unread if near and path.suffix != ".gguf" else foreign(path) or unread


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is one itself; it may be damaged."""
    return path.is_dir() and any(True for name in _MARKS for _ in path.glob(name))


def is_hugging_face(path: Path) -> bool:
    """Whether a checkpoint is a Hugging Face directory, and not one of Megatron's."""
    return (path / "config.json").is_file() and not (path / ".metadata").exists()


def name_of(path: Path) -> str:
    """What a model is called by default: the stage's name for a step's directory in it
    (steps of equal length have equal names), else the directory's own."""
    path = path.absolute()
    if path.parent.name == "checkpoints":
        return path.parent.parent.name
    return path.resolve().name


def _no_stage(path: Path) -> UserError:
    """For what is not there in a run's directory: the stage that may be meant. ``expert:code`` is
    in ``expert-code``."""
    names = [one.name for one in sorted(path.parent.iterdir()) if newest_step(one) is not None]
    if not names:
        what = "does not exist, and no stage of that run has a checkpoint yet"
        return UserError(str(path), what, f"run it first: btx run {path.parent}")
    name = path.name.replace(":", "-")
    near = [one for one in names if one in (name, f"expert-{name}")]
    near += difflib.get_close_matches(name, names, n=1)
    what = f"does not exist; checkpoints of that run are in {', '.join(names)}"
    fix = f"did you mean {path.with_name(near[0])}?" if near else "give one of them"
    return UserError(str(path), what, fix)


_MIXED = ("finetune", "export/hf")
"""Directories in a run's whose models are mixtures."""


def _run(path: Path, dense: str | None) -> UserError:
    """For a run's directory: which checkpoints are in it, and which of them fits best."""
    names = [one.name for one in sorted(path.iterdir()) if newest_step(one) is not None]
    names += ["export/hf"] if is_checkpoint(path / "export" / "hf") else []
    kind = "checkpoint" if dense is None else "dense checkpoint"
    if dense is not None:
        names = [name for name in names if name not in _MIXED]
    if not names:
        what = f"is a run's directory, and no stage has a {kind} yet"
        return UserError(str(path), what, f"run it first: btx run {path}")
    likely = [name for name in names if dense is not None and name.startswith("expert-")]
    likely += [name for name in names if name in (dense, f"expert-{dense}")]
    what = f"is a run's directory; {kind}s are in {', '.join(names)}"
    return UserError(str(path), what, f"give one of them, such as {path / [*names, *likely][-1]}")


MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"

ADAPTER = UserError(
    "",
    "an adapter (LoRA or another of peft), not a model",
    "merge it into its base model first: PeftModel.from_pretrained(BASE, ADAPTER)"
    ".merge_and_unload().save_pretrained(NEW), and give NEW",
)
_DOWNLOAD = "copy or download the whole directory again"
_SAFE = (
    "convert it: AutoModelForCausalLM.from_pretrained(DIR)"
    ".save_pretrained(NEW, safe_serialization=True)"
)
_ORIGINAL = "download the Hugging Face files of the model (config.json and model*.safetensors)"
_FOREIGN: tuple[tuple[str, str, str], ...] = (
    ("adapter_config.json", ADAPTER.what, ADAPTER.fix),
    ("adapter_model.*", ADAPTER.what, ADAPTER.fix),
    ("model-*-of-*.safetensors", f"shards of a model without their {INDEX}", _DOWNLOAD),
    ("*.gguf", "a GGUF file of llama.cpp", "give the Hugging Face directory it was made from"),
    ("zero_to_fp32.py", "a checkpoint of DeepSpeed",
     "run its zero_to_fp32.py, and save the model with save_pretrained"),
    ("consolidated*.safetensors", "a model in its maker's own format", _ORIGINAL),
    ("consolidated*.pth", "a model in its maker's own format", _ORIGINAL),
    ("*.bin", "a pickle, which can run any code when it is read", _SAFE),
    ("*.pt", "a pickle, which can run any code when it is read", _SAFE),
    ("*.pth", "a pickle, which can run any code when it is read", _SAFE),
    ("*.safetensors", f"no {MODEL} and no {INDEX}, the names under which a model is looked for",
     f"give a whole Hugging Face directory, or name the model's file {MODEL}"),
)  # fmt: skip
"""A file's name, what a directory (or file) with it is, and what to do; the first counts."""

_INDEX_LIMIT = 256 << 20
"""Bytes: of an MoE with 100,000 tensors it has 10 million."""
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model.

    Args:
        path: one file, or a directory.

    Raises:
        UserErrors: there are none, or the index is damaged or names files outside the directory.
    """
    if path.is_file() and path.suffix != ".gguf":
        return [path]
    if (path / MODEL).is_file():
        return [path / MODEL]
    names = index_of(path)
    if names is not None:
        return [path / name for name in sorted(set(names.values()))]
    raise foreign(path) or UserError(
        str(path), "no .safetensors file here", "give a Hugging Face model directory"
    )


def index_of(path: Path) -> dict[str, str] | None:
    """Tensor -> file, as the index that counts says it; ``None`` where none does.

    Raises:
        UserErrors: it is no index, or names files outside the directory.
    """
    where = path / INDEX
    if not where.is_file() or (path / MODEL).is_file():
        return None
    index = read_json(where, _INDEX_LIMIT)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(str(where), "has no weight_map of tensors to files", _DOWNLOAD)
    outside = [name for name in dict.fromkeys(map(_text, names.values())) if not _inside(name)]
    if outside:
        what = "names a file that is not a .safetensors inside the directory: "
        raise UserErrors([UserError(str(where), what + repr(n), _DOWNLOAD) for n in outside[:8]])
    return names


def foreign(path: Path) -> UserError | None:
    """What a path is that holds no model that we read: an error that names it; ``None`` where it is
    nothing that we know."""
    if not path.exists():
        return _absent(path)
    for pattern, what, fix in _FOREIGN:
        here = path.match(pattern) if path.is_file() else False
        found = [path] if here else sorted(path.glob(pattern))
        if found:
            return UserError(str(found[0]), what, fix)
    return None


def _absent(path: Path) -> UserError | None:
    """``ORG/NAME`` as given, or below the current directory: a recipe's paths are absolute. Any
    other path was meant for one of this machine."""
    here = Path.cwd()
    name = str(path.relative_to(here) if path.is_relative_to(here) else path)
    if path.absolute().parent.exists() or not _HUB.fullmatch(name):
        return None
    return UserError(
        str(path),
        f"no such directory; {name} looks like the name of a model on the Hugging Face Hub",
        f"download it first: hf download {name} --local-dir {path.name}, and give that directory",
    )


def _text(name: object) -> str:
    return name if isinstance(name, str) else repr(name)


def _inside(name: str) -> bool:
    parts = PurePosixPath(name)
    safe = not parts.is_absolute() and ".." not in parts.parts and "\\" not in name
    return safe and name.endswith(".safetensors") and "\0" not in name and len(name) < 256
