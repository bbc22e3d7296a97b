"""How fast text becomes token files, against the tokenizers themselves and a pool of one call each.

    python benchmarks/prepare.py --tokenizers DIR
    python benchmarks/prepare.py --tokenizers DIR --mb 64 --rounds 5 --processes 8

Text is Python's own sources. The tokenizers are made of it, and for 128k of installed packages' as
well, once for ``DIR``: SentencePiece as a recipe makes it (32k), and byte-level BPE with Llama 3's
way of splitting words, of 32k and 128k entries. ``--train`` makes them and measures nothing. Within
a round all are measured one after the other, so that a busy machine slows all of them alike;
printed are medians of MB/s and of each round's ratios:

- bare: the library's own batch call on text in memory, 100 documents at a time, a process a core;
- ours: ``prepare``'s shards and join, from JSONL to .bin and .idx, processes' start left out (it is
  measured in each round);
- one by one: one ``encode`` a document in a pool of processes that sends ids back, as Megatron-LM's
  tools/preprocess_data.py does it, and Megatron's builder; by wall clock, and by the seconds of CPU
  of all processes (``of CPU``), which say more where others use the machine;
- reading: seconds of CPU for all documents of a file, over those of ours with one process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_btx.data import no_progress, tokenize
from megatron_btx.data.builtin import text as builtin
from megatron_btx.data.documents import read_documents
from megatron_btx.data.domain_text import DomainText
from megatron_btx.data.parallel import cores, run_all
from megatron_btx.data.shards import set_up
from megatron_btx.data.tokenizer import HuggingFace, Tokenizer, load_tokenizer, train_tokenizer
from megatron_btx.files import unfinished
from megatron_btx.recipe.schema import Domain

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3's tokenizer.json splits text before BPE."""

_own: Any = None


def documents(size: int) -> Iterator[str]:
    """About ``size`` bytes of text, repeated with other beginnings where there is less."""
    sources = [*builtin.stdlib_sources(), *builtin.stdlib_sources(tests=True)]
    number = 0
    while True:
        for source in sources:
            text = f"{number} {source.read()}"[:20_000]
            number += 1
            size -= len(text.encode())
            yield text
            if size < 0:
                return


def of_packages(size: int) -> Iterator[str]:
    """About ``size`` bytes of other text: installed packages."""
    root = Path(np.__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        text = path.read_text("utf-8", "replace")[:20_000]
        size -= len(text)
        yield text
        if size < 0:
            return


def bpe(texts: list[str], vocab_size: int, directory: Path) -> None:
    """Byte-level BPE after Llama 3's splitting."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(_LLAMA_3), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|end_of_text|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), min_frequency=1,
    )  # fmt: skip
    made.train_from_iterator(texts, trainer)
    directory.mkdir(parents=True)
    made.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|end_of_text|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def tokenizers_in(directory: Path, texts: list[str]) -> Iterator[tuple[str, Tokenizer]]:
    """The three, from ``directory``, where those that are not there are made."""
    piece = directory / "sentencepiece-32k"
    if not piece.exists():
        train_tokenizer(texts[:400], 32_000, where="benchmark").save(piece)
    yield "SentencePiece 32k", load_tokenizer(piece)
    for name, size in (("32k", 32_000), ("128k", 128_000)):
        place = directory / f"bpe-{name}"
        if not place.exists():
            more = of_packages(24_000_000) if size > 100_000 else ()
            bpe([*texts, *more], size, unfinished(place))
            os.replace(unfinished(place), place)
        yield f"BPE {name}", HuggingFace(place)


def _begin(directory: Path, texts: list[str] | None) -> None:
    global _own
    os.environ["RAYON_NUM_THREADS"] = "1"
    _own = load_tokenizer(directory), texts


def _bare(part: tuple[int, int]) -> float:
    """Seconds that the library's call takes for its part of the texts."""
    tokenizer, texts = _own
    batch = texts[part[0] :: part[1]]
    begin = time.perf_counter()
    for first in range(0, len(batch), 100):
        some = batch[first : first + 100]
        if isinstance(tokenizer, HuggingFace):
            tokenizer._tokenizer.encode_batch_fast(some, add_special_tokens=False)
        else:
            tokenizer._processor.encode(some, num_threads=1)
    return time.perf_counter() - begin


def _one(line: str) -> list[int]:
    tokenizer, _ = _own
    text = json.loads(line)["text"]
    if isinstance(tokenizer, HuggingFace):
        ids = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    else:
        ids = tokenizer._processor.encode(text)
    return [*ids, tokenizer.eos_id]


class Bench:
    """One tokenizer and one text."""

    def __init__(
        self, directory: Path, texts: list[str], tokenizer: Tokenizer, processes: int
    ) -> None:
        self.directory, self.processes, self.tokenizer = directory, processes, tokenizer
        self.tokens = directory / "tokenizer"
        shutil.rmtree(self.tokens, ignore_errors=True)
        tokenizer.save(self.tokens)
        context = multiprocessing.get_context("spawn")
        self._bare = context.Pool(processes, _begin, (self.tokens, texts))
        self._pool = context.Pool(processes, _begin, (self.tokens, None))

    def close(self) -> None:
        """End the processes."""
        for pool in (self._bare, self._pool):
            pool.terminate()
            pool.join()

    def bare(self) -> float:
        """Seconds of the slowest process."""
        parts = [(i, self.processes) for i in range(self.processes)]
        return max(self._bare.map(_bare, parts, 1))

    def ours(self, processes: int) -> float:
        """Seconds without the start of processes."""
        start = 0.0
        if processes > 1:
            begin = time.perf_counter()
            list(run_all(abs, range(processes), workers=processes, setup=set_up,
                         arguments=(self.tokens, 1)))  # fmt: skip
            start = time.perf_counter() - begin
        out, file = self.directory / "out", self.directory / "text.jsonl"
        shutil.rmtree(out, ignore_errors=True)
        domain = Domain(train=(str(file),), valid=(str(file),))
        text = DomainText("a", domain, {"train": [[file]], "valid": [[file]]}, out)
        jobs = [job for job in tokenize.jobs(text, out / "a") if job.splits == ("train",)]
        tokenize.SHARD = file.stat().st_size // (processes * 6)
        tokenize.cores = lambda: processes
        begin = time.perf_counter()
        tokenize.run(jobs, self.tokens, self.tokenizer, no_progress)
        return time.perf_counter() - begin - start

    def cpu(self) -> float:
        """Seconds of CPU so far, of this process, those that it has awaited and the pool's."""
        spent = os.times()
        pool = (Path(f"/proc/{process.pid}/stat").read_text() for process in self._pool._pool)  # type: ignore[attr-defined]
        ticks = sum(sum(map(int, text.rpartition(")")[2].split()[11:13])) for text in pool)
        return sum(spent[:4]) + ticks / os.sysconf("SC_CLK_TCK")

    def one_by_one(self) -> float:
        """Seconds."""
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        dtype = DType.optimal_dtype(self.tokenizer.vocab_size)
        begin = time.perf_counter()
        builder = IndexedDatasetBuilder(str(self.directory / "theirs.bin"), dtype=dtype)
        with (self.directory / "text.jsonl").open(encoding="utf-8") as lines:
            for ids in self._pool.imap(_one, lines, 32):
                builder.add_document(np.array(ids, dtype), [len(ids)])
        builder.finalize(str(self.directory / "theirs.idx"))
        return time.perf_counter() - begin

    def same(self) -> bool:
        """Whether ours and one by one wrote the same ids."""
        ours = self.directory / "out" / "a" / "train.bin"
        return ours.read_bytes() == (self.directory / "theirs.bin").read_bytes()


def write_files(directory: Path, texts: list[str]) -> dict[str, Path]:
    """The text in the formats that are read."""
    import gzip

    import pyarrow
    from pyarrow import parquet

    plain = directory / "text.jsonl"
    with plain.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    content = plain.read_bytes()
    files = {name: directory / f"text.{name}" for name in ("parquet", "jsonl.zst", "jsonl.gz")}
    parquet.write_table(pyarrow.table({"text": texts}), files["parquet"], compression="zstd")
    files["jsonl.zst"].write_bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    files["jsonl.gz"].write_bytes(gzip.compress(content))
    return {"jsonl": plain, **files}


def read_all(file: Path) -> float:
    """Seconds of CPU."""
    begin = time.process_time()
    for _ in read_documents([file]):
        pass
    return time.process_time() - begin


def measure(bench: Bench, files: dict[str, Path], size: float, rounds: int) -> dict[str, float]:
    """Medians over the rounds."""
    found: dict[str, list[float]] = {}

    def note(**values: float) -> None:
        for name, value in values.items():
            found.setdefault(name, []).append(value)

    for _ in range(rounds):
        bare, ours = bench.bare(), bench.ours(bench.processes)
        before = bench.cpu()
        theirs = bench.one_by_one()
        their_cpu = bench.cpu() - before
        cpu = time.process_time()
        one = bench.ours(1)
        cpu = time.process_time() - cpu
        note(ours_to_one_by_one_of_cpu=their_cpu / cpu)
        note(bare=size / bare, ours=size / ours, one_by_one=size / theirs, one=size / one)
        note(ours_to_bare=bare / ours, ours_to_one_by_one=theirs / ours, more_to_one=one / ours)
        note(**{f"reading {name}": read_all(file) / cpu for name, file in files.items()})
        assert bench.same()
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokenizers", type=Path, metavar="DIR", help="made once, and kept there")
    parser.add_argument("--train", action="store_true", help="make them, and no more")
    parser.add_argument("--mb", type=float, default=12, help="text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=cores())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    texts = list(documents(int(options.mb * 1e6)))
    size = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory(prefix="btx-prepare-") as place:
        directory = Path(place)
        kept = options.tokenizers or directory / "tokenizers"
        if options.train:
            list(tokenizers_in(kept, texts))
            return
        # In a process of its own: `tokenizers` keeps the number of threads that it began with.
        train = [sys.executable, __file__, "--train", f"--tokenizers={kept}", f"--mb={options.mb}"]
        subprocess.run(train, check=True)
        os.environ["RAYON_NUM_THREADS"] = "1"
        found = list(tokenizers_in(kept, texts))
        files = write_files(directory, texts)
        results = {}
        for name, tokenizer in found:
            bench = Bench(directory, texts, tokenizer, options.processes)
            try:
                figures = measure(bench, files, size, options.rounds)
            finally:
                bench.close()
            results[name] = {"entries": tokenizer.vocab_size, **figures}
            if not options.json:
                print(name, *(f"{key} {value:.3g}" for key, value in results[name].items()),
                      sep="\n  ", flush=True)  # fmt: skip
    if options.json:
        print(
            json.dumps({"mb": size, "processes": options.processes, "results": results}, indent=1)
        )


if __name__ == "__main__":
    main()
