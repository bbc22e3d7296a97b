"""Every system of examples/systems and examples/ablations, run once on a base of seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_btx.pipeline import graph, state
from megatron_btx.recipe.load import dump, load_recipe
from megatron_btx.report.comparison import FinishedRun
from tests.examples.ranks_side import run_stage
from tests.ranks import Ranks
from tests.small import write_small

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FILES = {
    path.stem: path
    for folder in ("systems", "ablations")
    for path in sorted((EXAMPLES / folder).glob("*.yaml"))
}
NAMES = sorted(FILES)

BASE = """
base: {small}
name: base
run_dir: {runs}/{{name}}
domains:
  more: {{train: data/more.jsonl}}
experts:
  math: {{tokens: 12_288, data: {{math: 0.9, web: 0.1}}}}
  web: {{tokens: 8192, data: {{web: 1}}}}
  more: {{tokens: 6144, data: {{more: 1}}}}
seed: {{tokens: 16_384, data: {{web: 1, math: 0.2}}}}
dense: null
mix: {{router_init_tokens: 4096}}
peak_tflops: 0.05
finetune: {{tokens: 8192, layout: {{data_parallel_size: 2, expert_model_parallel_size: 2}}}}
training: {{save_interval: 100, eval_interval: 0, lr_warmup_iters: 4}}
"""


@pytest.fixture(scope="session")
def systems(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, FinishedRun]:
    """By name; what is shared is linked, as ``btx compare`` does."""
    directory = tmp_path_factory.mktemp("systems")
    small = write_small(directory)
    lines = (directory / "data" / "math.jsonl").read_text().splitlines()
    more = [line.replace("+", "-") for line in lines[::2]]
    (directory / "data" / "more.jsonl").write_text("\n".join(more) + "\n")
    base = directory / "base.yaml"
    base.write_text(BASE.format(small=small, runs=directory / "runs"))
    runs: dict[str, FinishedRun] = {}
    order = ("seed", "experts", "dense")
    for name in sorted(NAMES, key=lambda name: (name not in order, NAMES.index(name))):
        recipe = load_recipe(FILES[name], base)
        run_dir = Path(recipe.run_dir)
        run_dir.mkdir(parents=True)
        resolved = run_dir / "recipe.yaml"
        resolved.write_text(dump(recipe))
        stages = tuple(s for s in graph.build(recipe) if s.kind != "report")
        state.link_shared(run_dir, stages, [str(directory / "runs" / "*")])
        for stage in state.left(run_dir, stages):
            codes = ranks.run(run_stage, stage.world_size, str(resolved), stage.name)
            assert codes == [0] * stage.world_size, stage.name
        runs[name] = FinishedRun(recipe=recipe, run_dir=run_dir)
    return runs
