"""Scores, generation and losses under several layouts, against ``transformers`` in float64."""

from __future__ import annotations

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_btx.errors import UserError
from megatron_btx.evaluate import btm, model_spec
from megatron_btx.evaluate.model_spec import Subject
from megatron_btx.evaluate.packed_text import PackedText
from megatron_btx.evaluate.tfidf import TfIdf
from megatron_btx.families.open_checkpoint import open_checkpoint
from megatron_btx.mix import offline
from megatron_btx.mix.edit_experts import drop
from megatron_btx.mix.request import MixRequest
from megatron_btx.recipe.schema import Layout
from megatron_btx.weights.source import View
from tests.evaluate import made, ranks_side
from tests.families import made as families
from tests.families import tokenizers_made
from tests.ranks import Ranks

pytest.importorskip("transformers")

ONE = Layout()
LAYOUTS = {
    "one": ONE,
    "dp2": Layout(data_parallel_size=2),
    "tp2": Layout(tensor_model_parallel_size=2),
    "pp2": Layout(pipeline_model_parallel_size=2),
}
EP2 = Layout(data_parallel_size=2, expert_model_parallel_size=2)


def rows() -> list[tuple[list[int], int]]:
    """Texts of several lengths, and from where they are scored; the last is one token."""
    ids = [made.tokenizer().encode([text])[0].tolist() for text in made.TEXTS["x"][:4]]
    return [(ids[0][:9], 4), (ids[1][:20], 1), (ids[2][:14], 13), (ids[3][:5], 2), (ids[0][:1], 1)]


def one(path: Path) -> Subject:
    return Subject(name="one", models={"model": path})


def several(here: Path, method: str, **more) -> Subject:
    text = {"a": "x", "b": "y", "c": "x"}
    files = {name: (str(here / f"{file}.jsonl"),) for name, file in text.items()}
    models = {name: here / name for name in "abc"}
    return Subject(name="set", models=models, method=method, text=files, **more)


def check(found, wanted: list[Tensor]) -> None:
    """Scores and what follows, against log-probabilities [len, V] of each row."""
    scores, following = found
    for (ids, first), score, after, mine in zip(rows(), scores, following, wanted, strict=True):
        total, greedy = 0.0, True
        for place in range(first, len(ids)):
            total += mine[place - 1, ids[place]].item()
            greedy &= int(mine[place - 1].argmax()) == ids[place]
        assert score[0] == pytest.approx(total, abs=2e-4)
        assert score[1] == greedy
        assert torch.allclose(after.double(), mine[-1], atol=2e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_model_predicts_as_in_transformers(here: Path, ranks: Ranks, name: str) -> None:
    layout = LAYOUTS[name]
    answers = ranks.run(ranks_side.predict, layout.world_size, one(here / "a"), layout, rows())
    for found in answers:  # every rank has them
        check(found, [made.log_probs(here / "a", ids) for ids, _ in rows()])


@pytest.mark.parametrize("name", LAYOUTS)
def test_nan_is_no_answer(here: Path, ranks: Ranks, tmp_path: Path, name: str) -> None:
    """Every rank says so: none waits for one that has stopped."""
    layout = LAYOUTS[name]
    made.with_nan(shutil.copytree(here / "a", tmp_path / "a"))
    files = {"x": [str(here / "x.jsonl")]}
    answers = ranks.run(
        ranks_side.refused, layout.world_size, one(tmp_path / "a"), layout, rows()[:3], files
    )
    said = "one: computes NaN or infinity"
    assert answers == [[said] * 3 + [f"{said} on the text of x"]] * layout.world_size


def test_a_mixture_under_expert_parallelism(here: Path, ranks: Ranks) -> None:
    answers = ranks.run(ranks_side.predict, 2, one(here / "moe"), EP2, rows())
    check(answers[1], [made.log_probs(here / "moe", ids) for ids, _ in rows()])


@pytest.mark.parametrize("layout", [ONE, EP2], ids=["one", "ep2"])
def test_some_experts_only(here: Path, ranks: Ranks, tmp_path: Path, layout: Layout) -> None:
    """Scores and what follows are the dropped model's, to the bit: two of four experts, in
    whichever order they are named."""
    moe = open_checkpoint(here / "moe", "moe")
    plan = drop(moe, "b", dtype=torch.float32)
    rest = replace(moe, architecture=plan.architecture, source=View(moe.source, plan.targets))
    made.write(drop(rest, "c", dtype=torch.float32), tmp_path / "dropped", made.tokenizer())
    (subject,) = model_spec.with_experts([one(here / "moe")], "d,a")
    world = layout.world_size
    found = ranks.run(ranks_side.predict, world, subject, layout, rows())[0]
    wanted = ranks.run(ranks_side.predict, world, one(tmp_path / "dropped"), layout, rows())[0]
    assert found[0] == wanted[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], wanted[1], strict=True))


@pytest.mark.parametrize(
    ("subject", "given", "words"),
    [
        ("moe", "a,", "give each expert's name once"),
        ("moe", "a,a", "give each expert's name once"),
        ("set", "a,b", "is a set of models"),
    ],
)
def test_experts_that_cannot_be_chosen(here: Path, subject: str, given: str, words: str) -> None:
    chosen = several(here, "posterior") if subject == "set" else one(here / subject)
    with pytest.raises(UserError, match=words):
        model_spec.with_experts([chosen], given)


def test_no_text_loses_tokens_to_another(here: Path, ranks: Ranks) -> None:
    """A Switch model from Megatron's format; its capacity would drop half of a batch's tokens."""
    answers = ranks.run(ranks_side.predict, 2, one(here / "switch"), EP2, rows())
    check(answers[0], [made.log_probs(here / "switch-hf", ids) for ids, _ in rows()])


def mixed(here: Path, ids: list[int], weights: Tensor) -> Tensor:
    """The average of three models by weights [3, len]."""
    probabilities = [made.log_probs(here / name, ids).exp() for name in "abc"]
    total = sum(w[:, None] * p for w, p in zip(weights.double(), probabilities, strict=True))
    return torch.as_tensor(total).log()


def posterior(here: Path, ids: list[int], prior: list[float]) -> Tensor:
    """Weights [3, len], by Bayes, position by position."""
    likelihood = torch.tensor(prior, dtype=torch.float64)
    found = []
    for place in range(len(ids)):
        found.append(likelihood / likelihood.sum())
        if place + 1 < len(ids):
            seen = [made.log_probs(here / n, ids)[place, ids[place + 1]].exp() for n in "abc"]
            likelihood = likelihood * torch.stack(seen)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("name", ["one", "dp2"])
def test_a_set_by_its_posterior(here: Path, ranks: Ranks, name: str) -> None:
    prior = {"a": 0.5, "b": 0.3, "c": 0.2}
    spec, layout = several(here, "posterior", prior=prior), LAYOUTS[name]
    answers = ranks.run(ranks_side.predict, layout.world_size, spec, layout, rows())
    weights = [posterior(here, ids, list(prior.values())) for ids, _ in rows()]
    wanted = [mixed(here, ids, w) for (ids, _), w in zip(rows(), weights, strict=True)]
    check(answers[-1], wanted)


@pytest.mark.parametrize("context", ["prefix", "document"])
def test_a_set_by_its_text(here: Path, ranks: Ranks, context: str) -> None:
    spec = several(here, "top2", context=context)
    (found,) = ranks.run(ranks_side.predict, 1, spec, ONE, rows())
    index = TfIdf({"a": made.TEXTS["x"], "b": made.TEXTS["y"], "c": made.TEXTS["x"]})
    wanted = []
    for ids, first in rows():
        weights = torch.zeros(3, len(ids))
        for place in range(len(ids)):
            # Of fewer than 32 tokens, the choice is made anew after 1, 2, 4, 8, ...
            known = first if context == "document" else 2 ** int(math.log2(place + 1))
            similarity = index.similarity(made.tokenizer().decode(ids[:known])).tolist()
            best = sorted(range(3), key=lambda m: (-similarity[m], -m))[:2]
            weights[best, place] = 0.5
        wanted.append(mixed(here, ids, weights))
    check(found, wanted)


@pytest.mark.parametrize("name", ["one", "dp2", "pp2"])
def test_held_out_text_of_a_set(here: Path, ranks: Ranks, name: str) -> None:
    """``btm_heldout``, the models one after the other, against the same float64 loops."""
    layout = LAYOUTS[name]
    models = {label: here / label for label in "abc"}
    answers = ranks.run(ranks_side.heldout, layout.world_size, models, layout, made.TEXTS)
    found, ids, labels = answers[-1]
    losses = {}
    for domain in made.TEXTS:
        each = []
        for tokens, label in zip(ids[domain].tolist(), labels[domain].tolist(), strict=True):
            weights = posterior(here, [*tokens, label[-1]], [1 / 3] * 3)[:, :-1]
            log_probs = mixed(here, tokens, weights)
            each += [log_probs[place, token].item() for place, token in enumerate(label)]
        losses[domain] = -sum(each) / len(each)
    loss, weights = found["posterior"]
    for domain, wanted in losses.items():
        assert loss[domain] == pytest.approx(wanted, abs=1e-5)
        assert sum(weights[domain].values()) == pytest.approx(1, abs=1e-5)
    assert loss["mean"] == pytest.approx(sum(losses.values()) / 2, abs=1e-5)
    # y's own model leads on y, beside the one that has seen all; x is known to a and c.
    assert found["top1"][1]["y"]["b"] > 0.6
    assert found["top2"][1]["y"]["b"] > 0.4


def test_loss_on_any_text(here: Path, ranks: Ranks) -> None:
    """Every token once: documents end to end, the end token first; bits over the text's bytes."""
    files = {name: [str(here / f"{name}.jsonl")] for name in made.TEXTS}
    subjects = [one(here / "a"), one(here / "uniform"), several(here, "posterior")]
    (found,) = ranks.run(ranks_side.data, 1, subjects, ONE, files)
    (again, _) = ranks.run(ranks_side.data, 2, subjects, LAYOUTS["dp2"], files)
    spoken = made.tokenizer()
    for name, texts in made.TEXTS.items():
        stream = [spoken.eos_id]
        for ids in spoken.encode(texts):
            stream += [*ids.tolist(), spoken.eos_id]
        nats = 0.0
        for start in range(0, len(stream) - 1, 32):
            window = stream[start : start + 33]
            log_probs = made.log_probs(here / "a", window[:-1])
            nats -= sum(log_probs[i, token].item() for i, token in enumerate(window[1:]))
        entry = found[0]["data"][name]
        assert entry["tokens"] == len(stream) - 1
        assert entry["documents"] == len(texts)
        assert entry["nats_per_token"] == pytest.approx(nats / (len(stream) - 1), abs=1e-5)
        size = sum(len(text.encode()) for text in texts)
        assert entry["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, abs=1e-5)
        chance = found[1]["data"][name]["nats_per_token"]
        assert chance == pytest.approx(math.log(spoken.vocab_size), abs=1e-6)
        for mine, theirs in zip(found, again, strict=True):
            assert mine["data"][name]["nats_per_token"] == pytest.approx(
                theirs["data"][name]["nats_per_token"], abs=1e-6
            )
    assert set(found[2]["weights"]["x"]) == {"a", "b", "c"}
    assert found[2]["models_per_token"] == 3


def test_a_short_text_is_not_filled_up_to_the_model_s_length(
    here: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """Models are made for 131,072 tokens and more; the loss of a few words is theirs alone."""
    spoken, file = made.tokenizer(), tmp_path / "short.jsonl"
    text = PackedText(["loop value"], spoken, 131_072, start_id=spoken.eos_id)
    whole = text[0]
    assert len(text.fitted(4)) == 1
    short = text[0]
    assert text.size.tokens <= text.seq_length < text.size.tokens + 4
    assert text.seq_length % 4 == 0
    for key, values in short.items():
        assert torch.equal(values, whole[key][: text.seq_length])
    assert short["loss_mask"].sum() == whole["loss_mask"].sum() == text.size.tokens
    file.write_text('{"text": "loop value"}\n')
    ids = [spoken.eos_id, *spoken.encode(["loop value"])[0].tolist(), spoken.eos_id]
    log_probs = made.log_probs(here / "a", ids[:-1])
    nats = -sum(log_probs[place, token].item() for place, token in enumerate(ids[1:]))
    for name in ("one", "tp2"):
        layout = LAYOUTS[name]
        asked = (ranks_side.data, layout.world_size, [one(here / "a")], layout)
        found = ranks.run(*asked, {"t": [str(file)]})[0][0]
        assert found["data"]["t"]["nats_per_token"] == pytest.approx(nats / len(ids[1:]), abs=1e-5)
        assert found["seq_length"] == 32


def test_a_token_without_a_row_in_the_model(here: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Behind a model's own rows lie those that pad them: what they hold is no answer."""
    spoken, last = made.tokenizer(), made.tokenizer().vocab_size - 1
    piece = spoken.decode([last])
    text = json.dumps({"text": f"{piece} loop"})
    (tmp_path / "t.jsonl").write_text(text + "\n")
    smaller = made.random_model(spoken, 0, vocab_size=last)
    made.write(smaller, tmp_path / "model", spoken)
    words = f"holds the token {piece!r} ({last}), and the model's vocabulary has {last}"
    subject = one(tmp_path / "model")
    with pytest.raises(AssertionError) as caught:
        ranks.run(ranks_side.data, 1, [subject], ONE, {"t": [str(tmp_path / "t.jsonl")]})
    assert words in str(caught.value)
    with pytest.raises(AssertionError) as caught:
        ranks.run(ranks_side.generate, 1, subject, [piece], [{"max_new_tokens": 2}])
    assert words in str(caught.value)
    ((found,),) = ranks.run(ranks_side.generate, 1, subject, ["loop"], [{"max_new_tokens": 2}])
    assert found[0]["tokens"] > 0


@pytest.mark.parametrize("name", ["Llama 3", "Qwen"])
def test_a_model_has_one_loss_read_as_either_format(
    here: Path, ranks: Ranks, tmp_path: Path, name: str
) -> None:
    """Behind the begin token of its tokenizer, asked by ``transformers``."""
    import transformers

    model = families.make("llama", tmp_path / "hf", vocab_size=512, max_position_embeddings=32)
    tokenizers_made.MADE[name][0](tmp_path / "hf")
    request = MixRequest(
        sources=(f"m={tmp_path / 'hf'}",), out=str(tmp_path / "m"), method="copy", format="megatron"
    )
    offline.run(request, io.StringIO())
    subjects = [one(tmp_path / "hf"), one(tmp_path / "m")]
    (found,) = ranks.run(ranks_side.data, 1, subjects, ONE, {"x": [str(here / "x.jsonl")]})
    losses = [each["data"]["x"]["nats_per_token"] for each in found]
    assert losses[0] == losses[1]

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    start = theirs("a")["input_ids"][0]
    stream = [start if start == theirs.bos_token_id else theirs.eos_token_id]
    assert (stream[0] == theirs.bos_token_id) == (name == "Llama 3")
    for text in made.TEXTS["x"]:
        stream += [*theirs(text, add_special_tokens=False)["input_ids"], theirs.eos_token_id]
    nats = 0.0
    for at in range(0, len(stream) - 1, 32):
        window = torch.tensor(stream[at : at + 33])
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0].double()
        nats += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    assert losses[0] == pytest.approx(nats / (len(stream) - 1), abs=1e-5)


def test_generation(here: Path, ranks: Ranks) -> None:
    prompts = [prompt for prompt, _ in made.CHAINS]
    greedy = {"max_new_tokens": 20}
    cut = {"max_new_tokens": 20, "until": ("7",)}
    drawn = {"max_new_tokens": 12, "temperature": 0.9, "top_p": 0.8, "random_seed": 3}
    bigram, random = one(here / "bigram"), one(here / "a")
    (found,) = ranks.run(ranks_side.generate, 1, bigram, prompts, [greedy, cut])
    for (_, answer), whole, shorter in zip(made.CHAINS, *found, strict=True):
        assert (whole["text"], whole["ended"]) == (answer, True)
        assert shorter["text"] == answer.removesuffix("7")
    (first,) = ranks.run(ranks_side.generate, 1, random, prompts, [drawn, drawn, greedy])
    (alone,) = ranks.run(ranks_side.generate, 1, random, prompts[:1], [drawn])
    assert first[0] == first[1]
    assert not any(one["cut"] for one in first[0])
    long = "loop " * 40  # the model takes 32 tokens
    ((cut,),) = ranks.run(ranks_side.generate, 1, random, [long], [{"max_new_tokens": 12}])
    assert cut[0]["cut"] == 1 + len(made.tokenizer().encode([long])[0]) - (32 - 12)
    assert alone[0][0] == first[0][0]
    assert first[0] != first[2]


def test_draws_follow_the_distribution() -> None:
    from megatron_btx.evaluate.generate import Decoding, pick

    log_probs = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draw = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[pick(log_probs, Decoding(temperature=1.0, top_p=0.75), draw)] += 1
    # 0.5 and 0.3 reach 0.75; renormalised: 0.625 and 0.375, standard deviation 0.008
    assert (counts / 4000).tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    sharp = Decoding(temperature=1e-3)
    assert {pick(log_probs, sharp, draw) for _ in range(50)} == {0}
    assert pick(log_probs, Decoding(), draw) == 0


def test_method_names_agree() -> None:
    from megatron_btx.evaluate import model_spec

    assert set(model_spec.METHODS) == {*btm.TOP, "posterior"}
