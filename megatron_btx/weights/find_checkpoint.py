"""Which checkpoint a path stands for: the one rule wherever a checkpoint is taken. Imports no
torch."""

from __future__ import annotations

from pathlib import Path

from megatron_btx.errors import UserError
from megatron_btx.files import newest_step
from megatron_btx.weights.model_files import foreign

_MARKS = (".metadata", "config.json", "manifest.json", "mp_rank_*")
"""Files of which every checkpoint has one: Megatron's, Hugging Face's, ours (should its
``.metadata`` be missing, whoever reads it says so)."""

_GIVE = "give a step_XXXXXXXX directory, a stage's directory of a run, or a Hugging Face model's"


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path stands for.

    Args:
        path: a checkpoint (Megatron's of one step, or a Hugging Face directory), which is itself;
            or a stage's directory of a run, which stands for its last step.

    Raises:
        UserError: there is none. Of a run's directory it says which stages it holds.
    """
    path = Path(path)
    if is_checkpoint(path):
        return path
    if (newest := newest_step(path)) is not None:
        return newest
    if not path.exists():
        raise foreign(path) or UserError(str(path), "does not exist", _GIVE)
    if (path / "recipe.yaml").is_file():
        raise _run(path)
    if (path / "done.json").is_file():
        again = f"put it back, or remove {path / 'done.json'} and run again to train it anew"
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
    """What a model is called that nobody has named: the stage's name for a step's directory in it
    (steps of equal length have equal names), else the directory's own."""
    path = path.absolute()
    if path.parent.name == "checkpoints":
        return path.parent.parent.name
    return path.resolve().name


def _run(path: Path) -> UserError:
    """For a run's directory: which checkpoints are in it."""
    stages = [one for one in sorted(path.iterdir()) if newest_step(one) is not None]
    stages += [one for one in (path / "export" / "hf",) if is_checkpoint(one)]
    if not stages:
        return UserError(str(path), "is a run's directory, and no stage has a checkpoint yet")
    names = ", ".join(str(stage.relative_to(path)) for stage in stages)
    what = f"is a run's directory; checkpoints are in {names}"
    return UserError(str(path), what, f"give one of them, such as {stages[-1]}")
