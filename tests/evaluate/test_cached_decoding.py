"""Generation with keys and values kept: the same numbers and text as by whole passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_btx.evaluate.model_spec import Subject
from megatron_btx.recipe.schema import Layout, Routing
from tests.evaluate import made, ranks_side
from tests.evaluate.test_predictor import EP2, LAYOUTS, ONE, one, several
from tests.families import made as families
from tests.ranks import Ranks

pytest.importorskip("transformers")

PROMPTS = [
    " ".join(text.split()[:many]) for text, many in zip(made.TEXTS["x"], (2, 5, 1), strict=False)
]
GREEDY = {"max_new_tokens": 12}
DECODINGS = [GREEDY, {"max_new_tokens": 9, "temperature": 0.9, "top_p": 0.8}, {"max_new_tokens": 3}]


@pytest.mark.parametrize(("precision", "most"), [("fp32", 2e-5), ("bf16", 0.2)])
def test_every_family_continues_as_it_reads(
    ranks: Ranks, tmp_path: Path, precision: str, most: float
) -> None:
    """fp32: another order of sums. bf16: 8 bits of mantissa in every product and sum, as seen
    between any two orders; a wrong position or a missing bias is off by a standard deviation."""
    names = families.CONFIGS if precision == "fp32" else ("llama", "qwen3 moe")
    models = {name: tmp_path / name for name in names}
    for name, path in models.items():
        families.make(name, path)
    (found,) = ranks.run(ranks_side.continued, 1, models, precision)
    assert max(found.values()) < most, found


ROUTINGS = {
    "top2": made.TOP2,
    "switch": made.SWITCH,
    "soft": Routing(type="soft"),
    "greedy": Routing(type="sample_top1", greedy=True),
    "drawn": Routing(type="sample_top1"),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_every_routing(ranks: Ranks, tmp_path: Path, name: str) -> None:
    """A routing that draws hangs on the place of a token: there, whole passes."""
    made.write_megatron(
        made.moe(made.tokenizer(), ROUTINGS[name]), tmp_path / "m", made.tokenizer()
    )
    (found,) = ranks.run(ranks_side.grown, 1, one(tmp_path / "m"), ONE, PROMPTS, DECODINGS)
    remembered, kept, whole, _ = found
    assert remembered == (name != "drawn")
    assert kept == whole


def subjects(here: Path) -> dict[str, Subject]:
    prior = {"a": 0.5, "b": 0.3, "c": 0.2}
    return {
        "one": one(here / "a"),
        "posterior": several(here, "posterior", prior=prior),
        "top2": several(here, "top2"),
    }


@pytest.mark.parametrize("subject", ["one", "posterior", "top2"])
@pytest.mark.parametrize("layout", ["one", "dp2"])
def test_texts_are_the_same_and_each_token_is_read_once(
    here: Path, ranks: Ranks, subject: str, layout: str
) -> None:
    asked, world = subjects(here)[subject], LAYOUTS[layout]
    answers = ranks.run(ranks_side.grown, world.world_size, asked, world, PROMPTS, DECODINGS)
    members = len(asked.models)
    for remembered, kept, whole, _ in answers:
        assert remembered
        assert kept == whole
    read, after = (sum(answer[3][kind] for answer in answers) for kind in (0, 1))
    spoken = made.tokenizer()
    assert read == members * sum(1 + len(spoken.encode([prompt])[0]) for prompt in PROMPTS)
    assert after == members * sum(one["tokens"] - 1 for one in answers[0][1])


def test_a_text_that_outgrows_the_context_slides(here: Path, ranks: Ranks) -> None:
    """Its positions change with every token, so nothing can be kept from there on."""
    decodings = [{"max_new_tokens": 40}, {"max_new_tokens": 40}, GREEDY]
    (found,) = ranks.run(ranks_side.grown, 1, one(here / "a"), ONE, PROMPTS, decodings)
    assert found[1] == found[2]
    assert found[1][0]["tokens"] > 32 or found[1][0]["ended"]


@pytest.mark.parametrize("layout", [LAYOUTS["tp2"], LAYOUTS["pp2"], EP2], ids=["tp2", "pp2", "ep2"])
def test_divided_models_run_as_before(here: Path, ranks: Ranks, layout: Layout) -> None:
    model = one(here / ("moe" if layout is EP2 else "a"))
    decodings = [{"max_new_tokens": 3}] * 3
    answers = ranks.run(ranks_side.grown, 2, model, layout, PROMPTS, decodings)
    (alone,) = ranks.run(ranks_side.grown, 1, model, ONE, PROMPTS, decodings)
    assert not answers[0][0]
    assert answers[0][1] == answers[1][1] == alone[1]
