"""``btx evaluate``, ``generate`` and ``routing`` as a user meets them."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from megatron_btx.cli.main import main
from megatron_btx.cli.routing import wandb_of
from megatron_btx.errors import UserError
from megatron_btx.evaluate.model_spec import Subject, parse
from megatron_btx.evaluate.models import load, opened
from megatron_btx.pipeline import eval_ranks
from megatron_btx.recipe.schema import Layout, Routing, WandB
from megatron_btx.report import routing, table
from megatron_btx.weights.find_checkpoint import find_checkpoint
from tests.bad import fill
from tests.evaluate import made, ranks_side
from tests.ranks import Ranks
from tests.report.made import make_run
from tests.small import btx, command, environ, tree_hash


def test_evaluate(here: Path, tmp_path: Path) -> None:
    done = btx(
        "evaluate",
        here / "a",
        f"chance={here / 'uniform'}",
        f"set=btm:{here / 'a'},{here / 'b'}",
        "--data",
        f"x={here / 'x.jsonl'}",
        f"y={here / 'y.jsonl'}",
        "--out",
        "found.json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["nats/token", "x", "y", "mean"]
    chance = f"{math.log(made.tokenizer().vocab_size):.4f}"
    assert lines[2].split() == ["chance", chance, chance, chance]
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["data"]) == ["a", "chance", "set"]
    assert found["data"]["set"]["models_per_token"] == 2
    assert f"{found['data']['a']['data']['x']['nats_per_token']:.4f}" in lines[1]
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


@pytest.mark.parametrize("signals", [["SIGINT"] * 2, ["SIGTERM"], ["SIGHUP"]], ids="-".join)
def test_stopped_while_its_rank_is_at_work(here: Path, tmp_path: Path, signals: list[str]) -> None:
    """Nothing is said, and nothing is left: no process, no file."""
    if any(signal.getsignal(getattr(signal, name)) is signal.SIG_IGN for name in signals):
        pytest.skip("ignored here, as nohup has it")
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    process = subprocess.Popen(
        command("evaluate", here / "a", "--data", f"x={here / 'x.jsonl'}", "--out", "found.json"),
        cwd=tmp_path,
        env=environ({"TMPDIR": str(scratch), "BTX_TEST_RUN": str(tmp_path)}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 600
    while not (ranks := psutil.Process(process.pid).children()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for name in signals:
        process.send_signal(getattr(signal, name))
    said, _ = process.communicate(timeout=600)
    assert (process.returncode in (130, -signal.SIGINT), said) == (True, "")
    assert not psutil.wait_procs(ranks, timeout=600)[1]
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]
    assert list(scratch.iterdir()) == []


def test_what_was_measured_is_said_also_where_it_cannot_be_written(
    tmp_path: Path,
    disk: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "x.jsonl"
    text.touch()
    (tmp_path / "config.json").touch()
    place = disk("size=64k")
    fill(place)
    found = {"a": {"data": {"x": {"nats_per_token": 1.25, "bits_per_byte": 2.5}}}}
    monkeypatch.setattr(eval_ranks, "answer", lambda _request: found)  # after hours
    words = ["evaluate", f"a={tmp_path}", "--data", f"x={text}", "--out", str(place / "out.json")]
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {place / 'out.json'}: no space left on device\n  fix: ")
    assert "1.2500" in said.out
    assert os.listdir(place) == ["filler"]


def test_generate_on_two_ranks(here: Path, tmp_path: Path) -> None:
    prompts = [word for prompt, _ in made.CHAINS for word in ("--prompt", prompt)]
    arguments = ["generate", here / "bigram", *prompts, "--layout", "data_parallel_size=2"]
    done = btx(*arguments, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["prompt"], row["text"]) for row in rows] == made.CHAINS


@pytest.mark.parametrize("command", ["evaluate", "generate", "routing"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"btx {command} " in capsys.readouterr().out.partition("example")[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("evaluate {here}/a", "neither --data nor --tasks"),
        ("evaluate {here}/none --data x={here}/x.jsonl", "none: does not exist"),
        ("evaluate {here} --data x={here}/x.jsonl", "holds no checkpoint"),
        ("evaluate {here}/a --data {here}/x.jsonl", "has no name"),
        ("evaluate {here}/a --data x=no.jsonl y=no2.jsonl", "no2.jsonl does not exist"),
        ("evaluate {here}/a --tasks gsm8k=no.jsonl", "no.jsonl does not exist"),
        ("evaluate {here}/a --data x={here}/x.jsonl --layout tp=2", "tp is not a key"),
        ("evaluate btm:{here}/a --data x={here}/x.jsonl", "fewer than two"),
        ("evaluate x={here}/a x={here}/a --data x={here}/x.jsonl", "named twice"),
        ("evaluate {here}/a --data x={here}/x.jsonl --out no/x.json", "no: no such directory"),
        ("evaluate {here}/a --data x={here}/x.jsonl --out {here}/b", "b: exists and is not a file"),
        ("evaluate {here}/a --data x={here}/x.jsonl --out {here}/b/../x.jsonl", "is read here"),
        ("evaluate {here}/a --data x={here}/x.jsonl --out {here}/a/config.json", "is read here"),
        (
            "evaluate btm:x={here}/a,x={here}/b,{here}/c --data x={here}/x.jsonl",
            "x: is the name of both",
        ),
        ("evaluate {here}/a --data x={here}/x.jsonl --seq-length 0", "--seq-length: is 0"),
        ("evaluate {here}/a --data x={here}/x.jsonl --tokens -1", "--tokens: is -1"),
        (
            "evaluate {here}/moe --data x={here}/x.jsonl --layout expert_model_parallel_size=2",
            "EP x ETP x PP (2 x 1 x 1) does not divide the 1 rank(s)",
        ),
        (
            "evaluate {here}/a --data x={here}/x.jsonl --layout data_parallel_size=99999",
            "asks for 99999 ranks, and this machine has",
        ),
        ("generate {here}/a --prompt x --micro-batch-size 0", "--micro-batch-size: is 0"),
        ("generate {here}/a --prompt x --random-seed -1", "out of range"),
        ("generate {here}/a", "--prompt: is missing"),
        ("generate {here}/a --prompt x --top-p 0", "out of range"),
        ("generate {here}/a --prompt x --max-new-tokens 0", "out of range"),
        ("generate {here}/a --prompt x --stop=", "--stop: "),
        ("generate {here}/a --prompt x\udcff", "--prompt: is not UTF-8"),
        ("routing {here}/a", "give text to measure it on"),
        ("routing nope", "nope: does not exist"),
        ("routing nope --out {here}/r.txt", "is a file of a format that is not written"),
        ("routing nope --out {here}/r.json --text x", "is a file of a format that is not written"),
        ("convert megatron-to-hf {here}/a out", "is a Hugging Face directory already"),
        ("routing {here}/moe --data x={here}/x.jsonl --out {here}/x.jsonl", "is not a directory"),
        (
            "routing {here}/moe --data x={here}/x.jsonl --out {here}/x.jsonl/deep",
            "x.jsonl: is not a directory",
        ),
        ("centroids {here}/moe --data x={here}/x.jsonl --out no/c", "no: no such directory"),
        (
            "centroids {here}/moe --data x={here}/x.jsonl --kind ridge --out c --statistics ./c",
            "--statistics c: is the file of --out too",
        ),
    ],
)
def test_mistakes(
    here: Path, arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One clear error, before any work."""
    before = tree_hash(here)
    assert main(arguments.format(here=here).split()) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""
    assert tree_hash(here) == before


def test_a_result_replaces_nothing_that_is_read(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in a directory of text, one that describes a set or names its text, a task's file and
    what that names. A former result is written anew."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for name in ("text/x.jsonl", "y.jsonl", "items.jsonl", "more.yaml"):
        shutil.copy(here / "x.jsonl", tmp_path / name)
    (tmp_path / "set.yaml").write_text(
        f"method: top1\nmodels: {{a: {here / 'a'}, b: {here / 'b'}}}\n"
        "text: {a: y.jsonl, b: text}\n"
    )
    (tmp_path / "task.yaml").write_text(
        "include: more.yaml\ndataset_kwargs: {data_files: {test: items.jsonl}}\n"
    )
    shutil.copytree(here / "a", tmp_path / "model")
    before = tree_hash(tmp_path)
    asked = ["evaluate", "set.yaml", "model", "--data", "x=text", "--tasks", "task.yaml", "--out"]
    for name in ("text/x.jsonl", "y.jsonl", "items.jsonl", "more.yaml", "set.yaml", "task.yaml"):
        assert main([*asked, name]) == 2
        assert f"{name}: is read here" in capsys.readouterr().err
    assert tree_hash(tmp_path) == before
    monkeypatch.setattr(eval_ranks, "answer", lambda _request: {})
    words = ["evaluate", "model", "--data", "x=text", "--json", "--out", "model/found.json"]
    for _ in range(2):
        assert main(words) == 0


def test_a_name_of_a_model_is_whatever_stands_before_the_sign(tmp_path: Path) -> None:
    """As ``btx mix`` has it: only a ``/`` makes it a path, and what is there as it stands."""
    for name in ("a\nb", "c=d", "e,f"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
        for label in ("my model", "x", "a:b"):
            (subject,) = parse([f"{label}={tmp_path / name}"])
            assert (subject.name, subject.first) == (label, tmp_path / name)
        (subject,) = parse([str(tmp_path / name)])
        assert (subject.name, subject.first) == (name, tmp_path / name)
    (subject,) = parse([f"my set=btm:one model={tmp_path}/a\nb,{tmp_path}/c=d"])
    assert (subject.name, list(subject.models)) == ("my set", ["one model", "c=d"])


def test_models_of_one_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    for name in ("x/hf", "y/hf", "z/final"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    (subject,) = parse([f"btm:{tmp_path}/x/hf,{tmp_path}/y/hf,{tmp_path}/z/final"])
    root = tmp_path.name
    assert list(subject.models) == [f"{root}/x/hf", f"{root}/y/hf", "final"]
    assert subject.models[f"{root}/y/hf"] == tmp_path / "y" / "hf"


@pytest.mark.parametrize(
    ("model", "layout", "words"),
    [
        ("a", {"pipeline_model_parallel_size": 5}, "5 does not divide model.num_layers (2)"),
        ("a", {"tensor_model_parallel_size": 8}, "8 does not divide model.num_attention_heads (4)"),
        ("moe", {"data_parallel_size": 3, "expert_model_parallel_size": 3}, "the 4 experts"),
    ],
)
def test_a_layout_that_does_not_fit_the_model(
    here: Path, model: str, layout: dict[str, int], words: str
) -> None:
    (checkpoint,) = opened(Subject(name=model, models={model: here / model})).values()
    with pytest.raises(UserError) as raised:
        load(checkpoint, Layout(**layout), None)
    assert words in str(raised.value)
    assert f"--layout {list(layout)[-1]}: " in str(raised.value)


def test_a_mistake_that_a_rank_finds(here: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"txt": "x"}\n')
    done = btx("evaluate", here / "a", "--data", "bad=bad.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "bad.jsonl:1: has no text under 'text'" in done.stderr
    assert "fix: set --text-key to the key" in done.stderr
    assert "Traceback" not in done.stderr
    room = ("--prompt", "x", "--max-new-tokens", "100000")
    done = btx("generate", here / "a", *room, cwd=tmp_path)
    assert done.returncode == 2
    assert "--max-new-tokens: is 100000, and the model's context has" in done.stderr


@pytest.mark.parametrize(("model", "payload"), [("switch", "*.distcp"), ("a", "*.safetensors")])
def test_a_truncated_checkpoint(here: Path, tmp_path: Path, model: str, payload: str) -> None:
    """Cut in the middle of a file of weights, of either format: the file is named."""
    given = Path(shutil.copytree(here / model, tmp_path / "given"))
    file = max(given.glob(payload), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    before = tree_hash(tmp_path)
    done = btx(
        "evaluate", given, "--data", f"x={here / 'x.jsonl'}", "--out", "x.json", cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert f"{file}: truncated: " in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert tree_hash(tmp_path) == before


def test_a_set_in_a_file(here: Path, tmp_path: Path) -> None:
    path = tmp_path / "pair.yaml"
    path.write_text(
        f"method: top1\nmodels: {{a: {here / 'a'}, b: {here / 'b'}}}\n"
        f"text: {{a: {here / 'x.jsonl'}, b: [{here / 'y.jsonl'}]}}\n"
    )
    (subject,) = parse([str(path)])
    assert (subject.name, subject.method, list(subject.models)) == ("pair", "top1", ["a", "b"])
    assert subject.text["b"] == (str(here / "y.jsonl"),)
    path.write_text(f"methud: top1\nmethod: top3\nmodels: {{a: {here / 'a'}}}\n")
    with pytest.raises(UserError) as raised:
        parse([str(path)])
    for words in ("1: methud: is not a key of a set of models", "is 'top3'", "are fewer than two"):
        assert words in str(raised.value)


def test_a_stage_stands_for_its_last_checkpoint(tmp_path: Path) -> None:
    for step in (5, 20):
        last = tmp_path / "finetune" / "checkpoints" / f"step_{step:08d}"
        last.mkdir(parents=True)
        (last / ".metadata").touch()
    assert find_checkpoint(tmp_path / "finetune") == last
    assert parse([str(last)])[0].name == "finetune"


def test_routing_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs side by side: what their logs say, layer by layer, and a dead expert named."""
    _, run_dir = make_run(tmp_path)
    (run_dir / "recipe.yaml").write_text((tmp_path / "recipe.yaml").read_text())
    log = run_dir / "finetune" / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    evals = [record for record in records if record["kind"] == "eval"]
    dead = [[0.5, 0.3, 0.196, 0.004], [0.4, 0.3, 0.2, 0.1]]
    evals[0] |= {"step": 0, "load": {"code": dead}, "gate": {"code": dead}}
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    views = routing.of_run(run_dir)
    assert [view.moment for view in views] == ["before finetuning", "after finetuning"]
    assert views[0].load == {"code": dead}
    assert views[0].dead() == {"seed": [1]}
    shown = routing.table(views[0])
    rows = [line.split() for line in shown.splitlines()]
    assert ["code", "1", *["50.0", "30.0", "19.6", "0.4"] * 2] in rows
    assert "Dead in layer 1 (below 1% of the choices): seed." in shown
    assert main(["routing", str(run_dir), "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out" / "routing.json").read_text())
    assert found[0]["dead"] == {"seed": [1]}
    assert found[1]["balance_loss_coeff"] == 0.01
    for words in (["--tokens", "5"], ["--data", f"x={log}"], ["--layout", "data_parallel_size=2"]):
        assert main(["routing", str(run_dir), *words]) == 2
        said = capsys.readouterr().err
        assert f"{words[0]}: is about a measurement" in said
        assert f"give a checkpoint: {run_dir / 'finetune'}" in said
    (run_dir / "recipe.yaml").write_text(
        (tmp_path / "recipe.yaml").read_text() + "wandb: {project: of-this-run}\n"
    )
    assert wandb_of([run_dir], []).project == "of-this-run"
    assert wandb_of([], []) == WandB()
    page = (tmp_path / "out" / "routing.html").read_text()
    assert page.count("<svg") == 2 * sum(len(view.load) for view in views)


def test_routing_of_a_checkpoint(here: Path, ranks: Ranks) -> None:
    subject = Subject(name="moe", models={"model": here / "moe"})
    layout = Layout(data_parallel_size=2, expert_model_parallel_size=2)
    view, _ = ranks.run(ranks_side.route, 2, subject, layout, {"x": [str(here / "x.jsonl")]})
    assert view["experts"] == list("abcd")
    for matrix in (view["load"]["x"], view["gate"]["x"]):
        assert [sum(row) for row in matrix] == pytest.approx([1, 1], abs=1e-5)
    loads, gates = shares(here / "moe")
    for mine, theirs in ((view["load"], loads), (view["gate"], gates)):
        assert [cell for row in mine["x"] for cell in row] == pytest.approx(theirs, abs=1e-4)


def test_how_experts_are_taken_is_named(here: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Of Sample Top-1 by losses and routing, in JSON and in words; of other MoEs nothing."""
    subjects = [Subject(name="moe", models={"model": here / "moe"})]
    for name, greedy in (("drawn", False), ("argmax", True)):
        routing_ = Routing(type="sample_top1", greedy=greedy)
        spoken = made.tokenizer()
        made.write_megatron(made.moe(spoken, routing_), tmp_path / name, spoken)
        subjects.append(Subject(name=name, models={"model": tmp_path / name}))
    files = {"x": [str(here / "x.jsonl")]}
    (found,) = ranks.run(ranks_side.data, 1, subjects, Layout(), files)
    assert [one.get("expert_choice") for one in found] == [None, "drawn", "argmax"]
    said = table.data_table({one.name: row for one, row in zip(subjects, found, strict=True)})
    assert said.splitlines()[-2:] == [
        "drawn: one expert a token, drawn with seeded noise",
        "argmax: one expert a token, the argmax of its logits",
    ]
    (view,) = ranks.run(ranks_side.route, 1, subjects[1], Layout(), files)
    seen = routing.RoutingView(name="drawn", moment="as it is", balance_loss_coeff=None, **view)
    assert seen.as_json()["expert_choice"] == "drawn"
    assert seen.title == "drawn, as it is, one expert a token, drawn with seeded noise"


def shares(path: Path) -> tuple[list[float], list[float]]:
    """Of every layer's experts, the share of the choices and of the gates, by ``transformers``."""
    spoken = made.tokenizer()
    stream = [spoken.eos_id]
    for ids in spoken.encode(made.TEXTS["x"]):
        stream += [*ids.tolist(), spoken.eos_id]
    many = (len(stream) - 1) // 32 // 2 * 2  # whole batches of two ranks
    tokens = torch.tensor(stream[: many * 32]).view(many, 32)
    with torch.no_grad():
        found = made.theirs(path)(input_ids=tokens, output_router_logits=True)
    loads, gates = [], []
    for logits in found.router_logits:
        best = logits.double().topk(2, dim=-1)
        weights = torch.zeros(len(logits), 4).double()
        weights.scatter_(1, best.indices, best.values.softmax(-1))
        loads += ((weights > 0).double().mean(0) / 2).tolist()
        gates += weights.mean(0).tolist()
    return loads, gates


def test_a_prompt_on_the_standard_input_is_text(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert main(["generate", str(here / "a"), "--prompt", "-"]) == 2
    assert "--prompt: is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(("encoding", "name"), [("ascii", "caf\u00e9"), ("utf-8", "\udcff")])
def test_what_the_terminal_cannot_show_is_said_some_way(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoding: str, name: str
) -> None:
    """Letters on an output of ASCII, and a directory whose name is no text."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    words = ["--method", "copy", "--sources", f"m={here / 'a'}", "--out", str(tmp_path / name)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert main(["mix", *words]) == 0
    assert b"\\" in out.buffer.getvalue()
    assert (tmp_path / name / "config.json").is_file()
