"""tf-idf vectors of texts, and how like a text is to the text that each model was trained on.

Branch-Train-MiX selects BTM's experts so (arXiv 2403.07816, section 4.1.2): "the cosine similarity
between the context and the expert's mean tf-idf vector". It does not say more; what it leaves open
is what scikit-learn's ``TfidfVectorizer`` does by default: words of two characters and more in
lower case, ``idf = ln((1 + n) / (1 + df)) + 1``, vectors of length one. Imports no torch.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

DOCUMENTS = 4096
"""Documents of each model's training text that are looked at: drawn evenly from all of it."""

_WORD = re.compile(r"\b\w\w+\b")


def words(text: str) -> list[str]:
    """The terms of a text."""
    return _WORD.findall(text.lower())


class TfIdf:
    """The mean tf-idf vector of each model's training text; the idf is that of all texts together.

    Args:
        corpora: model -> its training documents, read once.
        documents: at most so many of each are used, drawn evenly.
        random_seed: of that draw.
    """

    def __init__(
        self,
        corpora: Mapping[str, Iterable[str]],
        *,
        documents: int = DOCUMENTS,
        random_seed: int = 0,
    ) -> None:
        self.names = tuple(corpora)
        self.vocabulary: dict[str, int] = {}
        counted: list[list[tuple[np.ndarray, np.ndarray]]] = []
        for name, texts in corpora.items():
            chosen = sample(texts, documents, random.Random(f"{random_seed}/{name}"))
            counted.append([self._learn(text) for text in chosen])
        everything = list(itertools.chain.from_iterable(counted))
        frequency = np.zeros(len(self.vocabulary))
        for terms, _ in everything:
            frequency[terms] += 1
        self.idf = np.log((1 + len(everything)) / (1 + frequency)) + 1
        self.means = np.stack([self._mean(documents) for documents in counted])
        """Unit vectors [models, terms]: the direction of the means, all that a cosine sees."""
        self.empty = [
            name for name, mean in zip(self.names, self.means, strict=True) if not mean.any()
        ]
        """Models whose text has no word."""

    def similarity(self, text: str) -> np.ndarray:
        """Cosine of a text's vector with each model's mean, float64 [models]; 0 where the text has
        no known word."""
        found: Counter[int] = Counter()
        for word in words(text):
            if (term := self.vocabulary.get(word)) is not None:
                found[term] += 1
        if not found:
            return np.zeros(len(self.names))
        terms = np.fromiter(found.keys(), np.int64)
        values = self._vector(terms, np.fromiter(found.values(), np.float64))
        return self.means[:, terms] @ values

    def _learn(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Terms of a text and how often each occurs."""
        counts = Counter(words(text))
        terms = [self.vocabulary.setdefault(word, len(self.vocabulary)) for word in counts]
        return np.array(terms, np.int64), np.fromiter(counts.values(), np.float64)

    def _mean(self, documents: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        total = np.zeros(len(self.vocabulary))
        for terms, counts in documents:
            total[terms] += self._vector(terms, counts)
        return total / (np.linalg.norm(total) or 1.0)

    def _vector(self, terms: np.ndarray, counts: np.ndarray) -> np.ndarray:
        values = counts * self.idf[terms]
        return values / (np.linalg.norm(values) or 1.0)


def sample(texts: Iterable[str], most: int, draw: random.Random) -> list[str]:
    """At most ``most`` of a stream of texts, each as likely as any other (Vitter's algorithm R)."""
    kept: list[str] = []
    for index, text in enumerate(texts):
        if len(kept) < most:
            kept.append(text)
        elif (place := draw.randrange(index + 1)) < most:
            kept[place] = text
    return kept
