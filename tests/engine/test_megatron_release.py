"""Which Megatron-Core a Python gets, and what is said of another."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from pathlib import Path

import pytest

from megatron_btx.engine import cpu, megatron_release
from megatron_btx.errors import UserError

TOP = Path(__file__).resolve().parents[2]
PIN = re.compile(r"""megatron-core==([\d.]+) ?; python_version ([<>=]+) ["']([\d.]+)["']""")


@pytest.mark.parametrize("file", ["setup.py", "constraints.txt"])
def test_the_pins_are_the_supported_releases(file: str) -> None:
    pins = PIN.findall((TOP / file).read_text())
    assert pins == [("0.16.1", "<", "3.12"), ("0.19.2", ">=", "3.12")]
    releases = tuple(tuple(map(int, pin[0].split(".")[:2])) for pin in pins)
    assert releases == megatron_release.SUPPORTED


def test_the_installed_one_is_this_pythons() -> None:
    expected = "0.16.1" if sys.version_info < (3, 12) else "0.19.2"
    assert megatron_release.version() == expected


def test_another_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_release, "RELEASE", (0, 18))
    monkeypatch.setattr(megatron_release, "version", lambda: "0.18.0")
    with pytest.raises(UserError, match=r"^megatron-core: 0\.18\.0 is installed; 0\.16\.1 "):
        cpu.install.__wrapped__()


def test_upstreams_own_plans_are_not_a_users_warnings(caplog: pytest.LogCaptureFixture) -> None:
    megatron_release.silence_warnings()
    megatron_release.silence_warnings()  # once is enough
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        megatron_release.silence_warnings()
        for words in (
            "full scope is deprecated. Use empty cuda_graph_modules",
            "Apex is not installed. Falling back to Torch Norm",
            "`torch.distributed.all_gather_into_tensor` is deprecated. Please use",
        ):
            warnings.warn(words, stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [str(one.message) for one in shown] == ["another"]
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    logger.warning("GPTModel IS DEPRECATED. GPTModel is only accepting critical bug fixes")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    assert sum(isinstance(each, megatron_release._Without) for each in logger.filters) == 1
