"""A :class:`Predictor` as a model of lm-eval, the field's evaluation harness, and its tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_btx.errors import UserError
from megatron_btx.evaluate.generate import Decoding, generate
from megatron_btx.evaluate.predictor import NO_PROGRESS, Predictor, ScoredText

MAX_NEW_TOKENS = 256
"""Of an answer, where the task does not say."""

_ASKS = object()
_NEUTRAL: dict[str, Any] = {
    "top_k": 0, "num_beams": 1, "repetition_penalty": 1.0, "use_cache": True,
}  # fmt: skip
"""Options of generation that we have not, at the value at which they do nothing."""
_OF_DRAWS = ("top_k", "top_p", "min_p", "typical_p")
"""Those that do nothing where nothing is drawn."""


BITS = "bits_per_byte"


class Task(ConfigurableTask):
    """lm-eval's, which also has the metric ``bits_per_byte`` where its ``metric_list`` names it:
    the bits of an item's right answer behind the same context, over the answer's UTF-8 bytes.

    The right answer is of multiple choice the right choice (where the choices stand in the context:
    what follows the right one); of generation the answer as an example would show it, of several
    the first. What separates it from the context is in the bits and not in the bytes, as in
    lm-eval's ``acc_bytes``.
    """

    _instances: list[Instance]

    @property
    def _generates(self) -> bool:
        return bool(self.OUTPUT_TYPE == "generate_until")

    def construct_requests(self, doc: Any, ctx: Any, **kwargs: Any) -> Any:
        """Of generation with one more, for the answer's likelihood."""
        asked = super().construct_requests(doc, ctx, **kwargs)
        if BITS not in self._metric_fn_list or not self._generates:
            return asked
        answer = f"{self.config.target_delimiter}{self._answer(doc)}"
        arguments, metadata = (ctx, answer), kwargs["metadata"]
        return [asked, Instance("loglikelihood", doc, arguments, idx=1, metadata=metadata)]

    def apply_filters(self) -> None:
        """Of what was generated; likelihoods stay as they are."""
        every = self._instances
        likelihoods = [one for one in every if one.request_type == "loglikelihood"]
        if self._generates:
            self._instances = [one for one in every if one.request_type != "loglikelihood"]
        super().apply_filters()
        if self._generates:
            filters = self._instances[0].filtered_resps
            for one in likelihoods:
                one.filtered_resps = dict.fromkeys(filters, one.resps[0])
        self._instances = every

    def process_results(self, doc: Any, results: Any) -> Any:
        """The task's own metrics, and this one."""
        if BITS not in self._metric_fn_list or self.OUTPUT_TYPE == "loglikelihood_rolling":
            return super().process_results(doc, results)
        own = results[:-1] if self._generates else results
        log_prob, _ = results[-1] if self._generates else results[self._right(doc)]
        size = len(self._answer(doc).encode())
        return {**super().process_results(doc, own), BITS: -log_prob / math.log(2) / size}

    def _right(self, doc: Any) -> int:
        """Of multiple choice, which choice is."""
        choices = self.doc_to_choice(doc)
        right = self.doc_to_text(doc) if self.multiple_input else self.doc_to_target(doc)
        place = choices.index(right) if isinstance(right, str) else right
        if not isinstance(place, int) or not 0 <= place < len(choices):
            raise ValueError(f"the right answer {right!r} is none of {len(choices)} choices")
        return place

    def _answer(self, doc: Any) -> str:
        if self._generates:
            found = self.doc_to_target(doc, self.fewshot_cfg.doc_to_target)
            answer = str(found[0] if isinstance(found, list) else found)
        elif self.multiple_input:
            answer = str(self.doc_to_target(doc))
        else:
            answer = str(self.doc_to_choice(doc)[self._right(doc)])
        if not answer:
            raise ValueError("an answer is empty")
        return answer


class Harness(TemplateLM):
    """What lm-eval asks of a model. On several ranks, each runs the harness and asks the same.

    Before a text stands the model's start token (``Tokenizer.start_id``). A context that is
    too long loses its beginning.
    """

    def __init__(self, predictor: Predictor, progress: Callable[[float], None] = NO_PROGRESS):
        super().__init__()
        self._predictor, self._progress = predictor, progress
        self.cut = 0
        """Contexts that were too long and lost their beginning."""
        self.failed = False
        """Whether the model raised an error, and not what a task made of its answers."""

    @contextmanager
    def _running(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.failed = True
            raise

    @property
    def eot_token_id(self) -> int:
        """What lm-eval puts before a continuation without a context."""
        return self._predictor.start_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, none added."""
        return self._predictor.encode(string)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """As lm-eval does it, without its bar: ours counts."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows: list[ScoredText] = []
        owners: list[int] = []
        for number, (_, context, continuation) in enumerate(requests):
            added = list(self._rows(context, continuation, number))
            rows += added
            owners += [number] * len(added)
        with self._running():
            scores = self._predictor.score(rows, self._progress)
        totals = [(0.0, True)] * len(requests)
        for owner, score in zip(owners, scores, strict=True):
            log_prob, is_greedy = totals[owner]
            totals[owner] = (log_prob + score.log_prob, is_greedy and score.is_greedy)
        return totals

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-likelihood of whole texts, each token predicted once with as much before it as the
        model takes."""
        rows: list[ScoredText] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self._predictor.encode(request.args[0]),
                prefix_token=self._predictor.start_id,
                max_seq_len=self._predictor.seq_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                first = len(context)
                rows.append(ScoredText((*context, *continuation), first, number))
                owners.append(number)
        totals = [0.0] * len(requests)
        with self._running():
            scores = self._predictor.score(rows, self._progress)
        for owner, score in zip(owners, scores, strict=True):
            totals[owner] += score.log_prob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy or drawn continuations, ended by the task's ``until``."""
        decodings = [self._decoding(request.args[1]) for request in requests]
        prompts = [request.args[0] for request in requests]
        for prompt, decoding in zip(prompts, decodings, strict=True):
            room = self._predictor.seq_length - decoding.max_new_tokens
            self.cut += len(self._predictor.encode(prompt)) + 1 > room
        with self._running():
            found = generate(self._predictor, prompts, decodings, self._progress)
        return [one.text for one in found]

    def _decoding(self, options: dict[str, Any]) -> Decoding:
        """A task's ``generation_kwargs``, by lm-eval's own reading of them.

        Raises:
            UserError: they ask for what is not done here.
        """
        given = {
            k: v for k, v in normalize_gen_kwargs(options, MAX_NEW_TOKENS).items() if v is not None
        }
        until = tuple(stop for stop in given.pop("until") if stop)
        wanted, temperature = given.pop("max_gen_toks"), float(given.pop("temperature", 0.0))
        sampled = given.pop("do_sample") and temperature > 0
        top_p = float(given.pop("top_p", 1.0)) if sampled else 1.0
        neutral = _NEUTRAL if sampled else _NEUTRAL | {name: given.get(name) for name in _OF_DRAWS}
        if more := [key for key, value in given.items() if neutral.get(key, _ASKS) != value]:
            what = f"{', '.join(f'{key} ({given[key]!r})' for key in more)} is not done here"
            fix = "give until, do_sample, temperature, top_p and max_gen_toks"
            raise UserError("generation_kwargs", what, fix)
        return Decoding(
            max_new_tokens=min(wanted, max(1, self._predictor.seq_length // 2)),
            temperature=temperature if sampled else 0.0,
            top_p=top_p,
            until=until,
        )

    def _rows(
        self, context: Sequence[int], continuation: Sequence[int], number: int
    ) -> Iterator[ScoredText]:
        """What is run to score a continuation: a row; of one that is longer than the model's
        context several, each token with half a context before it at least, if there is so much."""
        if not context or context[0] != self._predictor.start_id:
            context = [self._predictor.start_id, *context]
        most = self._predictor.seq_length + 1
        ids = (*context, *continuation)
        self.cut += len(ids) > most
        first, fits = len(context), len(continuation) < most
        while first < len(ids):
            end = len(ids) if fits else min(len(ids), first + most // 2)
            begin = max(0, end - most)
            yield ScoredText(ids[begin:end], first - begin, number)
            first = end
