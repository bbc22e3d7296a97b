"""Weights & Biases: one group a recipe, one run a stage, the same run across resumes; what stages
make and use as artifacts, so that its graph shows the branches and the mix."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import logging
import os
import shlex
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from megatron_btx.engine import child_processes
from megatron_btx.errors import UserError
from megatron_btx.files import written
from megatron_btx.recipe.schema import Recipe, WandB
from megatron_btx.recipe.stages import directory as stage_directory
from megatron_btx.train import lineage
from megatron_btx.weights.file_hashes import ALGORITHM

logger = logging.getLogger(__name__)

NO_KEY = "W&B has no API key (run `wandb login`, or set WANDB_API_KEY): logging offline"


class Tracker:
    """Mirrors the metrics to W&B; does nothing where it is disabled.

    Nothing that W&B lacks or does stops a run: without the package, a key or the network it says so
    and the metrics stay in ``metrics.jsonl`` and, where possible, in offline files.

    Args:
        recipe: its name is the group.
        stage: name of the stage, e.g. ``expert:math``; also the run's.
        directory: the stage's; offline files go to its ``wandb/``.
        config: shown beside the run.
    """

    def __init__(self, recipe: Recipe, stage: str, directory: Path, config: dict[str, Any]) -> None:
        self._run = None
        if recipe.wandb.mode == "disabled":
            return
        try:
            import wandb
        except ImportError:
            logger.warning("wandb is not installed: metrics are in %s only", directory)
            return
        with self._unstopped():
            self._run = _begun(wandb, recipe, stage, directory, config)

    def log(self, record: dict[str, Any]) -> None:
        """One record of ``metrics.jsonl``, nested mappings and lists flattened into names. A name
        with a ``/`` in it is the field's, and stays as it is. A summary goes to the run's, under
        ``summary/``: without it stand the last values."""
        if self._run is not None and record["kind"] != "start":
            values = {k: v for k, v in record.items() if k not in ("kind", "step", "time")}
            with self._unstopped():
                if record["kind"] == "summary":
                    self._run.summary.update({f"summary/{k}": v for k, v in values.items()})
                    return
                flat = [
                    pair
                    for key, value in values.items()
                    for pair in _flat(key if "/" in key else f"{record['kind']}/{key}", value)
                ]
                self._run.log(dict(flat), step=record["step"])

    def use(self, artifacts: Iterable[Callable[[], lineage.Artifact]]) -> None:
        """Declare what the run was made from. Each is described anew: equal content under an equal
        name is the same version, whoever has made it."""
        for found in map(_looked_at, artifacts if self._run is not None else ()):
            if self._run is None or found is None:
                continue
            with self._unstopped():
                # ``use_artifact`` does this and waits for the answer; offline it refuses.
                self._run._log_artifact(
                    _described(found), is_user_created=True, use_after_commit=True
                )

    def make(self, artifact: Callable[[], lineage.Artifact]) -> None:
        """Declare what the run has made."""
        if self._run is not None and (found := _looked_at(artifact)) is not None:
            with self._unstopped():
                self._run.log_artifact(_described(found))

    def close(self) -> None:
        """Finish the run's files."""
        if self._run is not None:
            with self._unstopped():
                self._run.finish()

    @contextlib.contextmanager
    def _unstopped(self) -> Iterator[None]:
        """Whatever W&B raises costs what would have been logged, never the run."""
        try:
            yield
        except Exception as error:  # whatever W&B raises: training goes on
            logger.warning("W&B has failed (%s): from here on metrics.jsonl only", error)
            self._run = None
            import wandb

            with contextlib.suppress(Exception):  # else it tries to end its service once more
                wandb.teardown()


def _begun(wandb: Any, recipe: Recipe, stage: str, directory: Path, config: dict[str, Any]) -> Any:
    """A run of W&B's, offline where its server does not answer."""
    settings = wandb.Settings(
        console="off",
        silent=True,
        x_disable_stats=True,
        init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", 60)),
        finish_timeout=300,  # a network that went away must not hold the next stage
        disable_git=True,
    )
    arguments: dict[str, Any] = {
        "project": recipe.wandb.project,
        "entity": recipe.wandb.entity,
        "group": recipe.name,
        "job_type": stage.partition(":")[0],
        "name": stage,
        # The same for every attempt, so that offline pieces sync into one run.
        "id": _run_id(recipe, stage, directory),
        "resume": "allow",
        "dir": str(directory),
        "config": config,
        "settings": settings,
    }
    mode = _mode(recipe.wandb)
    # A launcher's signals reach every process of a task, and SIGUSR1 kills its service, which
    # handles SIGTERM by itself.
    with child_processes.block_signals():
        try:
            return wandb.init(mode=mode, **arguments)
        except (wandb.errors.Error, OSError) as error:
            logger.warning("W&B cannot be reached (%s): logging offline", error)
            wandb.teardown()  # its service still has the id
            settings.init_timeout = max(60.0, settings.init_timeout)  # nobody is waited for now
            return wandb.init(mode="offline", **arguments)


def _looked_at(artifact: Callable[[], lineage.Artifact]) -> lineage.Artifact | None:
    """What there is of an artifact; nothing, and a warning, where it is not there (a stage that was
    left out, or was done by a version that did not keep it)."""
    try:
        return artifact()
    except (OSError, UserError) as error:
        logger.warning("not in W&B's lineage: %s", error)
        return None


def _described(artifact: lineage.Artifact) -> Any:
    """An artifact of W&B's that refers to the files. It takes an entry's digest as it is given: by
    itself it would read every checkpoint once more."""
    import wandb

    found = wandb.Artifact(artifact.name, artifact.type, metadata=dict(artifact.metadata))
    for name, digest in artifact.files.items():
        uri = (artifact.root / name).as_uri()
        (entry,) = found.add_reference(uri, name, checksum=False)
        entry.digest = base64.b64encode(bytes.fromhex(digest)).decode()
        entry.extra[ALGORITHM] = digest
    return found


def track(recipe: Recipe, stage: str, needs: Iterable[str], run_dir: Path) -> None:
    """The run of a finished stage that logs nothing but what it has used and made."""
    if recipe.wandb.mode == "disabled":
        return
    tracker = Tracker(recipe, stage, stage_directory(run_dir, stage), {"recipe": recipe.name})
    tracker.use(artifacts(recipe, lineage.used_by(stage, needs), run_dir))
    tracker.make(*artifacts(recipe, [stage], run_dir))
    tracker.close()


def artifacts(
    recipe: Recipe, stages: Iterable[str], run_dir: Path
) -> list[Callable[[], lineage.Artifact]]:
    """The artifacts of stages, each described when it is called."""
    return [
        functools.partial(lineage.made_by, stage, recipe.name, run_dir.absolute())
        for stage in stages
    ]


_OFFLINE = "*/wandb/offline-run-*"


def logged_offline(run_dir: Path) -> bool:
    """Whether anything of a run was logged offline."""
    return next(run_dir.glob(_OFFLINE), None) is not None


def sync_command(run_dir: Path) -> str:
    """The shell command that uploads what was logged offline. W&B sends the pieces of one run,
    which have one id, into one run, in the order in which they were written."""
    return f"wandb sync {shlex.quote(str(run_dir))}/{_OFFLINE}"


def _mode(wandb: WandB) -> Literal["disabled", "offline", "online"]:
    if wandb.mode == "online" and not has_key():
        logger.warning(NO_KEY)
        return "offline"
    if wandb.mode == "online" and not _answers():
        logger.warning("W&B cannot be reached: logging offline")
        return "offline"
    return wandb.mode


def _answers() -> bool:
    """Whether anything listens at W&B's address. It would itself try for ``init_timeout`` seconds,
    in every stage. Behind a proxy only W&B can tell."""
    url = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY")):
        return True
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True


def has_key() -> bool:
    """Whether a key is configured; the key itself is not looked at."""
    return bool(os.environ.get("WANDB_API_KEY")) or _netrc()


def _netrc() -> bool:
    try:
        path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
        return "wandb" in path.read_text(encoding="utf-8", errors="replace")
    except (OSError, RuntimeError):  # no such file; no home
        return False


def _run_id(recipe: Recipe, stage: str, directory: Path) -> str:
    """Kept in a file once drawn, so that a run that is started anew elsewhere is another run."""
    path = directory / "wandb_run_id"
    if not path.exists():
        digest = hashlib.sha256(f"{recipe.name}/{stage}/{os.urandom(8).hex()}".encode())
        with written(path) as file:
            file.write(digest.hexdigest()[:12])
    return path.read_text(encoding="utf-8")


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = ((str(index), item) for index, item in enumerate(value))  # type: ignore[assignment]
    else:
        return [(prefix, value)]
    return [pair for key, item in items for pair in _flat(f"{prefix}/{key}", item)]
