"""Checkpoints: whole under one layout, loaded under another bit for bit, resumed bit for bit."""

from __future__ import annotations

import io
import itertools
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_btx.recipe.schema import Layout
from megatron_btx.weights.file_hashes import HASHES, files_of, hash_file, hashes_of
from megatron_btx.weights.manifest import MANIFEST
from megatron_btx.weights.torch_dist import TorchDistSource
from tests.engine.harness import DENSE, MOE, Case, Pieces, Session, assemble, pieces
from tests.ranks import Ranks

DP2 = Layout(data_parallel_size=2)
TP2 = Layout(tensor_model_parallel_size=2)
PP2 = Layout(pipeline_model_parallel_size=2)
EP2 = Layout(data_parallel_size=2, expert_model_parallel_size=2)
TP2_EP2 = Layout(
    tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1
)


def session(
    case: Case, folder: Path, load: int | None, steps: int, save: bool
) -> tuple[Pieces, list[float]]:
    """Train under a case, from step ``load``'s checkpoint where there is one.

    Returns:
        This rank's weights as loaded (or as trained, from nothing), and the losses.
    """
    from megatron.core.dist_checkpointing import validation

    from megatron_btx.engine import checkpoint, checkpoint_directory

    one = Session(case, weights=load is None)
    if load is not None:
        checkpoint.load(checkpoint_directory.step_directory(folder, load), one.state)
    first, loaded = load or 0, one.weights()
    losses = [one.step(number).loss for number in range(first, first + steps)]
    if save:
        last = first + steps
        target = checkpoint_directory.step_directory(folder, last)
        with mock.patch.object(validation.logger, "warning") as warned:
            checkpoint.save(target, one.state, one.manifest(last))
        assert "megatron_lm" not in str(warned.call_args_list)
    return one.weights() if load is None else loaded, losses


def load_weights(case: Case, folder: Path) -> tuple[Pieces]:
    """The model of step 2, without an optimizer."""
    from megatron_btx.engine import checkpoint, checkpoint_directory, distributed
    from megatron_btx.engine.model import build_model

    distributed.initialize(case.layout, case.random_seed)
    model = build_model(case.architecture, case.layout, case.precision)  # type: ignore[arg-type]
    checkpoint.load(
        checkpoint_directory.step_directory(folder, 2), checkpoint.TrainingState(model=model)
    )
    return (pieces(model, lambda param: param),)


def same_weights(saved: list[Any], loaded: list[Any]) -> None:
    before, after = (assemble([rank[0] for rank in side]) for side in (saved, loaded))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert np.array_equal(tensor, after[name]), name


PP2_VP2 = replace(PP2, virtual_pipeline_model_parallel_size=2)
PP2_VP2_EP2 = replace(PP2_VP2, data_parallel_size=2, expert_model_parallel_size=2)
CASES = {  # written under, read under
    "moe ep2 pp2 vp2 distributed -> tp2 ep2": (
        Case(MOE, PP2_VP2_EP2, use_distributed_optimizer=True),
        [TP2_EP2],
    ),
    "dense tp2 -> pp2": (Case(DENSE, TP2), [PP2]),
    "moe ep2 -> tp2 ep2": (Case(MOE, EP2), [TP2_EP2]),
    "moe ep2 distributed -> tp2 ep2": (Case(MOE, EP2, use_distributed_optimizer=True), [TP2_EP2]),
    "bf16 dense dp2 distributed -> tp2": (
        Case(DENSE, DP2, "bf16", use_distributed_optimizer=True),
        [TP2],
    ),
}
# The losses that follow, under another order of sums: as the layouts' own test.
LOSS = {"fp32": 1e-5, "bf16": 3e-2}


@pytest.mark.parametrize("name", CASES)
def test_saved_under_one_layout_loaded_under_another(
    name: str, ranks: Ranks, tmp_path: Path
) -> None:
    case, layouts = CASES[name]
    world = case.layout.world_size
    saved = ranks.run(session, world, case, tmp_path, None, 2, True)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_00000002"], "a checkpoint bears its name only when whole"
    unstopped = ranks.run(session, world, case, tmp_path / "unused", None, 4, False)[0][1]

    resumed = ranks.run(session, world, case, tmp_path, 2, 2, False)
    same_weights(saved, resumed)
    assert saved[0][1] + resumed[0][1] == unstopped, "a resumed run is the unstopped run"
    # Weights alone go anywhere; the optimizer's state only where as many ranks share the experts:
    # Megatron keeps experts' states apart where there are several, and not where there is one.
    alone = replace(case, layout=Layout())
    same_weights(saved, ranks.run(load_weights, 1, alone, tmp_path))
    for layout in layouts:
        other = replace(case, layout=layout)
        moved = ranks.run(session, layout.world_size, other, tmp_path, 2, 2, False)
        same_weights(saved, moved)
        np.testing.assert_allclose(
            moved[0][1], unstopped[2:], atol=LOSS[case.precision], rtol=0, err_msg=str(layout)
        )


def session_with_gathered_state(case: Case, folder: Path) -> tuple[Pieces, list[float]]:
    """As where a layer stores a parameter as something else than boxes of it."""
    from megatron_btx.engine import optimizer_shards

    with mock.patch.object(optimizer_shards, "_parts", return_value=None):
        return session(case, folder, None, 2, True)


def test_state_that_is_not_stored_in_boxes_is_gathered(ranks: Ranks, tmp_path: Path) -> None:
    case = Case(MOE, EP2, use_distributed_optimizer=True)
    saved = ranks.run(session_with_gathered_state, 2, case, tmp_path)
    resumed = ranks.run(session, 2, case, tmp_path, 2, 2, False)
    same_weights(saved, resumed)
    unstopped = ranks.run(session, 2, case, tmp_path / "unused", None, 4, False)[0][1]
    assert saved[0][1] + resumed[0][1] == unstopped


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1, 5), (4, 1), (2, 3, 4), (2, 2, 1, 2), ()])
def test_a_range_of_elements_is_few_boxes(shape: tuple[int, ...]) -> None:
    from megatron_btx.engine.optimizer_shards import boxes

    count = int(np.prod(shape))
    for first, last in itertools.combinations_with_replacement(range(count + 1), 2):
        covered, found = np.zeros(shape, int), list(boxes(shape, first, last))
        for offset, extent in found:
            covered[tuple(slice(o, o + e) for o, e in zip(offset, extent, strict=True))] += 1
        assert np.array_equal(covered.ravel(), [first <= at < last for at in range(count)])
        assert len(found) <= max(1, 2 * len(shape) - 1)


def save_on_a_full_disk(folder: Path) -> tuple[str, list[str]]:
    """What a save says whose files may not grow beyond 20 kB, and what it leaves."""
    import resource

    from megatron_btx.engine import checkpoint, checkpoint_directory, distributed
    from megatron_btx.engine.model import build_model
    from megatron_btx.errors import UserError
    from tests.engine.harness import set_weights

    distributed.initialize(Layout(), 1)
    model = build_model(DENSE, Layout(), "fp32")
    set_weights(model)
    state = checkpoint.TrainingState(model=model)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        checkpoint.save(
            checkpoint_directory.step_directory(folder, 1), state, checkpoint.manifest_of(DENSE)
        )
    except UserError as error:
        return str(error), [path.name for path in folder.iterdir()]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    raise AssertionError("it was written")


def test_a_save_that_finds_no_space_says_so_and_leaves_nothing(
    ranks: Ranks, tmp_path: Path
) -> None:
    said, left = ranks.run(save_on_a_full_disk, 1, tmp_path)[0]
    assert "step_00000001: cannot be written: File too large" in said
    assert "fix: free some space" in said
    assert left == []


def load_what_is_cut(folder: Path, layout: Layout = Layout()) -> str:  # noqa: B008
    """What loading step 2 says."""
    from megatron_btx.errors import UserError

    try:
        session(Case(DENSE, layout), folder, 2, 1, False)
    except UserError as error:
        return str(error)
    return "it was loaded"


def test_a_truncated_checkpoint_is_told(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(session, 1, Case(DENSE), tmp_path, None, 2, True)
    (payload,) = tmp_path.glob("step_00000002/*.distcp")
    payload.write_bytes(payload.read_bytes()[: payload.stat().st_size // 2])
    said = ranks.run(load_what_is_cut, 1, tmp_path)[0]
    assert f"{payload}: is not what was written" in said
    (tmp_path / "step_00000002" / HASHES).unlink()
    said = ranks.run(load_what_is_cut, 1, tmp_path)[0]
    assert "step_00000002" in said
    assert "fix:" in said


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 2 of a dense model, with its optimizer and its generators' states."""
    folder = tmp_path_factory.mktemp("saved")
    ranks.run(session, 2, Case(DENSE, DP2), folder, None, 2, True)
    return folder / "step_00000002"


def test_a_checkpoint_knows_the_hash_of_each_of_its_files(saved: Path) -> None:
    hashes = hashes_of(saved)
    assert list(hashes) == files_of(saved)
    assert {".metadata", "common.pt", MANIFEST, "__0_0.distcp", "__1_0.distcp"} <= set(hashes)
    for name, value in hashes.items():
        assert hash_file(saved / name) == value, name


def refused(ranks: Ranks, step: Path, world: int = 1) -> set[str]:
    """What each rank says that should load it."""
    layout = DP2 if world == 2 else Layout()
    return set(ranks.run(load_what_is_cut, world, step.parent, layout))


@pytest.mark.parametrize("name", [".metadata", "common.pt", "manifest.json", "__1_0.distcp"])
def test_a_flipped_bit_is_refused_on_every_rank(
    ranks: Ranks, saved: Path, tmp_path: Path, name: str
) -> None:
    step = tmp_path / saved.name
    shutil.copytree(saved, step)
    data = bytearray((step / name).read_bytes())
    data[-9] ^= 1
    (step / name).write_bytes(bytes(data))
    (said,) = refused(ranks, step, world=2)
    assert f"{step / name}: " in said


def test_without_hashes_it_loads_and_the_stored_crc_is_compared(
    ranks: Ranks, saved: Path, tmp_path: Path
) -> None:
    step = tmp_path / saved.name
    shutil.copytree(saved, step)
    (step / HASHES).unlink()
    assert refused(ranks, step) == {"it was loaded"}
    path = step / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    place = weight_in(step)
    data[place] ^= 1
    path.write_bytes(bytes(data))
    (said,) = refused(ranks, step)
    assert f"{path}: truncated or corrupt: Bad CRC-32" in said


def weight_in(step: Path) -> int:
    """Where an element of a weight lies in the first file."""
    source = TorchDistSource(step)
    places = source.checksums(["decoder.layers.mlp.linear_fc1.weight"])
    return places[step / "__0_0.distcp"][0].start + 8


class Evil:
    """What an attacker would leave in a pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def evil_metadata(step: Path, owned: Path) -> None:
    (step / ".metadata").write_bytes(pickle.dumps(Evil(owned)))


def evil_inside_metadata(step: Path, owned: Path) -> None:
    """One that is a checkpoint's in all else."""
    metadata = pickle.loads((step / ".metadata").read_bytes())
    metadata.planner_data = Evil(owned)
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


def evil_common(step: Path, owned: Path) -> None:
    torch.save({"content_metadata": Evil(owned)}, step / "common.pt")


def evil_object(step: Path, owned: Path) -> None:
    """The generators' states, which torch unpickles without any list."""
    content = io.BytesIO()
    torch.save(Evil(owned), content)
    metadata = pickle.loads((step / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn.startswith("rng_state/"):
            path = step / info.relative_path
            info.offset, info.length = path.stat().st_size, content.tell()
            path.write_bytes(path.read_bytes() + content.getvalue())
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


EVILS = {
    "metadata": (evil_metadata, ".metadata", 1),
    "inside metadata": (evil_inside_metadata, ".metadata", 1),
    "common.pt": (evil_common, "common.pt", 1),
    "an object": (evil_object, "step_00000002", 2),
}


@pytest.mark.parametrize("name", EVILS)
def test_a_malicious_pickle_does_not_run_on_resume(
    ranks: Ranks, saved: Path, tmp_path: Path, name: str
) -> None:
    make, where, world = EVILS[name]
    step, owned = tmp_path / saved.name, tmp_path / "owned"
    shutil.copytree(saved, step)
    (step / HASHES).unlink()  # its author would have made it anew
    make(step, owned)
    said = refused(ranks, step, world)
    assert not owned.exists()
    for text in said:
        assert where in text
        assert "io.open" in text or "builtins.open" in text


def test_only_what_a_save_made_is_deleted(tmp_path: Path) -> None:
    from megatron_btx.engine import checkpoint_directory

    for step in (1, 2, 3):
        made = tmp_path / f"step_0000000{step}"
        made.mkdir()
        (made / MANIFEST).touch()
        (made / "__0_0.distcp").touch()
    (tmp_path / "step_00000001" / "notes.md").touch()
    for name in ("step_00000004.partial", "step_00000005.old"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000005.old" / "notes.md").touch()
    checkpoint_directory.prune(tmp_path, 1)
    checkpoint_directory.sweep(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["step_00000001", "step_00000003", "step_00000005.old"]
