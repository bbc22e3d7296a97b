"""What a user is told: no control character of a file's, no end of text, the same on every rank."""

from __future__ import annotations

import errno
import fcntl
import pickle

import pytest

from megatron_btx import files
from megatron_btx.errors import UserError, UserErrors, shown

NASTY = {
    "\x1b[2J\x1b]0;owned\x07": r"\x1b[2J\x1b]0;owned\x07",
    "a\nb\r\tc\0": r"a\nb\r\tc\x00",
    "user\u202egnp.exe": r"user\u202egnp.exe",
    "\udce9": r"\udce9",
    "\x9b31m": r"\x9b31m",
    "größer 模型": "größer 模型",
}


@pytest.mark.parametrize("name", NASTY)
def test_a_name_from_a_file_is_shown_escaped(name):
    assert shown(name) == NASTY[name]
    said = str(UserError(name, name, name))
    assert all(character.isprintable() or character == "\n" for character in said)


def test_a_name_of_a_megabyte_is_shown_short():
    name = "x" * 10**6 + "END"
    assert len(shown(name)) < 300
    assert shown(name).endswith("END")
    assert "1,000,003 characters" in shown(name)
    assert len(str(UserError(name, name, name))) < 13_000


def test_errors_travel_between_ranks():
    one = UserError("a", "b\x1b", "c")
    for error in (one, UserErrors([one, UserError("d", "e")])):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    """No such file system can be mounted here; the system's answer is put in its place."""

    def refuse(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    with (tmp_path / "lock").open("w") as file:
        assert files.try_lock(file)
        monkeypatch.setattr(fcntl, "flock", refuse)
        with pytest.raises(UserError, match="has no file locks") as caught:
            files.try_lock(file)
    assert str(tmp_path) in str(caught.value)


def test_an_equals_sign_in_a_path_is_no_label(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1e-4" / "a").mkdir(parents=True)
    cases = {
        "lr=1e-4/a": ("", "lr=1e-4/a"),
        f"{tmp_path}/lr=1e-4/a": ("", f"{tmp_path}/lr=1e-4/a"),
        "code=lr=1e-4/a": ("code", "lr=1e-4/a"),
        f"code={tmp_path}/lr=1e-4/a": ("code", f"{tmp_path}/lr=1e-4/a"),
        "code=there": ("code", "there"),
        "there": ("", "there"),
    }
    for word, (name, path) in cases.items():
        found = files.named_path(word)
        assert (found[0], str(found[1])) == (name, path)
