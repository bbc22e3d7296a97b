"""``btx routing --text``: the experts of each token, against ``transformers``' router logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_btx.cli.main import main
from megatron_btx.evaluate.model_spec import Subject
from megatron_btx.recipe.schema import Layout, Routing
from megatron_btx.report import token_routing
from tests.evaluate import made, ranks_side
from tests.ranks import Ranks

TEXTS = ["loop return value", "river <b>forest</b> winter morning value bird " * 6]
"""The second one is longer than the model's context of 32 tokens."""

LAYOUTS = {
    1: [Layout()],
    2: [
        Layout(data_parallel_size=2, expert_model_parallel_size=2),
        Layout(pipeline_model_parallel_size=2),
        Layout(tensor_model_parallel_size=2),
    ],
}


def expected(path: Path) -> list[dict[str, Any]]:
    """By ``transformers``, in the form of ``token_routing.route``."""
    spoken, found = made.tokenizer(), []
    for text in TEXTS:
        whole = [spoken.eos_id, *spoken.encode([text])[0].tolist()]
        ids = whole[:32]
        with torch.no_grad():
            model = made.theirs(path)
            logits = model(input_ids=torch.tensor([ids]), output_router_logits=True).router_logits
        gates = []
        for layer in logits:
            best = layer.double().topk(2, dim=-1)
            rows = zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True)
            gates.append([{"abcd"[e]: g for e, g in zip(*row, strict=True)} for row in rows])
        found.append({"gates": gates, "cut": len(whole) - len(ids), "ids": ids})
    return found


@pytest.mark.parametrize("size", LAYOUTS)
def test_tokens_get_their_experts(here: Path, ranks: Ranks, size: int) -> None:
    subject = Subject(name="moe", models={"model": here / "moe"})
    for layout in LAYOUTS[size]:
        for found in ranks.run(ranks_side.route_tokens, size, subject, layout, TEXTS):
            assert found["experts"] == list("abcd")
            for one, theirs, text in zip(
                found["texts"], expected(here / "moe"), TEXTS, strict=True
            ):
                assert one["cut"] == theirs["cut"]
                assert len(one["tokens"]) == len(theirs["ids"])
                assert text.startswith("".join(one["tokens"][1:]).lstrip())
                for mine, other in zip(one["gates"], theirs["gates"], strict=True):
                    for a, b in zip(mine, other, strict=True):
                        assert list(a) == list(b)  # the larger gate first
                        assert a == pytest.approx(b, abs=1e-5)
    assert expected(here / "moe")[1]["cut"] > 0


def test_all_experts_and_one(here: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Of soft routing all; of Switch one each, also beyond an expert's capacity."""
    spoken = made.tokenizer()
    made.write_megatron(made.moe(spoken, Routing(type="soft")), tmp_path / "soft", spoken)
    for path, count in ((tmp_path / "soft", 4), (here / "switch", 1)):
        subject = Subject(name="moe", models={"model": path})
        (found,) = ranks.run(ranks_side.route_tokens, 1, subject, Layout(), TEXTS[:1])
        gates = [token for layer in found["texts"][0]["gates"] for token in layer]
        assert {len(token) for token in gates} == {count}
        if count == 4:
            assert [sum(token.values()) for token in gates] == pytest.approx([1] * len(gates))


def test_the_command(here: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Table, JSON and page; text in a page is escaped."""
    words = ["routing", str(here / "moe"), "--out", str(tmp_path)]
    assert main([*words, "--text", TEXTS[0], "--text", TEXTS[1]]) == 0
    said = capfd.readouterr()
    found = json.loads((tmp_path / "token_routing.json").read_text())
    assert [len(one["tokens"]) for one in found["texts"]] == [
        len(one["ids"]) for one in expected(here / "moe")
    ]
    assert said.out.startswith("\n".join(map(token_routing.table, found["texts"])))
    assert "hint: text 2: its last " in said.err
    page = (tmp_path / "token_routing.html").read_text()
    tokens = sum(len(one["tokens"]) * 2 for one in found["texts"])  # in each of two layers
    assert page.count('<span class="token ') == tokens + 4  # and the legend
    assert "<b>" not in page
    nothing = {"tokens": ["x"], "gates": [[{}]], "cut": 0}  # as a model that computes NaN
    assert "--gate:0%" in token_routing.page("nan", {"experts": ["a"], "texts": [nothing]})
    assert "'x'" in token_routing.table(nothing)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("{here}/moe --text x --data x={here}/x.jsonl", "--data: does not go with --text"),
        ("{here}/moe --text x --out {here}/y.svg", "y.svg: does not go with --text"),
        ("{here}/moe --text x --out {here}/x.jsonl", "is not a directory"),
        ("{here}/moe {here}/a --text x", "--text looks at one model"),
        ("btm:{here}/a,{here}/b --text x", "is a set of models"),
        ("{here}/a --text x", "is a dense model"),
    ],
)
def test_mistakes(
    here: Path, arguments: str, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["routing", *arguments.format(here=here).split()]) == 2
    assert words in capfd.readouterr().err
