"""The tables of stand-ins: what upstream changed is noticed, and with CUDA nothing is touched."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from megatron_btx.engine import cpu, mcore_patches

install = cpu.install.__wrapped__


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module with a function of the kind that the rows name."""
    module = types.ModuleType("upstream_of_test_cpu")
    source = """
def device():
    def inner():
        return ("cuda", 1)
    return "cuda", inner()

class Optimizer:
    @classmethod
    def kind(cls):
        return "torch.cuda.FloatTensor"
"""
    exec(source, module.__dict__)  # noqa: S102
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_LITERALS", ())
    monkeypatch.setattr(cpu, "_FUNCTIONS", ())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_literals_are_replaced_in_inner_functions_tuples_and_class_methods(
    upstream: Any, no_rows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (
        (upstream.__name__, "device", {"cuda": "cpu"}),
        (upstream.__name__, "Optimizer.kind", {"torch.cuda.FloatTensor": "torch.FloatTensor"}),
    )
    monkeypatch.setattr(cpu, "_LITERALS", rows)
    assert install() is True
    assert upstream.device() == ("cpu", ("cpu", 1))
    assert upstream.Optimizer.kind() == "torch.FloatTensor"
    with pytest.raises(LookupError, match="no longer contains"):
        install()  # the literals are gone now


@pytest.mark.parametrize("path", ["gone", "Optimizer.gone", "Gone.kind"])
def test_a_function_that_is_gone(
    path: str, upstream: Any, no_rows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_LITERALS", ((upstream.__name__, path, {"cuda": "cpu"}),))
    with pytest.raises(LookupError, match=path):
        install()


@pytest.mark.parametrize("importers", [(), ("megatron.core.transformer.moe.router",)])
def test_a_replaced_name_that_is_gone(
    importers: tuple[str, ...], upstream: Any, no_rows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "gone" if not importers else "device"
    row = (upstream.__name__, name, lambda: None, importers)
    monkeypatch.setattr(cpu, "_FUNCTIONS", (row,))
    with pytest.raises(LookupError, match="gone from this Megatron-Core"):
        install()


def test_a_repair_of_a_name_that_is_gone(upstream: Any) -> None:
    with pytest.raises(LookupError, match="gone from this Megatron-Core"):
        mcore_patches._bind(upstream.__name__, another_name=1)


def test_nothing_is_touched_where_cuda_is_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kept = object()
    for name in cpu._TORCH_CUDA:
        monkeypatch.setattr(torch.cuda, name, kept)
    assert install() is False
    assert all(getattr(torch.cuda, name) is kept for name in cpu._TORCH_CUDA)


def test_every_row_took_effect_here() -> None:
    if torch.cuda.is_available():
        pytest.skip("CUDA is present: nothing is installed")
    for module_name, path, literals in cpu._LITERALS:
        with pytest.raises(LookupError, match="no longer contains"):
            cpu._replace_literals(cpu._lookup(module_name, path), literals, path)
    for module_name, name, stand_in, importers in cpu._FUNCTIONS:
        for target in (module_name, *importers):
            assert getattr(sys.modules[target], name) is stand_in
    assert torch.cuda.current_device() == torch.device("cpu")


def test_no_stand_in_serves_two_names() -> None:
    functions = list(cpu._TORCH_CUDA.values())
    assert len({id(function) for function in functions}) == len(functions)
