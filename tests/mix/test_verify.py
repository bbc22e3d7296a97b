"""``btx verify``: what must be there comes from the plan; whatever is not so is told (exit 1)."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_btx.errors import UserError
from megatron_btx.mix.reference import reader
from megatron_btx.weights.file_hashes import HASHES, hashes_of
from tests.mix.commands import btx, named, save
from tests.weights.models import DENSE, dense


@pytest.fixture(scope="module")
def results(sources, tmp_path_factory):
    """One mix in both formats, in several files each."""
    root = tmp_path_factory.mktemp("results")
    for form in ("hf", "megatron"):
        words = ["--sources", *named(sources, form), "--out", root / form, "--format", form]
        btx("mix", *words, "--shard", "100kB")
        assert btx("verify", root / form)[0] == 0
    return root


@pytest.fixture(params=["hf", "megatron"])
def result(request, results, tmp_path):
    shutil.copytree(results / request.param, tmp_path / "result")
    return tmp_path / "result"


def weights(result):
    return sorted([*result.glob("*.safetensors"), *result.glob("*.distcp")])


def test_a_stage_stands_for_its_last_step(results, tmp_path):
    steps = tmp_path / "finetune" / "checkpoints"
    shutil.copytree(results / "megatron", steps / "step_00000001")
    assert btx("verify", tmp_path / "finetune")[0] == 0
    weights(steps / "step_00000001")[0].write_bytes(b"")
    assert btx("verify", tmp_path / "finetune")[0] == 1


@pytest.mark.parametrize("hashed", [True, False])
def test_a_removed_file_is_told(result, hashed):
    removed = weights(result)[1]
    removed.unlink()
    if not hashed:
        (result / HASHES).unlink()
    code, said = btx("verify", result)
    assert code == 1
    assert "missing: model.layers." in said
    assert (f"changed: {removed.name}: is missing" in said) == hashed


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("rope_theta", 5e5, "rotary_base"),
        ("num_experts_per_tok", 1, "gates"),
        ("btx_experts", ["math", "code", "prose", "seed"], "experts"),
        ("sliding_window", 7, "window_size"),
    ],
)
def test_another_description_of_the_same_tensors_is_told(results, tmp_path, key, value, name):
    """The tensors agree, and what is computed with them is another model."""
    shutil.copytree(results / "hf", tmp_path / "hf")
    (tmp_path / "hf" / HASHES).unlink()
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    code, said = btx("verify", tmp_path / "hf")
    assert code == 1
    assert f"described: {name} is " in said
    assert "79 of 79 tensors agree" in said


def test_another_manifest_of_the_same_tensors_is_told(results, tmp_path):
    shutil.copytree(results / "megatron", tmp_path / "m")
    (tmp_path / "m" / HASHES).unlink()
    path = tmp_path / "m" / "manifest.json"
    content = json.loads(path.read_text())
    content["model"]["rotary_base"] = 5e5
    path.write_text(json.dumps(content))
    code, said = btx("verify", tmp_path / "m")
    assert code == 1
    assert "described: rotary_base is 500000.0, not 10000.0 as it was mixed" in said


def test_a_lineage_without_a_source_s_hashes_is_told(results, tmp_path):
    """What is looked at comes from the source, not from a list that may be empty."""
    shutil.copytree(results / "hf", tmp_path / "hf")
    path = tmp_path / "hf" / "mix.json"
    lineage = json.loads(path.read_text())
    lineage["sources"][1]["sha256"] = {}
    path.write_text(json.dumps(lineage))
    (tmp_path / "hf" / HASHES).unlink()
    code, said = btx("verify", tmp_path / "hf")
    assert code == 1
    for name in ("config.json", "model.safetensors"):
        assert f"{name} is not among the files that were mixed" in said


def test_all_files_removed_are_told(result):
    for path in weights(result):
        path.unlink()
    (result / HASHES).unlink()
    code, said = btx("verify", result)
    assert code == 1
    assert "0 of 79 tensors agree" in said
    assert "and 59 more like these" in said


def test_an_extra_tensor_of_a_hugging_face_result_is_told(results, tmp_path):
    out = tmp_path / "result"
    shutil.copytree(results / "hf", out)
    first = weights(out)[0]
    tensors = load_file(first)
    tensors["model.layers.9.mlp.gate.weight"] = torch.zeros(2)
    save_file(tensors, first)
    code, said = btx("verify", out)
    assert code == 1
    assert "unexpected: model.layers.9.mlp.gate.weight" in said
    assert f"changed: {first.name}: is not what was written" in said
    assert "79 of 79 tensors agree" in said


def test_a_file_more_is_told(results, tmp_path):
    out = tmp_path / "result"
    shutil.copytree(results / "hf", out)
    save_file({"a": torch.zeros(1)}, out / "consolidated.safetensors")
    code, said = btx("verify", out)
    assert code == 1
    assert "unexpected: consolidated.safetensors" in said


@pytest.mark.parametrize("kind", ["a key", "a layer"])
def test_an_extra_tensor_of_a_megatron_result_is_told(results, tmp_path, kind):
    out = tmp_path / "result"
    shutil.copytree(results / "megatron", out)
    metadata = pickle.loads((out / ".metadata").read_bytes())
    entries = metadata.state_dict_metadata
    key = "decoder.layers.mlp.router.weight"
    if kind == "a key":
        entries["decoder.layers.mlp.router.bias"] = entries[key]
    else:
        entries[key].size = torch.Size((5, *entries[key].size[1:]))
    (out / ".metadata").write_bytes(pickle.dumps(metadata))
    code, said = btx("verify", out)
    assert code == 1
    want = {"a key": f"{key[:-6]}bias", "a layer": f"{key} is stored for (5,), not (4,)"}[kind]
    assert f"unexpected: {want}" in said
    assert "changed: .metadata" in said


def test_a_source_that_has_changed_is_told(sources, results, tmp_path):
    out, moved = tmp_path / "result", tmp_path / "code"
    shutil.copytree(results / "hf", out)
    shutil.copytree(sources / "hf" / "code", moved)
    lineage = json.loads((out / "mix.json").read_text())
    lineage["sources"][0]["path"] = str(moved)
    (out / "mix.json").write_text(json.dumps(lineage))
    (out / HASHES).unlink()
    assert btx("verify", out)[0] == 0
    config = moved / "config.json"
    config.write_text(config.read_text() + "\n")
    (moved / "generation_config.json").unlink()
    code, said = btx("verify", out)
    assert code == 1
    assert f"source code: {config} has changed since it was mixed" in said
    assert f"source code: {moved / 'generation_config.json'} is missing" in said
    assert "79 of 79 tensors agree" in said


def test_what_is_no_mix_is_compared_with_its_hashes(sources, tmp_path):
    step = tmp_path / "step"
    shutil.copytree(sources / "megatron" / "code", step)
    code, said = btx("verify", step)
    count = len(hashes_of(step))
    assert (code, said) == (0, f"{step}: {count} of {count} files are what was written\n")
    path = step / "__0_1.distcp"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, said = btx("verify", step)
    assert code == 1
    assert f"{count - 1} of {count} files" in said
    assert "changed: __0_1.distcp: is not what was written" in said
    (step / HASHES).unlink()
    with pytest.raises(UserError, match="no lineage to verify"):
        btx("verify", step)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"request": 1}', '{"request": {}}'])
def test_a_damaged_lineage_is_one_error(results, tmp_path, content):
    out = tmp_path / "result"
    shutil.copytree(results / "hf", out)
    (out / "mix.json").write_text(content)
    with pytest.raises(UserError) as caught:
        btx("verify", out)
    assert str(out / "mix.json") in str(caught.value)


@pytest.mark.parametrize("form", ["hf", "megatron"])
def test_the_work_is_linear_in_layers(tmp_path, monkeypatch, form):
    """Counted, not timed: archives and slices that are read, and headers that are opened."""
    counts = {}
    for layers in (4, 8, 16):
        shape = replace(DENSE, model=replace(DENSE.model, num_layers=layers))
        root = tmp_path / str(layers)
        root.mkdir()
        for label, seed in (("a", 0), ("b", 1)):
            save(dense(label, seed, architecture=shape), root / label, form)
        words = ["--sources", root / "a", root / "b", "--format", form, "--out", root / "out"]
        btx("mix", *words)
        calls = []
        with monkeypatch.context() as patch:
            for owner, name in ((torch, "load"), (reader, "safe_open")):
                patch.setattr(owner, name, _counting(getattr(owner, name), calls))
            assert btx("verify", root / "out")[0] == 0
        counts[layers] = len(calls)
    steps = counts[8] - counts[4], counts[16] - counts[8]
    assert steps[1] == 2 * steps[0], counts


def _counting(function, calls):
    def call(*arguments, **options):
        calls.append(function)
        return function(*arguments, **options)

    return call


NORMS = (
    "decoder.layers.pre_mlp_layernorm.weight",
    "decoder.layers.mlp.linear_fc1.layer_norm_weight",
)


@pytest.mark.parametrize("kept", NORMS)
def test_an_moe_norm_under_either_name_is_read(results, tmp_path, kept):
    """NVIDIA's local layer spec looks for an MoE layer's norm under the dense one's name."""
    made = tmp_path / "made"
    shutil.copytree(results / "megatron", made)
    content = pickle.loads((made / ".metadata").read_bytes())
    (gone,) = set(NORMS) - {kept}
    entries, places = content.state_dict_metadata, content.storage_data
    entries[kept] = entries.get(kept) or entries[gone]
    content.storage_data = {
        replace(index, fqn=kept) if index.fqn == gone else index: info
        for index, info in places.items()
    }
    entries.pop(gone, None)
    (made / ".metadata").write_bytes(pickle.dumps(content))
    (made / HASHES).unlink()
    code, said = btx("verify", made)
    assert (code, said.count("79 of 79 tensors agree")) == (0, 1)
    for source, name in ((made, "theirs"), (results / "megatron", "ours")):
        btx("mix", "--method", "copy", "--sources", source, "--out", tmp_path / name)
    pair = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "theirs")]
    assert pair[0] == pair[1]
