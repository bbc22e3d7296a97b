"""The CPU must stand in for CUDA before any module of Megatron is imported."""

import pytest

from megatron_btx.engine import cpu

cpu.install()

from tests.mix.commands import LABELS, save  # noqa: E402
from tests.weights.models import dense  # noqa: E402


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for seed, label in enumerate(LABELS):
        for form in ("hf", "megatron"):
            (root / form).mkdir(exist_ok=True)
            save(dense(label, seed), root / form / label, form)
    return root
