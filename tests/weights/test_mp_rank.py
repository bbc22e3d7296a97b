"""Megatron-LM's older form: shards of TP x PP, written here as `--ckpt-format torch` writes them
(tests/megatron_lm has its own trainer do it)."""

from __future__ import annotations

import argparse
import re
import shlex
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_btx.errors import UserError
from megatron_btx.families.open_checkpoint import open_checkpoint
from megatron_btx.families.write_megatron_lm_args import command_line
from megatron_btx.mix.reference.reader import open_plain
from megatron_btx.weights.find_checkpoint import find_checkpoint
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.plan import Checkpoint
from megatron_btx.weights.source import read_whole
from tests.mix.commands import btx
from tests.weights.models import DENSE, dense
from tests.weights.test_megatron_lm_args import ARGS, Evil

TP, PP = 2, 2


def shard(name: str, tensor: torch.Tensor, tp: int) -> torch.Tensor:
    """Rank ``tp``'s part, as Megatron's layers divide their weights."""
    if name.endswith("linear_fc1.weight"):
        gate, up = tensor.chunk(2)
        return torch.cat([gate.chunk(TP)[tp], up.chunk(TP)[tp]])
    if name.endswith(("linear_qkv.weight", "word_embeddings.weight", "output_layer.weight")):
        return tensor.chunk(TP)[tp].clone()
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return tensor.chunk(TP, 1)[tp].clone()
    return tensor


def write(directory: Path, args: Any = None, *, virtual: int = 1, **content: Any) -> None:
    """A dense model under TP x PP, with ``virtual`` stages on every pipeline rank."""
    sizes = {
        "tensor_model_parallel_size": TP,
        "pipeline_model_parallel_size": PP,
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
    }
    for tp in range(TP):
        stages = stages_of(dense("a", 1), tp, PP * virtual)
        for pp in range(PP):
            mine = stages[pp::PP]
            keys = ["model"] if virtual == 1 else [f"model{number}" for number in range(virtual)]
            folder = directory / f"mp_rank_{tp:02d}_{pp:03d}"
            folder.mkdir(parents=True)
            everything = {
                "args": args or argparse.Namespace(**ARGS, **sizes),
                "checkpoint_version": 3.0,
                "iteration": 7,
                **dict(zip(keys, mine, strict=True)),
                "rng_state": [{"np_rng_state": np.random.get_state(), "cpu": torch.ones(3)}],
                "optimizer": {"state": {0: {"exp_avg": torch.ones(4)}}},
            }
            torch.save(everything | content, folder / "model_optim_rng.pt")


def stages_of(model: Checkpoint, tp: int, count: int) -> list[Any]:
    """Rank ``tp``'s tensors of each stage, layers counted from its first."""
    per_stage = DENSE.model.num_layers // count
    states: list[Any] = [OrderedDict() for _ in range(count)]
    for name in model.tensors:
        parts = name.split(".")
        stage = 0 if "embed" in name else count - 1
        if name.startswith("decoder.layers."):
            stage, layer = divmod(int(parts[2]), per_stage)
            parts[2] = str(layer)
        states[stage][".".join(parts)] = shard(name, read_whole(model.source, name), tp)
    for state in states:
        state._metadata = OrderedDict(version=1)  # as a module's state has it
        state["decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
    return states


@pytest.mark.parametrize(("name", "virtual"), [("iter_0000007", 1), ("release", 1), ("release", 2)])
def test_shards_of_tp_and_pp_are_one_model(name: str, virtual: int, tmp_path: Path) -> None:
    write(tmp_path / name, virtual=virtual)
    assert find_checkpoint(tmp_path / name) == tmp_path / name
    found, expected = open_megatron(tmp_path / name, "m"), dense("a", 1)
    assert found.architecture == DENSE
    assert found.manifest["tokens"] == 1000 * DENSE.model.seq_length
    assert found.tensors.keys() == expected.tensors.keys()
    for each in expected.tensors:
        assert torch.equal(read_whole(found.source, each), read_whole(expected.source, each)), each
    box = ((3, 9), (1, 2))
    each = "decoder.layers.2.mlp.linear_fc1.weight"
    assert torch.equal(found.source.read(each, box), expected.source.read(each, box))


def test_they_are_mixed(tmp_path: Path) -> None:
    for label in ("code", "seed"):
        write(tmp_path / label)
    (tmp_path / "copies").mkdir()
    sources = [tmp_path / "code", tmp_path / "seed"]
    code, said = btx("mix", "--sources", *sources, "--average", "tokens", "--out", tmp_path / "out")
    assert code == 0, said
    with pytest.raises(UserError, match="mix the copy"):
        open_plain(tmp_path / "code", {})
    words = ["--method", "copy", "--format", "megatron", "--out"]
    for label in ("code", "seed"):
        named = f"{label}={tmp_path / label}"
        code, said = btx("mix", "--sources", named, *words, tmp_path / "copies" / label)
        assert code == 0, said


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "mp_rank_01_000/model_optim_rng.pt: missing"),
        ("truncated", "mp_rank_01_000/model_optim_rng.pt: not what torch.save writes"),
        ("text", "mp_rank_01_000/model_optim_rng.pt: not what torch.save writes"),
    ],
)
def test_a_damaged_shard_is_one_error(damage: str, words: str, tmp_path: Path) -> None:
    write(tmp_path / "iter")
    file = tmp_path / "iter" / "mp_rank_01_000" / "model_optim_rng.pt"
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"text")
    with pytest.raises(UserError) as caught:
        open_megatron(tmp_path / "iter", "m")
    assert words in str(caught.value)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("good") / "iter"
    write(directory)
    return directory


def edited(good: Path, out: Path, edit: Callable[[str, dict[str, Any]], None]) -> Path:
    """A copy in which ``edit`` has changed what every rank's file says."""
    for file in good.glob("*/model_optim_rng.pt"):
        content = torch.load(file, weights_only=False)
        edit(file.parent.name, content)
        (out / file.parent.name).mkdir(parents=True)
        torch.save(content, out / file.parent.name / file.name)
    return out


def arguments(**changes: Any) -> Callable[[str, dict[str, Any]], None]:
    return lambda _, content: vars(content["args"]).update(changes)


def tensor(name: str, made: Callable[[], Any], ranks: str = "") -> Any:
    """A tensor of the model put, or another put in its place, on some ranks."""

    def edit(rank: str, content: dict[str, Any]) -> None:
        if rank.startswith(ranks):
            content["model"][name] = made()

    return edit


def itself() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def repeated() -> list[Any]:
    """A thousand million values in some hundred bytes."""
    found: list[Any] = [1]
    for _ in range(9):
        found = [found] * 10
    return [found]


def deep() -> list[Any]:
    found: list[Any] = [1]
    for _ in range(90):
        found = [found]
    return found


LAYER = "decoder.layers.0."
QKV, FC1, FC2 = (
    LAYER + name
    for name in (
        "self_attention.linear_qkv.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    )
)
RANK_0 = r"mp_rank_00_000/model_optim_rng.pt"
SIZES = ("tensor", "pipeline", "expert")
DAMAGES: dict[str, tuple[Any, str]] = {
    "no arguments": (lambda _, c: c.update(args=None), "no arguments of Megatron-LM"),
    "a mapping": (lambda _, c: c.update(args={}), f"{RANK_0}: its args are of type dict"),
    "text": (arguments(num_experts="8"), "invalid num_experts: '8'"),
    "a list": (arguments(num_experts=[8]), r"invalid num_experts: \[8\]"),
    "true": (arguments(pipeline_model_parallel_size=True), "invalid pipeline_model_parallel_size"),
    "itself": (arguments(window_size=itself()), f"{RANK_0}: window_size of its args is nested"),
    "repeated": (arguments(normalization=repeated()), "normalization of its args is nested"),
    "deep": (arguments(expert_tensor_parallel_size=deep()), "expert_tensor_parallel_size of its"),
    "millions of ranks": (
        arguments(**{f"{kind}_model_parallel_size": 9999 for kind in SIZES}),
        "9999 x 9999 x 9999 ranks",
    ),
    "many ranks": (
        arguments(tensor_model_parallel_size=8, pipeline_model_parallel_size=16),
        "and 116 more like these",
    ),
    "another width": (tensor(QKV, lambda: torch.ones(32, 16), "mp_rank_01"), "has several shapes"),
    "another height": (tensor(FC1, lambda: torch.ones(50, 32), "mp_rank_01"), "has several shapes"),
    "odd rows": (tensor(FC1, lambda: torch.ones(49, 32)), "no gate above an up part"),
    "one row": (tensor(FC1, lambda: torch.ones(1, 32)), "no gate above an up part"),
    "fc1 a number": (tensor(FC1, lambda: torch.ones(())), "no gate above an up part"),
    "fc2 a vector": (tensor(FC2, lambda: torch.ones(32)), "no part of a matrix"),
    "embedding": (
        tensor("embedding.word_embeddings.weight", lambda: torch.ones(())), "no part of a matrix",
    ),
    "a long number": (
        tensor(f"decoder.layers.{'9' * 5000}.x", lambda: torch.ones(2)), "is unexpected",
    ),
    "legacy": (lambda _, c: c["model"].update(language_model={}), "legacy model format.*convert"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_content_is_one_error(good: Path, name: str, tmp_path: Path) -> None:
    edit, words = DAMAGES[name]
    with pytest.raises(UserError, match=f"(?s){words}") as caught:
        open_checkpoint(edited(good, tmp_path / "iter", edit), "m")
    assert len(str(caught.value)) < 20_000


@pytest.mark.parametrize("directory", ["mp_rank_00", "mp_rank_01"])
def test_shards_of_several_dtypes_are_joined_in_the_wider(
    good: Path, directory: str, tmp_path: Path
) -> None:
    def narrow(rank: str, content: dict[str, Any]) -> None:
        if rank.startswith(directory):
            content["model"] = {
                k: v if v is None else v.bfloat16() for k, v in content["model"].items()
            }

    def rounded(rank: str, content: dict[str, Any]) -> None:
        narrow(rank, content)
        content["model"] = {k: v if v is None else v.float() for k, v in content["model"].items()}

    found = open_megatron(edited(good, tmp_path / "found", narrow), "m")
    expected = open_megatron(edited(good, tmp_path / "expected", rounded), "m")
    for name in expected.tensors:
        one, other = (read_whole(each.source, name) for each in (found, expected))
        assert torch.equal(one.float(), other), name


def test_the_command_that_is_printed_makes_what_megatron_lm_loads(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its torch_dist: of no other form there is a link that works."""
    monkeypatch.chdir(tmp_path)
    said = command_line(open_megatron(good, "m"), 1)
    (command,) = re.findall(r"mkdir load && btx (.*)", said)
    assert "ln -s" not in said
    assert "--ckpt-format torch_dist" in said
    (tmp_path / "load").mkdir()
    assert btx(*shlex.split(command))[0] == 0
    made = tmp_path / "load" / "release"
    assert f"mkdir load && ln -s {made} load/release\n" in command_line(open_megatron(made, "m"), 1)


def test_files_of_torch_before_2_1_do_not_say_their_byte_order(good: Path, tmp_path: Path) -> None:
    old = tmp_path / "iter"
    for file in good.glob("*/model_optim_rng.pt"):
        (old / file.parent.name).mkdir(parents=True)
        with (
            zipfile.ZipFile(file) as new,
            zipfile.ZipFile(old / file.parent.name / file.name, "w") as made,
        ):
            for entry in new.namelist():
                if entry.endswith(("/data.pkl", "/version")) or "/data/" in entry:
                    made.writestr(entry, new.read(entry))
    found, expected = open_megatron(old, "m"), dense("a", 1)
    for name in expected.tensors:
        assert torch.equal(read_whole(found.source, name), read_whole(expected.source, name)), name


def test_what_is_divided_otherwise_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "virtual", virtual=2, model1=None)
    with pytest.raises(UserError, match="holds no `model1`, which its arguments speak of"):
        open_megatron(tmp_path / "virtual", "m")
    args = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "num_experts": 4}
    write(tmp_path / "experts", argparse.Namespace(**(ARGS | args)))
    with pytest.raises(UserError, match=r"experts of tensor-parallel size 1"):
        open_megatron(tmp_path / "experts", "m")


def test_a_malicious_shard_is_refused_and_not_run(tmp_path: Path) -> None:
    write(tmp_path / "iter", Evil(tmp_path / "owned"))
    with pytest.raises(UserError, match="which no checkpoint needs: refused"):
        open_megatron(tmp_path / "iter", "m")
    assert not (tmp_path / "owned").exists()
