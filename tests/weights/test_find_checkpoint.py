"""One rule for which checkpoint a path stands for, wherever one is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_btx.errors import UserError
from megatron_btx.recipe.stages import model_stage, recipe_key, stage_of_key
from megatron_btx.weights.find_checkpoint import find_checkpoint, is_hugging_face, name_of


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run whose seed is at step 12, with an older step and what a killed rank left."""
    for name in ("step_00000003", "step_00000012", "step_00000020.partial", "step_0000002x"):
        path = tmp_path / "run" / "seed" / "checkpoints" / name
        path.mkdir(parents=True)
        (path / ".metadata").touch()
    (tmp_path / "run" / "prepare").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    return tmp_path / "run"


def test_a_step_a_stage_and_a_hugging_face_directory(run_dir: Path, tmp_path: Path) -> None:
    steps = run_dir / "seed" / "checkpoints"
    assert find_checkpoint(steps / "step_00000003") == steps / "step_00000003"
    assert find_checkpoint(run_dir / "seed") == steps / "step_00000012"
    assert find_checkpoint(steps) == steps / "step_00000012"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").touch()
    assert find_checkpoint(str(tmp_path / "hf")) == tmp_path / "hf"
    assert is_hugging_face(tmp_path / "hf")
    assert not is_hugging_face(steps / "step_00000003")


def test_a_run_says_which_stages_it_holds(run_dir: Path) -> None:
    (run_dir / "finetune" / "checkpoints" / "step_00000002").mkdir(parents=True)
    (run_dir / "export" / "hf").mkdir(parents=True)
    (run_dir / "export" / "hf" / "config.json").touch()
    with pytest.raises(UserError, match="checkpoints are in finetune, seed, export/hf") as found:
        find_checkpoint(run_dir)
    assert str(run_dir / "export" / "hf") in found.value.fix


@pytest.mark.parametrize(
    ("dense", "best"),
    [("seed", "seed"), ("math", "expert-math"), ("code", "expert-wiki"), ("dense", "dense")],
)
def test_a_run_offers_no_mixture_for_a_dense_model(run_dir: Path, dense: str, best: str) -> None:
    """Of what is left, the stage of that name is named, else an expert."""
    for stage in ("dense", "expert-math", "expert-wiki", "finetune"):
        (run_dir / stage / "checkpoints" / "step_00000002").mkdir(parents=True)
    (run_dir / "export" / "hf").mkdir(parents=True)
    (run_dir / "export" / "hf" / "config.json").touch()
    with pytest.raises(UserError, match="dense checkpoints are in dense, expert-math") as found:
        find_checkpoint(run_dir, dense)
    assert "finetune" not in str(found.value)
    assert "export" not in str(found.value)
    assert found.value.fix == f"give one of them, such as {run_dir / best}"


def test_a_link_that_leads_nowhere(run_dir: Path) -> None:
    """A stage shared with another run, in a run's directory that was moved."""
    (run_dir / "finetune").symlink_to("../other/finetune")
    (run_dir / "seed" / "stage.json").touch()
    with pytest.raises(UserError, match="link to ../other/finetune, where nothing is") as found:
        find_checkpoint(run_dir / "finetune")
    assert f"btx run {run_dir}" in found.value.fix


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ("expert:math", "did you mean {}/expert-math?"),
        ("math", "did you mean {}/expert-math?"),
        ("sed", "did you mean {}/seed?"),
        ("other", "give one of them"),
    ],
)
def test_a_stage_that_is_not_there(run_dir: Path, given: str, fix: str) -> None:
    """Stages are called ``expert:math``, and their directories ``expert-math``."""
    (run_dir / "expert-math" / "checkpoints" / "step_00000002").mkdir(parents=True)
    (run_dir / "seed" / "stage.json").touch()
    with pytest.raises(
        UserError, match="checkpoints of that run are in expert-math, seed"
    ) as found:
        find_checkpoint(run_dir / given)
    assert found.value.fix == fix.format(run_dir)


def test_a_run_without_a_dense_model(run_dir: Path) -> None:
    (run_dir / "seed").rename(run_dir / "finetune")
    with pytest.raises(UserError, match="no stage has a dense checkpoint yet"):
        find_checkpoint(run_dir, "seed")


def test_what_is_none_is_named(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        find_checkpoint(tmp_path / "none")
    with pytest.raises(UserError, match="not a checkpoint"):
        find_checkpoint(run_dir / "prepare")
    with pytest.raises(UserError, match="Hugging Face Hub"):
        find_checkpoint("meta-llama/Llama-3.1-8B")
    for local in ("./meta-llama/x", "../meta-llama/x", "a/b/c", f"{tmp_path}/meta-llama/x"):
        with pytest.raises(UserError, match="does not exist"):
            find_checkpoint(local)
    (run_dir / "prepare" / "done.json").touch()
    with pytest.raises(UserError, match="holds no checkpoint any more") as found:
        find_checkpoint(run_dir / "prepare")
    assert str(run_dir / "prepare" / "done.json") in found.value.fix
    (tmp_path / "mix").mkdir()
    (tmp_path / "mix" / "done.json").touch()
    with pytest.raises(UserError, match="a stage that writes no weights") as found:
        find_checkpoint(tmp_path / "mix")
    assert found.value.fix == f"give {tmp_path / 'finetune'}"
    (tmp_path / "lm" / "iter_0000010").mkdir(parents=True)
    with pytest.raises(UserError) as found:
        find_checkpoint(tmp_path / "lm")
    assert found.value.fix == f"give {tmp_path / 'lm' / 'iter_0000010'}"


def test_names_of_models_that_nobody_has_named(run_dir: Path) -> None:
    """Steps of equal length in two stages are two names."""
    assert name_of(run_dir / "seed" / "checkpoints" / "step_00000003") == "seed"
    assert name_of(run_dir / "seed") == "seed"


def test_a_stage_and_its_key_in_a_recipe() -> None:
    pairs = {"expert:math": "experts.math", "seed": "seed", "expert:a.b": "experts.a.b"}
    for stage, key in pairs.items():
        assert recipe_key(stage) == key
        assert stage_of_key(key) == stage
    assert [model_stage(model) for model in ("seed", "math")] == ["seed", "expert:math"]
