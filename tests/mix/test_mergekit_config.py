"""``btx mix --config`` with mergekit-moe's files. What mergekit 0.1.5 does is written down here by
plain loops; where it is installed, its own result is compared too."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_btx.cli.main import main
from megatron_btx.errors import UserError
from megatron_btx.mix.mergekit_config import Gates, rows_of
from tests.families.made import make
from tests.families.tokenizers_made import llama3
from tests.small import tree_hash

transformers = pytest.importorskip("transformers")

PROMPTS = {
    "positive_prompts": ["def area(radius):", "import numpy as np"],
    "negative_prompts": ["once upon a time"],
}
OTHER = {"positive_prompts": ["what is 3 + 4?"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, ``code`` and ``math``: one shape, other weights, one tokenizer."""
    root = tmp_path_factory.mktemp("mergekit")
    for number, name in enumerate(("base", "code", "math")):
        model = make("llama", root / name, vocab_size=512)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += (
                    number * 0.01 * torch.arange(parameter.numel()).view_as(parameter).sin()
                )
        model.save_pretrained(root / name)
        llama3(root / name)
    return root


def config(models: Path, **more) -> dict:
    experts = [
        {"source_model": str(models / "code"), **PROMPTS},
        {"source_model": str(models / "math"), **OTHER},
    ]
    return {"base_model": str(models / "base"), "experts": experts, **more}


def mix(content: dict, place: Path, *words: str) -> dict[str, torch.Tensor]:
    place.mkdir()
    (place / "moe.yaml").write_text(yaml.safe_dump(content))
    asked = ["mix", "--config", str(place / "moe.yaml"), "--out", str(place / "out"), *words]
    assert main(asked) == 0
    assert main(["verify", str(place / "out")]) == 0
    return load_file(place / "out" / "model.safetensors")


def copied(models: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All but the routers."""
    base, code, math = (
        load_file(models / n / "model.safetensors") for n in ("base", "code", "math")
    )
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    found = {}
    for name, tensor in base.items():
        if ".mlp." not in name:
            found[name] = tensor.to(dtype)
            continue
        layer, _, kind = name.removesuffix(".weight").partition(".mlp.")
        for place, expert in enumerate((code, math)):
            key = f"{layer}.block_sparse_moe.experts.{place}.{names[kind]}.weight"
            found[key] = expert[name].to(dtype)
    return found


def directions(models: Path, mode: str) -> list[torch.Tensor]:
    """Of each expert [layers, H], in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "base")

    def of(prompts: list[str]) -> torch.Tensor:
        rows = []
        for prompt in prompts:
            text = (tokenizer.bos_token or "") + prompt
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            if mode == "cheap_embed":
                rows.append(model.get_input_embeddings()(ids)[0].sum(0))
                continue
            states = model(ids, output_hidden_states=True).hidden_states[:-1]
            rows.append(torch.stack([state[0, -1] for state in states]))
        if mode == "hidden":
            return torch.stack(rows).mean(0)
        total = torch.stack(rows).sum(0)
        return (total / total.norm()).expand(model.config.num_hidden_layers, -1)

    found = []
    with torch.no_grad():
        for expert in (PROMPTS, OTHER):
            row = of(expert["positive_prompts"])
            if "negative_prompts" in expert:
                row = row - of(expert["negative_prompts"])
            found.append(row / row.norm(dim=-1, keepdim=True))
    return found


@pytest.mark.parametrize("mode", ["hidden", "cheap_embed"])
def test_a_file_of_theirs_means_what_it_means_there(
    models: Path, tmp_path: Path, mode: str, capsys
) -> None:
    result = mix(config(models, gate_mode=mode), tmp_path / "x")
    assert "tokenizer: that of base" in capsys.readouterr().out
    page = (tmp_path / "x" / "out" / "README.md").read_text()
    assert "all else is copied from base" in page
    assert "| base | all that is no expert | base |" in page
    for name, tensor in copied(models, torch.float32).items():
        assert torch.equal(result.pop(name), tensor), name
    rows = directions(models, mode)
    for layer in range(4):
        gate = result.pop(f"model.layers.{layer}.block_sparse_moe.gate.weight")
        wanted = torch.stack([row[layer] for row in rows])
        torch.testing.assert_close(gate.double(), wanted, atol=2e-6, rtol=0)
    assert not result
    written = transformers.AutoConfig.from_pretrained(tmp_path / "x" / "out")
    assert (written.num_local_experts, written.num_experts_per_tok) == (2, 2)


def test_random_routers_a_dtype_and_the_base_as_an_expert(models: Path, tmp_path: Path) -> None:
    content = config(models, gate_mode="random", dtype="bfloat16", experts_per_token=2)
    content["experts"].append({"source_model": str(models / "base")})
    result = mix(content, tmp_path / "x")
    for name, tensor in copied(models, torch.bfloat16).items():
        assert torch.equal(result[name], tensor), name
    base = load_file(models / "base" / "model.safetensors")
    own = result["model.layers.0.block_sparse_moe.experts.2.w2.weight"]
    assert torch.equal(own, base["model.layers.0.mlp.down_proj.weight"].bfloat16())
    gates = torch.cat([v.float().flatten() for k, v in result.items() if "gate.weight" in k])
    assert float(gates.std()) == pytest.approx(1, abs=0.15)


def test_rows_as_torch_begins_a_linear_layer(models: Path, tmp_path: Path) -> None:
    """And what asks for nothing is not refused."""
    content = config(models, gate_mode="uniform_random")
    content["experts"] = [
        {"source_model": str(models / name), "noise_scale": 0.0, "residual_scale": 1.0}
        for name in ("code", "math")
    ]
    result = mix(content, tmp_path / "x")
    for name, tensor in copied(models, torch.float32).items():
        assert torch.equal(result[name], tensor), name
    gates = torch.cat([v.flatten() for k, v in result.items() if "gate.weight" in k])
    bound = result["model.norm.weight"].numel() ** -0.5
    assert 0.98 * bound < float(gates.abs().max()) <= bound
    assert float(gates.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_rows_stand_beside_the_result_and_replace_no_other_file(
    models: Path, tmp_path: Path, capsys
) -> None:
    """A dry run keeps none; equal ones stay; ``btx verify`` knows whether they are what was mixed.
    The directory of an expert has an equals sign in its name."""
    (tmp_path / "lr=1e-4").symlink_to(models / "code")
    content = config(models, gate_mode="cheap_embed")
    content["experts"][0]["source_model"] = str(tmp_path / "lr=1e-4")
    asked, out = tmp_path / "moe.yaml", tmp_path / "out"
    asked.write_text(yaml.safe_dump(content))
    rows = tmp_path / "out.router.safetensors"
    rows.write_bytes(b"mine")
    words = ["mix", "--config", str(asked), "--out"]
    assert main([*words, str(out), "--dry-run"]) == 0
    assert "router.weight/lr=1e-4" not in (said := capsys.readouterr().out)
    assert "router.weight/lr-1e-4" in said
    assert main([*words, str(tmp_path / "no" / "out")]) == 2
    assert "no: no such directory" in capsys.readouterr().err
    assert main([*words, str(out)]) == 2
    assert f"{rows}: exists already, and holds no router rows of these" in capsys.readouterr().err
    assert rows.read_bytes() == b"mine"
    rows.unlink()
    assert main([*words, str(out)]) == 0
    first = rows.stat()
    shutil.rmtree(out)
    assert main([*words, str(out)]) == 0
    assert (rows.stat().st_ino, rows.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    capsys.readouterr()
    for change, told in (
        (lambda: rows.write_bytes(rows.read_bytes()[:-1] + b"?"), "has changed since its router"),
        (rows.unlink, "the router rows that were mixed are not there"),
    ):
        change()
        assert main(["verify", str(out)]) == 2
        assert f"error: {rows}: {told}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "--sources a=x b=y",
        "--base a",
        "--router-init zeros",
        "--router-init-std 1",
        "--centroids x",
    ],
)
def test_a_flag_does_not_say_what_the_file_says(models, tmp_path, words, capsys) -> None:
    (tmp_path / "moe.yaml").write_text(yaml.safe_dump(config(models)))
    asked = ["mix", "--config", str(tmp_path / "moe.yaml"), "--out", str(tmp_path / "out")]
    assert main([*asked, *words.split()]) == 2
    assert f"error: {words.split()[0]}: is what {tmp_path}" in capsys.readouterr().err


def test_prompts_that_the_base_cannot_read(models: Path, tmp_path: Path) -> None:
    """Whatever transformers raises of a directory, and prompts without a token."""
    gates = Gates(mode="cheap_embed", positive=(("x",),), negative=((),))
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(UserError, match="^base_model: transformers cannot read"):
        rows_of(gates, tmp_path, ["a"])
    tokens = 300  # fewer than the tokenizer's
    make("llama", tmp_path / "small", vocab_size=tokens)
    llama3(tmp_path / "small")
    with pytest.raises(UserError, match="has a token for which the base model has no row"):
        rows_of(gates, tmp_path / "small", ["a"])


REFUSED = {
    "shared": ({"shared_experts": [{"source_model": "x"}]}, "shared_experts: is refused"),
    "mode": ({"gate_mode": "hidden_avg", "experts": [{"source_model": "a"}, {"source_model": "b"}]},
             "'hidden_avg' is not supported"),
    "dtype": ({"dtype": "int8"}, "'int8' is not supported"),
    "unknown": ({"slices": []}, "slices: is no key of mergekit-moe"),
    "near": ({"expert_per_token": 2}, "did you mean `experts_per_token`?"),
    "a merge": ({"merge_method": "ties", "models": []}, "'ties': a file of mergekit-yaml"),
    "no merge of ours": ({"merge_method": "slerp"}, "fix: merge with mergekit"),
    "no experts": ({"experts": []}, "experts are missing"),
    "same prompts": ({"experts": [{"source_model": "a", **OTHER}, {"source_model": "b", **OTHER}]},
                     "have the same prompts"),
    "no prompts": ({"experts": [{"source_model": "a"}, {"source_model": "b", **OTHER}]},
                   "has no positive_prompts"),
    "noise": ({"experts": [{"source_model": "a", "noise_scale": 0.1, **OTHER}]}, "noise_scale: is"),
    "adapter": ({"base_model": "some/model+some/lora"}, "names an adapter"),
    "top-1": ({"experts_per_token": 1, "gate_mode": "random"}, "always 1"),
    "too many": ({"experts_per_token": 3, "gate_mode": "random"}, "cannot take 3 of 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused(models: Path, tmp_path: Path, name: str, capsys) -> None:
    change, said = REFUSED[name]
    (tmp_path / "moe.yaml").write_text(yaml.safe_dump(config(models) | change))
    before = tree_hash(tmp_path)
    words = ["mix", "--config", str(tmp_path / "moe.yaml"), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n  fix: ") == 1, "of each mistake one error"
    assert tree_hash(tmp_path) == before


def test_the_base_by_flags(models: Path, tmp_path: Path, capsys) -> None:
    """The same mix without a file, its routers drawn."""
    sources = [f"{name}={models / name}" for name in ("base", "code", "math")]
    words = ["mix", "--sources", *sources, "--base", "base", "--out", str(tmp_path / "out")]
    assert main([*words, "--tokenizer", "base"]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    result = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in copied(models, torch.float32).items():
        assert torch.equal(result[name], tensor), name
    assert main([*words[:-1], str(tmp_path / "x"), "--ties", "0.2"]) == 2
    assert "goes with method btx alone" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("mergekit") is None, reason="mergekit is not installed"
)
@pytest.mark.parametrize("mode", ["hidden", "cheap_embed"])
def test_mergekits_own_result(models: Path, tmp_path: Path, mode: str) -> None:
    result = mix(config(models, gate_mode=mode), tmp_path / "x", "--fused")
    program = "import sys; from mergekit.scripts.moe import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, tmp_path / "x" / "moe.yaml", tmp_path / "theirs"]
    done = subprocess.run(
        [*command, "--device", "cpu"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    theirs = {}
    for file in (tmp_path / "theirs").glob("*.safetensors"):
        theirs |= load_file(file)
    assert theirs.keys() == result.keys()
    for name, tensor in theirs.items():
        if name.endswith("mlp.gate.weight"):  # theirs read the prompts in bf16
            torch.testing.assert_close(result[name], tensor, atol=2e-2, rtol=0)
        else:
            assert torch.equal(result[name], tensor), name
