"""Which Megatron-Core a Python gets, what is said of another, and that a checkpoint with its
optimizer continues under the other release."""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.engine import cpu, megatron_release
from megatron_btx.errors import UserError
from megatron_btx.recipe.schema import MegatronOptions
from tests.engine.harness import DENSE, MOE, Case
from tests.engine.test_checkpoint import EP2, session
from tests.engine.test_layouts import PP2_VP2_EP2
from tests.other_python import other_python, run_module
from tests.ranks import Ranks

TOP = Path(__file__).resolve().parents[2]
PIN = re.compile(r"""megatron-core==([\d.]+) ?; python_version ([<>=]+) ["']([\d.]+)["']""")
Places = dict[str, tuple[int, int, int]]
CASES = {
    "dense": Case(DENSE),
    "moe": Case(MOE, EP2, "bf16", use_distributed_optimizer=True),
}


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


def laid_out() -> tuple[list[Places], list[Places]]:
    """Of a rank's chunks: by ``wrap_ddp``, and by Megatron's own computation."""
    from megatron.core.distributed import DistributedDataParallel

    from megatron_btx.engine import distributed
    from megatron_btx.engine.model import build_model, data_parallel_config, model_chunks, wrap_ddp

    options = MegatronOptions(ddp={"overlap_grad_reduce": True, "bucket_size": 500})
    distributed.initialize(PP2_VP2_EP2, 0)
    model = build_model(MOE, PP2_VP2_EP2, "fp32")
    config = data_parallel_config(True, options)
    own = [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=at > 0)
        for at, chunk in enumerate(model_chunks(build_model(MOE, PP2_VP2_EP2, "fp32")))
    ]
    ddp = wrap_ddp(model, use_distributed_optimizer=True, options=options)
    return [places(chunk) for chunk in model_chunks(ddp)], [places(chunk) for chunk in own]


def places(ddp: Any) -> Places:
    """Parameter -> first and last element in its buffer, and bucket."""
    names = {parameter: name for name, parameter in ddp.module.named_parameters()}
    return {
        names[parameter]: place
        for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)
        for parameter, place in buffer.param_index_map.items()
    }


def test_buffers_are_laid_out_as_upstream_does(ranks: Ranks) -> None:
    """Megatron of 0.19 warns where it is left to do it."""
    results = ranks.run(laid_out, PP2_VP2_EP2.world_size)
    for ours, upstreams in results:
        assert ours == upstreams
    of_first_chunk = results[0][0][0]
    assert len({bucket for *_, bucket in of_first_chunk.values()}) > 1, "one bucket holds all"


def go_on(folder: Path) -> dict[str, list[float]]:
    """The losses of steps 3 and 4 of every case, from its checkpoint of step 2."""
    pool = Ranks(2)
    losses = {
        name: pool.run(session, case.layout.world_size, case, folder / name, 2, 2, False)[0][1]
        for name, case in CASES.items()
    }
    pool.close()
    return losses


def test_training_goes_on_under_the_other_release(ranks: Ranks, tmp_path: Path) -> None:
    python = other_python()
    unstopped = {}
    for name, case in CASES.items():
        world = case.layout.world_size
        (tmp_path / name).mkdir()
        ranks.run(session, world, case, tmp_path / name, None, 2, True)
        unstopped[name] = ranks.run(session, world, case, tmp_path / "no", None, 4, False)[0][1][2:]
    losses = json.loads(run_module(python, "tests.engine.test_megatron_release", tmp_path))
    # Two builds of torch may add up in another order.
    assert losses["dense"] == pytest.approx(unstopped["dense"], abs=1e-6)
    assert losses["moe"] == pytest.approx(unstopped["moe"], abs=1e-3)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(go_on(Path(sys.argv[1]))) + "\n")
