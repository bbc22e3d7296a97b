"""What the ranks of these tests do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_btx.evaluate.model_spec import Subject
from megatron_btx.recipe.schema import Evaluate, Layout


def predict(subject: Subject, layout: Layout, rows: list[tuple[list[int], int]]) -> Any:
    """Scores of rows, and what follows them."""
    from megatron_btx.engine import distributed
    from megatron_btx.evaluate.predictor import Predictor, ScoredText

    distributed.initialize(layout, 0)
    predictor = Predictor(subject, layout, micro_batch_size=2)
    asked = [ScoredText(tuple(ids), first, number) for number, (ids, first) in enumerate(rows)]
    scores = predictor.score(asked)
    return [(s.log_prob, s.is_greedy) for s in scores], predictor.next(asked)


def refused(
    subject: Subject, layout: Layout, rows: list[tuple[list[int], int]], files: dict[str, list[str]]
) -> list[str]:
    """What scores, predictions, continuations and losses of a model end with instead."""
    from megatron_btx.engine import distributed
    from megatron_btx.errors import UserError
    from megatron_btx.evaluate.generate import Decoding
    from megatron_btx.evaluate.generate import generate as run
    from megatron_btx.evaluate.loss_on_text import EvalSetting, evaluate_data
    from megatron_btx.evaluate.predictor import Predictor, ScoredText

    distributed.initialize(layout, 0)
    predictor = Predictor(subject, layout, micro_batch_size=2)
    setting = EvalSetting(layout=layout, micro_batch_size=2)
    asked = [ScoredText(tuple(ids), first, number) for number, (ids, first) in enumerate(rows)]
    found = []
    for ask in (
        lambda: predictor.score(asked),
        lambda: predictor.next(asked),
        lambda: run(predictor, ["a", "b", "c"], Decoding(max_new_tokens=2)),
        lambda: evaluate_data(subject, files, setting),
    ):
        try:
            ask()
        except UserError as error:
            found.append(f"{error.where}: {error.what.partition(':')[0]}")
    return found


def generate(subject: Subject, prompts: list[str], decodings: list[dict[str, Any]]) -> Any:
    """Continuations of each prompt by itself, and of all together."""
    from megatron_btx.engine import distributed
    from megatron_btx.evaluate.generate import Decoding
    from megatron_btx.evaluate.generate import generate as run
    from megatron_btx.evaluate.predictor import Predictor

    distributed.initialize(Layout(), 0)
    predictor = Predictor(subject, Layout(), micro_batch_size=2)
    return [
        [asdict(one) for one in run(predictor, prompts, Decoding(**decoding))]
        for decoding in decodings
    ]


def data(subjects: list[Subject], layout: Layout, files: dict[str, list[str]]) -> Any:
    """``evaluate_data`` of each."""
    from megatron_btx.engine import distributed
    from megatron_btx.evaluate.loss_on_text import EvalSetting, evaluate_data

    distributed.initialize(layout, 0)
    setting = EvalSetting(layout=layout, micro_batch_size=2)
    return [evaluate_data(subject, files, setting) for subject in subjects]


def heldout(models: dict[str, Path], layout: Layout, texts: dict[str, list[str]]) -> Any:
    """``btm_heldout`` by every method: loss and weights."""
    from megatron_btx.engine import distributed
    from megatron_btx.evaluate.btm_heldout import btm_heldout
    from megatron_btx.evaluate.packed_text import PackedText
    from tests.evaluate.made import tokenizer

    distributed.initialize(layout, 0)
    spoken = tokenizer()
    domains = {
        name: [one for one in PackedText(text, spoken, 32, start_id=spoken.eos_id)][:4]
        for name, text in texts.items()
    }
    found = {}
    for method in ("top1", "top2", "posterior"):
        ensemble = btm_heldout(
            models,
            domains,
            method=method,  # type: ignore[arg-type]
            corpora={"a": texts["x"], "b": texts["y"], "c": texts["x"] + texts["y"]},
            tokenizer=spoken,
            settings=Evaluate(micro_batch_size=2, layout=layout),
            precision="fp32",
            random_seed=0,
        )
        found[method] = (ensemble.heldout.loss, ensemble.weights)
    ids = {name: torch.stack([s["tokens"] for s in rows]) for name, rows in domains.items()}
    labels = {name: torch.stack([s["labels"] for s in rows]) for name, rows in domains.items()}
    return found, ids, labels


def tasks(subject: Subject, layout: Layout, asked: list[dict[str, Any]]) -> Any:
    """``evaluate_tasks``."""
    from megatron_btx.engine import distributed
    from megatron_btx.evaluate.predictor import Predictor
    from megatron_btx.evaluate.tasks import evaluate_tasks

    distributed.initialize(layout, 0)
    return evaluate_tasks(Predictor(subject, layout, micro_batch_size=4), asked)


def rolling(subject: Subject, texts: list[str]) -> list[float]:
    """lm-eval's log-likelihoods of whole texts."""
    from lm_eval.api.instance import Instance

    from megatron_btx.engine import distributed
    from megatron_btx.evaluate.lm_eval_adapter import Harness
    from megatron_btx.evaluate.predictor import Predictor

    distributed.initialize(Layout(), 0)
    harness = Harness(Predictor(subject, Layout()))
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
        for text in texts
    ]
    return harness.loglikelihood_rolling(requests)


def route(subject: Subject, layout: Layout, files: dict[str, list[str]]) -> Any:
    """``routing.measure``, a sequence at a time."""
    from megatron_btx.engine import distributed
    from megatron_btx.evaluate.loss_on_text import EvalSetting
    from megatron_btx.evaluate.measure_routing import measure

    distributed.initialize(layout, 0)
    return measure(subject, files, EvalSetting(layout=layout, micro_batch_size=1))


def route_tokens(subject: Subject, layout: Layout, texts: list[str]) -> Any:
    """``token_routing.route``."""
    from megatron_btx.engine import distributed
    from megatron_btx.evaluate.predictor import Predictor
    from megatron_btx.evaluate.token_routing import route

    distributed.initialize(layout, 0)
    return route(Predictor(subject, layout, micro_batch_size=2), texts)


def evaluate(model: Path, layout: Layout, text: Any, micro_batch_size: int) -> Any:
    """Held-out loss and routing of a checkpoint on a text called ``t``."""
    from megatron_btx.engine import distributed
    from megatron_btx.evaluate import heldout_loss
    from megatron_btx.evaluate.models import load
    from megatron_btx.families.open_checkpoint import open_checkpoint

    distributed.initialize(layout, 0)
    live = load(open_checkpoint(model, "model"), layout, "fp32")
    return heldout_loss.evaluate(live.module, {"t": text}, micro_batch_size=micro_batch_size)


def continued(models: dict[str, Path], precision: str) -> dict[str, float]:
    """By how much logits with keys and values kept differ from those of a whole pass, at most, over
    rows of several lengths, some of which end early."""
    from megatron_btx.engine import distributed
    from megatron_btx.engine.decoding import KeyValueCache
    from megatron_btx.engine.moe.router import dropless
    from megatron_btx.evaluate.models import load
    from megatron_btx.families.open_checkpoint import open_checkpoint

    distributed.initialize(Layout(), 0)
    draw = torch.Generator().manual_seed(0)
    found = {}
    for name, path in models.items():
        live = load(open_checkpoint(path, "m"), Layout(), precision)  # type: ignore[arg-type]
        tokens = torch.randint(1, live.architecture.vocab_size, (3, 40), generator=draw)
        with torch.no_grad(), dropless(live.module):
            places = torch.arange(40).expand(3, 40)
            whole = live.module(tokens, places, attention_mask=None).float()
        cache = KeyValueCache(live.module, live.architecture.model, 40)
        lengths = torch.tensor([9, 1, 20])
        logits = cache.read(tokens[:, :20], lengths).float()
        pairs = [(logits[row, :length], whole[row, :length]) for row, length in enumerate(lengths)]
        rows = [0, 1, 2]
        for step in range(18):
            if step == 12:
                rows = [1, 0]
                cache.keep([1, 0])
            logits = cache.step(tokens[rows, cache.lengths])
            pairs += [(logits[i], whole[row, cache.lengths[i] - 1]) for i, row in enumerate(rows)]
        real = slice(0, live.architecture.vocab_size)
        worst = max(float((a[..., real] - b[..., real]).abs().max()) for a, b in pairs)
        found[name] = worst / float(whole[..., real].std())
    return found


def grown(
    subject: Subject, layout: Layout, prompts: list[str], decodings: list[dict[str, Any]]
) -> Any:
    """Continuations with keys and values kept, and without; and the tokens that were read: of the
    prompts, and after them."""
    from megatron_btx.engine import distributed
    from megatron_btx.engine.decoding import KeyValueCache
    from megatron_btx.evaluate import generate as room
    from megatron_btx.evaluate.predictor import Predictor

    distributed.initialize(layout, 0)
    predictor = Predictor(subject, layout, micro_batch_size=2)
    settings = [room.Decoding(**decoding) for decoding in decodings]
    counted = [0, 0]
    read, step, remembers = KeyValueCache.read, KeyValueCache.step, room.remembers
    pick, picked = room.pick, []

    def picking(log_probs, decoding, draw):
        picked.append(pick(log_probs, decoding, draw))
        return picked[-1]

    def picking_again(log_probs, decoding, draw):
        """Of two that are equally likely, to rounding, the same one: another order of sums."""
        own = pick(log_probs, decoding, draw)
        former = picked.pop(0) if picked else own
        tie = decoding.temperature == 0 and log_probs[own] - log_probs[former] < 1e-4
        return former if tie else own

    def reading(self, tokens, lengths):
        counted[0] += int(lengths.sum())
        return read(self, tokens, lengths)

    def stepping(self, tokens):
        counted[1] += len(tokens)
        return step(self, tokens)

    KeyValueCache.read, KeyValueCache.step = reading, stepping  # type: ignore[method-assign]
    room.pick = picking
    try:
        kept = [asdict(one) for one in room.generate(predictor, prompts, settings)]
    finally:
        KeyValueCache.read, KeyValueCache.step = read, step  # type: ignore[method-assign]
    remembered = remembers(predictor)
    room.remembers, room.pick = lambda _predictor: False, picking_again
    try:
        whole = [asdict(one) for one in room.generate(predictor, prompts, settings)]
    finally:
        room.remembers, room.pick = remembers, pick
    return remembered, kept, whole, counted
