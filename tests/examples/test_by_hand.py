"""The examples that are run by hand: own_loop.py, a trainer that is not ours with our spec, router
and initializer; from_huggingface, by the commands of its README."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_btx.cli.init import write_examples
from megatron_btx.cli.main import main
from megatron_btx.data.builtin.corpora import write_builtin
from megatron_btx.data.tokenizer_sentencepiece import train_tokenizer
from megatron_btx.pipeline import graph
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.schema import Layout
from tests.data.oracle import texts
from tests.examples.ranks_side import run_stage
from tests.families.made import make
from tests.mix.ranks_side import save_dense
from tests.ranks import Ranks

SCRIPT = Path(__file__).parents[2] / "examples/own_loop.py"


def test_two_ranks_mix_four_checkpoints_and_learn(ranks: Ranks, tmp_path: Path) -> None:
    names = ["code", "math", "prose", "seed"]
    for name in names:
        ranks.run(save_dense, 1, tmp_path / name, name, Layout(), "fp32", False, False)
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run"),
            *("--standalone", "--nproc-per-node", "2", str(SCRIPT)),
            *(f"{name}={tmp_path / name}" for name in names),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 5
    assert losses[-1] < losses[0] - 0.01


def made_by_a_user(example: Path) -> None:
    """Three models of one shape with a tokenizer, and the text of three domains, in pieces: of each
    domain some twenty are held out."""
    files = {"general": "prose", "code": "code", "math": "math"}
    write_builtin(example / "text", dict.fromkeys(files.values(), 400_000), seed=7)
    (example / "data").mkdir()
    lines = []
    for name, source in files.items():
        whole = "".join(texts(example / "text" / source / "train.jsonl"))
        pieces = [whole[at : at + 400] for at in range(0, len(whole), 400)]
        rows = "".join(json.dumps({"text": piece}) + "\n" for piece in pieces)
        (example / "data" / f"{name}.jsonl").write_text(rows)
        lines += pieces
    tokenizer = train_tokenizer(lines, 400, where="it")
    for name in ("seed", "code", "math"):
        place = example / "models" / name
        make("llama", place, vocab_size=400, max_position_embeddings=256)
        tokenizer.save_huggingface(place)


def test_from_huggingface_and_back(
    ranks: Ranks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    transformers = pytest.importorskip("transformers")
    write_examples(["from_huggingface"], tmp_path)
    example = tmp_path / "examples" / "from_huggingface"
    made_by_a_user(example)
    monkeypatch.chdir(tmp_path)
    readme = (example / "README.md").read_text()
    lines = re.findall(r"^btx (.+)$", readme.partition("```\n")[2].partition("```")[0], re.M)
    convert, plan, run = (shlex.split(line) for line in lines)
    assert convert[-2] == ">"
    assert main(convert[:-2]) == 0
    Path(convert[-1]).write_text(capsys.readouterr().out)
    assert main(plan) == 0
    assert main([*run, "--dry-run"]) == 0
    recipe = load_recipe(run[-1])
    for stage in graph.build(recipe):
        if stage.kind != "report":  # what `btx run` does, but in the pool
            codes = ranks.run(run_stage, stage.world_size, str(tmp_path / run[-1]), stage.name)
            assert codes == [0] * stage.world_size, stage.name
    results = json.loads((tmp_path / "runs/from_huggingface/results.json").read_text())
    assert {"seed", "expert:code", "expert:math", "btx"} <= results["systems"].keys()
    mixture = "runs/from_huggingface/export/hf"
    assert f'from_pretrained("{mixture}")' in readme
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / mixture)
    assert model.config.model_type == "mixtral"
    assert model.config.num_local_experts == 3
