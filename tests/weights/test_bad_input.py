"""Directories that are missing, truncated, corrupt or malicious: one error, nothing run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from megatron_btx.errors import UserError
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.read_torch_zip import Chunk, payload_of
from megatron_btx.weights.safetensors import SafetensorsSource
from megatron_btx.weights.source import read_whole
from megatron_btx.weights.write_torch_dist import write_torch_dist
from tests.weights.models import moe_plan
from tests.weights.test_directories import manifest


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    plan = moe_plan()
    out = tmp_path_factory.mktemp("good") / "step"
    write_torch_dist(plan, out, files=lambda: manifest(plan), shard=50_000)
    return out


class Evil:
    """What an attacker would leave in a pickle."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_headers(directory) -> None:
    """Every archive of a file loses its zip directory."""
    path = directory / "__0_1.distcp"
    path.write_bytes(path.read_bytes().replace(b"PK\1\2", b"XX\1\2"))


def edit_manifest(**changes):
    def edit(directory) -> None:
        path = directory / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_model(**changes):
    def edit(directory) -> None:
        path = directory / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["model"] |= changes
        path.write_text(json.dumps(manifest))

    return edit


def rename_tensor(directory) -> None:
    path = directory / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"mlp.router.weight", b"mlp.router.weighs"))


def drop_chunk(directory) -> None:
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["decoder.layers.mlp.router.weight"].chunks.pop()
    path.write_bytes(pickle.dumps(metadata))


def edit_metadata(edit):
    def damage(directory) -> None:
        path = directory / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        edit(metadata)
        path.write_bytes(pickle.dumps(metadata))

    return damage


ROUTER = "decoder.layers.mlp.router.weight"


def repeat_a_chunk(metadata) -> None:
    """As many elements as there should be: some twice, others never."""
    chunks = metadata.state_dict_metadata[ROUTER].chunks
    chunks[1] = chunks[0]


def enlarge(metadata) -> None:
    """A tensor of petabytes, in an archive of some bytes."""
    entry = metadata.state_dict_metadata[ROUTER]
    entry.size = torch.Size((1 << 40, 4, 32))
    entry.chunks[:] = [type(entry.chunks[0])(torch.Size((0, 0, 0)), entry.size)]


def misplace(metadata) -> None:
    for index, info in metadata.storage_data.items():
        if index.fqn == ROUTER:
            info.offset = -64


def nest(key: str, times: int):
    """In place of a tensor's size or dtype a list of itself, in lists of lists."""

    def damage(metadata) -> None:
        found = []
        found.append(found)
        for _ in range(times):
            found = [found]
        entry = metadata.state_dict_metadata[ROUTER]
        setattr(*((entry, "size") if key == "size" else (entry.properties, "dtype")), found)

    return damage


DAMAGES = {
    "a size that holds itself": (edit_metadata(nest("size", 0)), "(a list): not sizes"),
    "a size of lists of lists": (edit_metadata(nest("size", 90)), "(a list): not sizes"),
    "a name that is none": (
        edit_metadata(lambda m: m.state_dict_metadata.update({("a", 1): "an object"})),
        "a tuple is no name",
    ),
    "a dtype that holds itself": (edit_metadata(nest("dtype", 0)), "is of type a list"),
    "a chunk twice": (edit_metadata(repeat_a_chunk), "some elements are stored twice"),
    "a tensor of petabytes": (edit_metadata(enlarge), "a chunk ((0, 1099511627776)"),
    "a negative offset": (edit_metadata(misplace), "not sizes"),
    "a memo of gigabytes": (
        lambda d: (d / ".metadata").write_bytes(b"\x80\x02Nr\xff\xff\xff\x0f."),
        "place 268435455 of the memo",
    ),
    "a byte array of petabytes": (
        lambda d: (d / ".metadata").write_bytes(b"\x80\x05\x96\0\0\0\0\0\1\0\0."),
        "truncated or corrupt",
    ),
    "metadata is a pipe": (
        lambda d: ((d / ".metadata").unlink(), os.mkfifo(d / ".metadata")),
        "is a pipe or a device",
    ),
    "metadata is endless": (
        lambda d: ((d / ".metadata").unlink(), (d / ".metadata").symlink_to("/dev/zero")),
        "is a pipe or a device",
    ),
    "a file is a pipe": (
        lambda d: ((d / "__0_1.distcp").unlink(), os.mkfifo(d / "__0_1.distcp")),
        "__0_1.distcp: missing",
    ),
    "no metadata": (lambda d: (d / ".metadata").unlink(), "not a Megatron torch_dist checkpoint"),
    "truncated metadata": (lambda d: truncate(d / ".metadata"), "truncated or corrupt"),
    "metadata is text": (lambda d: (d / ".metadata").write_text("hello"), "truncated or corrupt"),
    "metadata of something else": (
        lambda d: (d / ".metadata").write_bytes(pickle.dumps({"a": 1})),
        "not a checkpoint's metadata",
    ),
    "malicious metadata": (
        lambda d: (d / ".metadata").write_bytes(pickle.dumps(Evil(d / "owned"))),
        "which no checkpoint needs: refused",
    ),
    "a file missing": (lambda d: (d / "__0_1.distcp").unlink(), "__0_1.distcp: missing"),
    "a file truncated": (lambda d: truncate(d / "__0_1.distcp"), "__0_1.distcp: truncated"),
    "archives corrupt": (flip_headers, "corrupt"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "no manifest.json"),
    "manifest truncated": (lambda d: truncate(d / "manifest.json"), "damaged"),
    "manifest of another format": (edit_manifest(format="other/2"), "not of the format"),
    "manifest without a model": (edit_manifest(model=None), "model.num_layers: is missing"),
    "another shape": (edit_model(ffn_hidden_size=64), "has shape (96, 32), not (128, 32)"),
    "more layers": (edit_model(num_layers=5), "layers.4.mlp.router.weight is missing"),
    "larger vocabulary": (edit_manifest(vocab_size=130), "padded_vocab_size: is 128, and 130"),
    "a tensor renamed": (rename_tensor, "layers.0.mlp.router.weighs is unexpected"),
    "a chunk lost": (drop_chunk, "384 of 512 elements are stored"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_one_error(good, tmp_path, name):
    damage, found = DAMAGES[name]
    directory = tmp_path / "step"
    shutil.copytree(good, directory)
    damage(directory)
    with pytest.raises(UserError) as caught:
        read_all(directory)
    assert found in str(caught.value)
    assert str(directory) in str(caught.value)
    assert not (directory / "owned").exists()


def read_all(directory) -> None:
    model = open_megatron(directory, "model")
    for tensor in model.tensors:
        read_whole(model.source, tensor)


def test_a_malicious_archive_is_refused(tmp_path):
    """Where a stored tensor's own header names a function."""
    path = tmp_path / "__0_0.distcp"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(tmp_path / "owned")))
    chunk = Chunk(((0, 4),), path, 0, path.stat().st_size)
    with pytest.raises(UserError, match="which no checkpoint needs: refused"):
        payload_of("tensor", torch.float32, chunk)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("order", [None, "little", "big"])
def test_the_byte_order_of_an_archive(tmp_path, order):
    """Torch before 2.1 does not say it: little, as on every machine that it trained on."""
    torch.save(torch.arange(4.0), tmp_path / "new.pt")
    path = tmp_path / "__0_0.distcp"
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "data/0"):
            archive.writestr(f"archive/{name}", new.read(f"new/{name}"))
        if order is not None:
            archive.writestr("archive/byteorder", order)
    chunk = Chunk(((0, 4),), path, 0, path.stat().st_size)
    if order == "big":
        with pytest.raises(UserError, match="big-endian"):
            payload_of("tensor", torch.float32, chunk)
        return
    at = payload_of("tensor", torch.float32, chunk).offset
    assert path.read_bytes()[at : at + 16] == torch.arange(4.0).numpy().tobytes()


def test_everything_is_found_at_once(good, tmp_path):
    directory = tmp_path / "step"
    shutil.copytree(good, directory)
    rename_tensor(directory)
    edit_model(ffn_hidden_size=64)(directory)
    with pytest.raises(UserError) as caught:
        open_megatron(directory, "model")
    text = str(caught.value)
    assert "layers.2.mlp.router.weighs is unexpected" in text
    assert "decoder.layers.3.mlp.router.weight is missing" in text
    assert "decoder.layers.0.mlp.experts.0.linear_fc2.weight has shape" in text
    assert "and 24 more like these" in text


def header(content: bytes) -> bytes:
    """A file that begins with it."""
    return len(content).to_bytes(8, "little") + content


TWO = (
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"b":{"dtype":"F32","shape":[2],"data_offsets":[%s]}}'
)
HEADER = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "truncated"),
        (b"\xff" * 100, "truncated, or not a safetensors file"),
        (pickle.dumps({"a": 1}) * 9, "not a safetensors file"),
        (len(HEADER).to_bytes(8, "little") + HEADER + b"\0" * 15, "truncated: 78 bytes of 79"),
        (b"\3\0\0\0\0\0\0\0{,}", "its header: is damaged, not JSON"),
        (b"\2\0\0\0\0\0\0\0[]", "its header: is damaged: it holds no JSON object"),
        (header(b"[" * 100_000), "nested too deep"),
        (header(b'{"a":' * 90 + b"1" + b"}" * 90), "nested more than"),
        (header(b'{"a":[]}'), "corrupt header"),
        (header(b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}') + b"0" * 8, "sizes"),
        (header(b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}') + b"0" * 8, "sizes"),
        (header(b'{"a":{"dtype":"F32","shape":["2"],"data_offsets":[0,8]}}') + b"0" * 8, "sizes"),
        (header(b'{"a":{"dtype":"F32","shape":[-1,-2],"data_offsets":[0,8]}}') + b"0" * 8, "sizes"),
        (header(b'{"a":{"dtype":["F32"],"shape":[2],"data_offsets":[0,8]}}') + b"0" * 8, "dtype"),
        (header(TWO % b"0,8") + b"0" * 16, "tensor b begins at byte 0, not 8"),
        (header(HEADER) + b"0" * 17, "79 bytes by its header, and has 80"),
        (header(TWO % b"12,20") + b"0" * 20, "tensor b begins at byte 12, not 8"),
        (
            (55).to_bytes(8, "little") + HEADER.replace(b"[4]", b"[5]") + b"\0" * 16,
            "16 bytes for shape (5,)",
        ),
        (
            (55).to_bytes(8, "little") + HEADER.replace(b"F32", b"I64") + b"\0" * 16,
            "dtype I64",
        ),
    ],
)
def test_a_damaged_safetensors_file_is_one_error(tmp_path, content, found):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        SafetensorsSource(tmp_path)
    assert found in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_a_special_file_is_one_error(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(UserError):
        SafetensorsSource(tmp_path)
    with pytest.raises(UserError, match="safetensors"):
        SafetensorsSource(path)


def test_an_index_that_lies(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "two.safetensors")
    index = {
        "weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "gone.safetensors"}
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as caught:
        SafetensorsSource(tmp_path)
    assert "a is in two files" in str(caught.value)
    assert "gone.safetensors: missing" in str(caught.value)
    index["weight_map"].pop("c")
    index["weight_map"]["b"] = "one.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="tensor b of the index is in no file"):
        SafetensorsSource(tmp_path)


def test_directories_without_weights(tmp_path):
    with pytest.raises(UserError, match="no .safetensors"):
        SafetensorsSource(tmp_path)
    with pytest.raises(UserError, match="no .safetensors"):
        SafetensorsSource(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a Megatron"):
        open_megatron(tmp_path, "model")
