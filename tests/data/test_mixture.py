"""The order in which a run reads: a function of the recipe alone."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_btx.data.heldout_sequences import held_out
from megatron_btx.data.mixture import Interleaved, StageData, stage_data
from megatron_btx.data.prepare import prefix
from megatron_btx.data.tokenizer import load_tokenizer
from megatron_btx.errors import UserError
from megatron_btx.recipe import count
from megatron_btx.recipe.schema import Layout, Recipe, Training
from megatron_btx.recipe.stages import training
from tests.data.ranks_side import read_steps
from tests.ranks import Ranks

Prepared = tuple[Recipe, Path]


def steps(recipe: Recipe, name: str) -> int:
    return count.steps(training(recipe, name), recipe.model)


def rows(stream: StageData, which: Iterable[int], ranks: int = 1) -> list[tuple[int, int, bytes]]:
    """(global index, domain, tokens and labels) of steps, in the order of the global index."""
    found = []
    for step in which:
        for rank in range(ranks):
            for batch in stream.batches(step, rank):
                both = torch.cat([batch["tokens"], batch["labels"]], 1).numpy()
                found += [
                    (sample, domain, row.tobytes())
                    for sample, domain, row in zip(
                        batch["samples"].tolist(), batch["domains"].tolist(), both, strict=True
                    )
                ]
    return sorted(found)


def content(found: Iterable[tuple[int, int, bytes]]) -> list[tuple[int, bytes]]:
    return [(domain, text) for _, domain, text in found]


def test_batches(prepared: Prepared) -> None:
    recipe, run_dir = prepared
    stream = stage_data(recipe, "seed", run_dir)
    settings_, length = recipe.seed, recipe.model.seq_length
    batches = list(stream.batches(3, 0))
    assert len(batches) == stream.num_microbatches
    first = 3 * settings_.global_batch_size
    for batch in batches:
        shape = (settings_.micro_batch_size, length)
        for key in ("tokens", "labels", "position_ids"):
            assert batch[key].dtype == torch.int64
            assert batch[key].shape == shape
        assert torch.equal(batch["loss_mask"], torch.ones(shape))
        assert torch.equal(batch["position_ids"], torch.arange(length).expand(shape))
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
        assert batch["samples"].tolist() == list(range(first, first + shape[0]))
        first += shape[0]


def test_every_sample_is_of_its_domain(prepared: Prepared) -> None:
    """Each row is a stretch of that domain's text, documents end with the end token."""
    recipe, run_dir = prepared
    names = list(recipe.domains)
    eos = load_tokenizer(run_dir / "prepare" / "tokenizer").eos_id
    documents = {}
    for name in names:
        indexed = IndexedDataset(str(prefix(run_dir, name, "train")))
        documents[name] = {bytes(np.asarray(indexed[i], np.int64)) for i in range(len(indexed))}
        assert all(np.asarray(indexed[i])[-1] == eos for i in range(len(indexed)))
    whole = 0
    for _, domain, text in rows(stage_data(recipe, "finetune", run_dir), range(10)):
        row = np.frombuffer(text, np.int64)
        tokens = np.append(row[: len(row) // 2], row[-1])
        ends = np.flatnonzero(tokens == eos)
        for begin, end in zip(ends[:-1] + 1, ends[1:] + 1, strict=True):
            assert bytes(tokens[begin:end]) in documents[names[domain]]
            whole += 1
        if not len(ends):
            assert any(bytes(tokens) in document for document in documents[names[domain]])
            whole += 1
    assert whole > 20


def test_mixture_keeps_to_its_weights(prepared: Prepared) -> None:
    recipe, run_dir = prepared
    for name in ("seed", "expert:code", "finetune"):
        stream = stage_data(recipe, name, run_dir)
        dp = training(recipe, name).layout.data_parallel_size
        found = Counter(domain for _, domain, _ in rows(stream, range(steps(recipe, name)), dp))
        for domain, weight in count.mixture(training(recipe, name).data).items():
            share = found[list(recipe.domains).index(domain)] / len(stream)
            assert abs(share - weight) < 2 / len(stream) + 1e-6


@pytest.mark.parametrize(("micro", "dp"), [(4, 2), (2, 1), (1, 4), (8, 1), (2, 2)])
def test_layouts_see_the_same_global_batches(prepared: Prepared, micro: int, dp: int) -> None:
    recipe, run_dir = prepared
    stream = stage_data(recipe, "expert:math", run_dir)
    one = rows(stream, range(6))
    other = replace(
        recipe.experts["math"], micro_batch_size=micro, layout=Layout(data_parallel_size=dp)
    )
    changed = replace(recipe, experts={**recipe.experts, "math": other})
    assert rows(stage_data(changed, "expert:math", run_dir), range(6), dp) == one


def test_blocks_as_megatron_deals_them(prepared: Prepared) -> None:
    """i = step GBS + (m dp + r) mbs + j."""
    recipe, run_dir = prepared
    assert recipe.finetune.layout.data_parallel_size == 2
    stream = stage_data(recipe, "finetune", run_dir)
    size, dp = recipe.finetune.micro_batch_size, 2
    for rank in range(dp):
        for micro, batch in enumerate(stream.batches(5, rank)):
            begin = 5 * recipe.finetune.global_batch_size + (micro * dp + rank) * size
            assert batch["samples"].tolist() == list(range(begin, begin + size))


def test_any_step_can_be_asked_for(prepared: Prepared) -> None:
    recipe, run_dir = prepared
    all_steps = rows(stage_data(recipe, "seed", run_dir), range(8))
    size = recipe.seed.global_batch_size
    again = stage_data(recipe, "seed", run_dir)
    assert rows(again, [7]) == all_steps[7 * size :]
    assert rows(again, [2, 3]) == all_steps[2 * size : 4 * size]


def test_two_ranks_at_once(prepared: Prepared, ranks: Ranks, tmp_path: Path) -> None:
    """Through real process groups, with no index cached; then again from the cache."""
    recipe, run_dir = prepared
    shutil.copytree(run_dir / "prepare", tmp_path / "prepare")
    expected = rows(stage_data(recipe, "finetune", run_dir), range(3), 2)
    for _ in range(2):
        found = []
        for rank in ranks.run(read_steps, 2, recipe, "finetune", tmp_path, 3):
            for micro, samples in enumerate(rank["samples"]):
                text = np.concatenate([rank["tokens"][micro], rank["labels"][micro]], 1)
                found += [
                    (s, d, row.tobytes())
                    for s, d, row in zip(samples, rank["domains"][micro], text, strict=True)
                ]
        assert sorted(found) == expected
        (cache,) = (tmp_path / "finetune" / "index").iterdir()
        assert not cache.name.startswith(".")


def test_dense_reads_what_the_experts_and_the_finetuning_read(prepared: Prepared) -> None:
    recipe, run_dir = prepared
    dense = stage_data(recipe, "dense", run_dir)
    everything = content(rows(dense, range(steps(recipe, "dense"))))
    experts = [
        content(rows(stage_data(recipe, f"expert:{name}", run_dir),
                     range(steps(recipe, f"expert:{name}")))) for name in recipe.experts
    ]  # fmt: skip
    size = sum(map(len, experts))
    first, second = everything[:size], everything[size:]
    assert Counter(first) == sum((Counter(expert) for expert in experts), Counter())
    finetune = stage_data(recipe, "finetune", run_dir)
    assert second == content(rows(finetune, range(steps(recipe, "finetune")), 2))
    for expert in experts:  # in the expert's own order, and spread over the whole phase
        own = set(expert)
        places = [i for i, row in enumerate(first) if row in own]
        assert np.abs(np.diff(places) - size / len(expert)).max() <= len(experts) + 1


def test_dense_with_a_batch_that_does_not_divide(prepared: Prepared) -> None:
    recipe, run_dir = prepared
    assert recipe.dense is not None
    odd = replace(recipe, dense=replace(recipe.dense, global_batch_size=20, micro_batch_size=20))
    stream = stage_data(odd, "dense", run_dir)
    number = steps(odd, "dense")
    assert number * 20 > len(stream) > (number - 1) * 20
    found = content(rows(stream, range(number)))
    begin = len(stream) - steps(recipe, "finetune") * recipe.finetune.global_batch_size
    assert found[len(stream) :] == found[begin:][: number * 20 - len(stream)]


def test_stages_read_in_orders_of_their_own(prepared: Prepared) -> None:
    """Two experts with the same mixture would otherwise see the same general text."""
    recipe, run_dir = prepared
    same = {name: replace(block, data={"general": 1.0}) for name, block in recipe.experts.items()}
    changed = replace(recipe, experts=same)
    one, two = (
        content(rows(stage_data(changed, f"expert:{name}", run_dir), range(4)))
        for name in ("code", "math")
    )
    assert one != two
    other_seed = replace(changed, random_seed=99)
    assert content(rows(stage_data(other_seed, "expert:code", run_dir), range(4))) != one


def test_one_domain_alone(prepared: Prepared) -> None:
    recipe, run_dir = prepared
    block = replace(recipe.experts["prose"], data={"prose": 3.0})
    changed = replace(recipe, experts={**recipe.experts, "prose": block})
    found = rows(stage_data(changed, "expert:prose", run_dir), range(3))
    assert {domain for _, domain, _ in found} == {list(recipe.domains).index("prose")}


def test_many_epochs(prepared: Prepared) -> None:
    """More samples than the text has: it is read again, shuffled anew, no sequence is left out."""
    recipe, run_dir = prepared
    block = Training(tokens=2_000_000, data={"code": 1.0}, global_batch_size=8, micro_batch_size=8)
    stream = stage_data(replace(recipe, seed=block), "seed", run_dir)
    epoch = len(held_like(recipe, run_dir, "code"))
    assert len(stream) > 3 * epoch
    found = [text for _, _, text in rows(stream, range(len(stream) // 8))]
    assert len(set(found[:epoch])) > 0.9 * epoch


def held_like(recipe: Recipe, run_dir: Path, name: str) -> range:
    indexed = IndexedDataset(str(prefix(run_dir, name, "train")))
    return range(int(indexed.sequence_lengths.sum()) // recipe.model.seq_length)


def test_a_killed_build_is_not_trusted(prepared: Prepared, tmp_path: Path) -> None:
    recipe, run_dir = prepared
    shutil.copytree(run_dir / "prepare", tmp_path / "prepare")
    expected = rows(stage_data(recipe, "seed", tmp_path), range(2))
    (cache,) = (tmp_path / "seed" / "index").iterdir()
    left = cache.rename(cache.with_name(f".{cache.name}.12345.tmp"))
    for file in left.glob("*.npy"):
        file.write_bytes(file.read_bytes()[:100])
    assert rows(stage_data(recipe, "seed", tmp_path), range(2)) == expected
    assert [path.name for path in (tmp_path / "seed" / "index").iterdir()] == [cache.name]


def test_other_text_is_another_index(prepared: Prepared, tmp_path: Path) -> None:
    """Indices of text that was there before are never used for what is there now."""
    recipe, run_dir = prepared
    shutil.copytree(run_dir / "prepare", tmp_path / "prepare")
    block = replace(recipe.experts["code"], data={"code": 1.0})
    changed = replace(recipe, experts={**recipe.experts, "code": block})
    stage_data(changed, "expert:code", tmp_path)
    shutil.rmtree(tmp_path / "prepare" / "data" / "code")
    shutil.copytree(tmp_path / "prepare" / "data" / "prose", tmp_path / "prepare" / "data" / "code")
    which = range(steps(recipe, "expert:code"))
    found = rows(stage_data(changed, "expert:code", tmp_path), which)
    shutil.rmtree(tmp_path / "expert-code" / "index")
    assert rows(stage_data(changed, "expert:code", tmp_path), which) == found


def test_held_out_sequences(prepared: Prepared) -> None:
    recipe, run_dir = prepared
    length = recipe.model.seq_length
    everything = held_out(recipe, run_dir, 10**9)
    assert list(everything) == list(recipe.domains)
    for name, text in everything.items():
        indexed = IndexedDataset(str(prefix(run_dir, name, "valid")))
        tokens = np.concatenate([indexed[i] for i in range(len(indexed))]).astype(np.int64)
        assert len(text) == (len(tokens) - 1) // length
        for index in range(len(text)):
            begin = index * length
            assert text[index]["tokens"].tolist() == tokens[begin : begin + length].tolist()
            assert text[index]["labels"].tolist() == tokens[begin + 1 : begin + length + 1].tolist()
    some = held_out(recipe, run_dir, 10 * length + 5)["code"]
    assert len(some) == 10
    all_rows = [row["tokens"].tolist() for row in everything["code"]]
    places = [all_rows.index(row["tokens"].tolist()) for row in some]
    assert places == [i * len(all_rows) // 10 for i in range(10)]
    with pytest.raises(IndexError):
        some[10]


def test_missing_and_short_text(prepared: Prepared, tmp_path: Path) -> None:
    recipe, run_dir = prepared
    shutil.copytree(run_dir / "prepare", tmp_path / "prepare")
    with pytest.raises(UserError, match="less than one sequence"):
        held_out(recipe, run_dir, recipe.model.seq_length - 1)
    (tmp_path / "prepare" / "data" / "code" / "train.json").unlink()
    with pytest.raises(UserError, match="run the prepare stage") as error:
        stage_data(recipe, "expert:code", tmp_path)
    assert error.value.where == "domains.code"


SIZES = st.lists(st.integers(0, 400), min_size=1, max_size=6).filter(any)


@settings(max_examples=300)
@given(sizes=SIZES, data=st.data())
def test_interleaving_against_the_whole_order(sizes: list[int], data: st.DataObject) -> None:
    keys = [((j + 0.5) / size, part, j) for part, size in enumerate(sizes) for j in range(size)]
    order = [(part, j) for _, part, j in sorted(keys)]
    first = data.draw(st.integers(0, len(order)))
    number = data.draw(st.integers(0, len(order) - first))
    part, element = Interleaved(sizes).locate(first, number)
    found = list(zip(part.tolist(), element.tolist(), strict=True))
    assert found == order[first : first + number]


def test_interleaving_at_the_papers_size() -> None:
    """48k, 50k and 10k steps of 1024 samples, found without an array of a hundred million."""
    sizes = [48_000 * 1024, 50_000 * 1024, 10_000 * 1024]
    weave = Interleaved(sizes)
    for first in (0, 10**8, len(weave) - 64):
        part, element = weave.locate(first, 64)
        again = [weave.locate(first + i, 1) for i in range(64)]
        assert part.tolist() == [int(p[0]) for p, _ in again]
        assert element.tolist() == [int(e[0]) for _, e in again]
        assert len(set(zip(part.tolist(), element.tolist(), strict=True))) == 64
