"""Branch-Train-Merge's arithmetic against plain loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_btx.evaluate import btm
from megatron_btx.evaluate.btm_heldout import _documents, cost
from megatron_btx.evaluate.tfidf import TfIdf, sample, words
from megatron_btx.recipe import count
from tests.evaluate import made

CORPORA = {
    "code": ["def loop(index): return index", "return the array index", "print value value"],
    "math": ["the sum of seven and nine", "a prime divides the product"],
    "seed": ["the river in winter", "morning, the bird sang", "return of the winter"],
}


def test_probabilities_are_averaged():
    draw = torch.Generator().manual_seed(0)
    log_probs = torch.randn(3, 4, 5, 7, generator=draw).mul(20).log_softmax(-1)
    weights = torch.rand(3, 4, 5, 1, generator=draw)
    weights = weights / weights.sum(0)
    wanted = (weights.double() * log_probs.double().exp()).sum(0).log()
    found = btm.mixed(log_probs, weights)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), wanted, atol=2e-6)
    assert torch.allclose(found.double().exp().sum(-1), torch.ones(4, 5).double(), atol=1e-6)


def test_no_probability_underflows():
    """exp(-200) is none in fp32; its logarithm is."""
    found = btm.mixed(torch.full((2, 1), -200.0), torch.full((2, 1), 0.5))
    assert found.item() == -200.0
    weights = torch.tensor([[1.0], [0.0]])
    assert btm.mixed(torch.tensor([[-3.0], [-1.0]]), weights).item() == -3.0


@pytest.mark.parametrize("prior", [None, [0.6, 0.3, 0.1]])
def test_posterior_is_bayes_of_the_prefix(prior: list[float] | None):
    draw = torch.Generator().manual_seed(1)
    log_probs = -3 * torch.rand(3, 2, 6, generator=draw)
    found = btm.posterior(log_probs, None if prior is None else torch.tensor(prior))
    for row in range(2):
        for position in range(6):
            joint = []
            for model in range(3):
                value = 1 / 3 if prior is None else prior[model]
                for earlier in range(position):
                    value *= math.exp(log_probs[model, row, earlier].item())
                joint.append(value)
            wanted = [value / sum(joint) for value in joint]
            assert found[:, row, position].tolist() == pytest.approx(wanted, abs=1e-7)


def test_cached_prior_is_the_running_mean_of_btms_code():
    draw = torch.Generator().manual_seed(2)
    log_probs = -torch.rand(2, 5, 8, generator=draw)
    means = btm.posterior(log_probs).mean(-1).T.tolist()  # [sequence][model]
    wanted = means[0]
    for mean in means[1:]:
        wanted = [0.3 * new + 0.7 * old for new, old in zip(mean, wanted, strict=True)]
    assert btm.cached_prior(log_probs).tolist() == pytest.approx(wanted, abs=1e-12)
    assert sum(wanted) == pytest.approx(1)


def test_tf_idf_against_plain_loops():
    index = TfIdf(CORPORA)
    documents = [text for texts in CORPORA.values() for text in texts]
    terms = sorted({word for text in documents for word in words(text)})

    def vector(text: str) -> list[float]:
        found = words(text)
        values = []
        for term in terms:
            df = sum(term in words(document) for document in documents)
            values.append(found.count(term) * (math.log((1 + len(documents)) / (1 + df)) + 1))
        norm = math.sqrt(sum(value**2 for value in values))
        return [value / norm for value in values]

    text = "Return an unknownword index of the winter array, return"
    mine = vector(text)
    for name, similarity in zip(index.names, index.similarity(text), strict=True):
        vectors = [vector(document) for document in CORPORA[name]]
        mean = [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]
        norm = math.sqrt(sum(value**2 for value in mean))
        wanted = sum(a * b for a, b in zip(mine, mean, strict=True)) / norm
        assert similarity == pytest.approx(wanted, abs=1e-12)


def test_tf_idf_against_scikit_learn():
    sklearn = pytest.importorskip("sklearn.feature_extraction.text", reason="no scikit-learn")
    documents = [text for texts in CORPORA.values() for text in texts]
    theirs = sklearn.TfidfVectorizer().fit(documents)
    index = TfIdf(CORPORA)
    text = "return the unknownword array, return"
    for name, similarity in zip(index.names, index.similarity(text), strict=True):
        mean = np.asarray(theirs.transform(CORPORA[name]).mean(axis=0))[0]
        wanted = theirs.transform([text]).toarray()[0] @ mean / np.linalg.norm(mean)
        assert similarity == pytest.approx(wanted, abs=1e-12)


def test_most_similar_first_and_the_seed_where_nothing_is_known():
    index = TfIdf(CORPORA)
    similarity = np.stack([index.similarity("array index"), index.similarity("zzz")])
    assert btm.top_weights(similarity, 1).tolist() == [[1, 0, 0], [0, 0, 1]]
    assert btm.top_weights(similarity, 2)[1].tolist() == [0, 0.5, 0.5]
    assert btm.top_weights(similarity, 2).sum(1).tolist() == [1, 1]


def test_a_choice_sees_the_prefix_alone():
    """Each position's weights are those of some prefix that ends there or before."""
    index = TfIdf(CORPORA)
    text = ["river", "winter", "def", "loop", "index", "index", "array", "return", "return"]
    ids = torch.arange(len(text))

    def decode(known):
        return " ".join(text[i] for i in known)

    found = btm.chosen_weights(index, ids, decode, k=1, every=4)
    points = btm.choice_points(len(text), every=4)
    assert points == [0, 1, 3, 7]
    assert btm.choice_points(20, every=4) == [0, 1, 3, 7, 11, 15, 19]
    for position in range(len(text)):
        known = max(point for point in points if point <= position)
        best = int(np.argmax(index.similarity(decode(range(known + 1)))))
        assert found[:, position].argmax() == best
    whole = btm.chosen_weights(index, ids, decode, k=1, context="document")
    assert whole.argmax(0).tolist() == [0] * len(text)  # code
    assert found[:, 0].tolist() == [0, 0, 1]


@pytest.mark.parametrize(("most", "places"), [(5, [0, 2, 4, 6, 8]), (4, [0, 2, 5, 7]), (99, None)])
def test_documents_of_several_pairs_at_even_distances(tmp_path, most, places):
    """Of ten documents in two pairs; the end token is no text."""
    spoken = made.tokenizer()
    texts = [f"loop {'value ' * number}" for number in range(10)]
    for name, part in (("a", texts[:3]), ("b", texts[3:])):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.uint16)
        for text in part:
            ids = [*spoken.encode([text])[0].tolist(), spoken.eos_id]
            builder.add_document(torch.tensor(ids), [len(ids)])
        builder.finalize(str(tmp_path / f"{name}.idx"))
    found = list(_documents([tmp_path / "a", tmp_path / "b"], spoken, most))
    assert found == [texts[at] for at in (range(10) if places is None else places)]


def test_documents_are_drawn_evenly():
    import random

    counts = [0] * 10
    for seed in range(2000):
        for text in sample(map(str, range(10)), 3, random.Random(seed)):
            counts[int(text)] += 1
    assert min(counts) > 520  # 600 expected, standard deviation 20
    assert max(counts) < 680


def test_cost_counts_the_models_that_run():
    one = made.random_model(made.tokenizer(), 0).architecture
    flops = count.forward_flops_per_token(one)
    for method, ran in (("top1", 1), ("top2", 2), ("posterior", 4)):
        found = cost([one] * 4, method)
        assert found.models_per_token == ran
        assert found.inference_flops_per_token == ran * flops
        assert found.params_active == ran * count.parameters(one).active
        assert found.params_total == 4 * count.parameters(one).total
