"""What is not as it was written is refused by the file's name, and so is what changes meanwhile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_btx.cli.main import main
from megatron_btx.errors import UserError
from megatron_btx.mix import offline
from megatron_btx.mix.one_model import copy
from megatron_btx.weights.file_hashes import HASHES, files_of, hash_file, hashes_of
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.write_safetensors import write_safetensors
from megatron_btx.weights.write_torch_dist import write_torch_dist
from tests.mix.commands import btx, named, save
from tests.weights.models import dense


def flip(path, place: int) -> None:
    """Change one bit, and nothing else that a file system tells."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(bytes(data))


def source(sources, tmp_path, form: str):
    """A model of one's own; the others of the mix."""
    own = tmp_path / "own"
    shutil.copytree(sources / form / "code", own)
    return own, [f"code={own}", *named(sources, form)[1:]]


@pytest.mark.parametrize("form", ["hf", "megatron"])
def test_every_file_of_a_result_is_in_its_hashes(sources, tmp_path, form):
    out = tmp_path / "out"
    btx("mix", "--sources", *named(sources), "--out", out, "--format", form, "--shard", "100kB")
    hashes = hashes_of(out)
    assert list(hashes) == files_of(out)
    assert len(hashes) > 5
    for name, value in hashes.items():
        assert hash_file(out / name) == value, name


CASES = [
    ("hf", "model.safetensors", -3),
    ("megatron", "__0_1.distcp", 20_000),
    ("megatron", "common.pt", -30),
]


@pytest.mark.parametrize(("form", "name", "place"), CASES)
def test_a_flipped_bit_of_a_source_is_refused(sources, tmp_path, form, name, place):
    own, words = source(sources, tmp_path, form)
    flip(own / name, place)
    with pytest.raises(UserError, match="is not what was written") as caught:
        btx("mix", "--sources", *words, "--out", tmp_path / "out")
    assert f"{own / name}: " in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


def test_what_people_edit_is_told(sources, tmp_path, caplog):
    own, words = source(sources, tmp_path, "hf")
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config))
    (own / "generation_config.json").unlink()
    btx("mix", "--sources", *words, "--out", tmp_path / "out")
    assert f"{own / 'config.json'}: is not what was written" in caplog.text
    assert f"{own / 'generation_config.json'}: is missing" in caplog.text


def test_without_hashes_the_stored_crc_finds_it(sources, tmp_path):
    """Checkpoints that others wrote, or older versions of us."""
    own, words = source(sources, tmp_path, "megatron")
    (own / HASHES).unlink()
    btx("mix", "--sources", *words, "--out", tmp_path / "whole")
    flip(own / "__0_1.distcp", 20_000)
    with pytest.raises(UserError, match=r"is not what was written \(CRC-32\)") as caught:
        btx("mix", "--sources", *words, "--out", tmp_path / "out")
    assert f"{own / '__0_1.distcp'}: tensor " in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_archives_saved_without_a_crc_are_read(sources, tmp_path):
    """``torch.serialization.set_crc32_options(False)`` leaves zeros; torch itself never looks."""
    own, words = source(sources, tmp_path, "megatron")
    (own / HASHES).unlink()
    for path in own.glob("*.distcp"):
        data = bytearray(path.read_bytes())
        for mark, at in ((b"PK\3\4", 14), (b"PK\1\2", 16)):
            place = data.find(mark)
            while place >= 0:
                data[place + at : place + at + 4] = bytes(4)
                place = data.find(mark, place + 4)
        path.write_bytes(bytes(data))
    btx("mix", "--sources", *words, "--out", tmp_path / "out")
    btx("mix", "--sources", *named(sources, "megatron"), "--out", tmp_path / "want")
    found, want = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("out", "want"))
    assert found == want


def test_a_missing_file_and_damaged_hashes_are_refused(sources, tmp_path):
    own, words = source(sources, tmp_path, "megatron")
    shutil.copy(own / "common.pt", tmp_path / "kept")
    (own / "common.pt").unlink()
    with pytest.raises(UserError, match=r"common.pt: is missing"):
        btx("mix", "--sources", *words, "--out", tmp_path / "out")
    shutil.copy(tmp_path / "kept", own / "common.pt")
    for content in ("{", "[]", '{"algorithm": "md5", "files": {}}', '{"files": []}'):
        (own / HASHES).write_text(content)
        with pytest.raises(UserError) as caught:
            btx("mix", "--sources", *words, "--out", tmp_path / "out")
        assert f"{own / HASHES}: " in str(caught.value)
    (own / HASHES).write_text('{"algorithm": "xxh3_128", "files": {"../other": "00"}}')
    with pytest.raises(UserError, match="damaged"):
        btx("mix", "--sources", *words, "--out", tmp_path / "out")
    (own / HASHES).unlink()
    btx("mix", "--sources", *words, "--out", tmp_path / "out")


@pytest.mark.parametrize("write", [write_safetensors, write_torch_dist])
def test_a_source_that_changes_while_it_is_read_is_noticed(sources, tmp_path, write):
    own, _ = source(sources, tmp_path, "megatron")
    plan = copy(open_megatron(own, "code"), dtype=torch.float32)
    payload = own / "__0_0.distcp"
    payload.write_bytes(payload.read_bytes())
    with pytest.raises(UserError, match="was changed while it was read") as caught:
        write(plan, tmp_path / "out")
    assert str(payload) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_source_that_goes_away_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an old step of a run that is still training does."""
    for seed, label in enumerate("ab"):
        save(dense(label, seed), tmp_path / label, "hf")
    prepared = offline._prepared

    def gone(request):
        found = prepared(request)
        shutil.rmtree(tmp_path / "a")
        return found

    monkeypatch.setattr(offline, "_prepared", gone)
    words = ["--sources", f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}"]
    assert main(["mix", *words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "a" / "model.safetensors") in said
    assert "no such file or directory" in said
    assert "leave the files alone" in said
    assert not (tmp_path / "out").exists()
