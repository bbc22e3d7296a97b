"""A box of an expression is that box of the whole, whatever the expression and the box."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_btx.mix.reference.rules import nearest
from megatron_btx.weights.arithmetic import Product
from megatron_btx.weights.arrange import Cast, Cat, Reshape, Take
from megatron_btx.weights.box import contiguous, extent, runs, slabs, whole
from megatron_btx.weights.expression import Expression, rounded
from megatron_btx.weights.ops import item, mean, nbytes, rows, scaled, stack, takes
from megatron_btx.weights.random_fill import Draw, Fill
from megatron_btx.weights.source import MemorySource
from megatron_btx.weights.source import nbytes as nbytes_at

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


def leaf(shape, index: int, dtype=torch.float32) -> Take:
    return Take("memory", f"{index}/{'x'.join(map(str, shape))}", shape, dtype)


def source_of(expression: Expression) -> MemorySource:
    """Every take filled with numbers that its name determines."""
    tensors = {}
    for take in takes(expression):
        generator = torch.Generator().manual_seed(sum(map(ord, take.name)))
        tensors[take.name] = torch.randn(take.shape, generator=generator).to(take.dtype)
    return MemorySource(tensors)


@st.composite
def expressions(draw, shape=None, depth=3):
    """Random expressions, of a given shape where one is asked for."""
    shape = draw(SHAPES) if shape is None else shape
    kinds = ["take", "draw", "fill"]
    if depth:
        kinds += ["slice", "cat", "reshape", "mean", "scaled", "cast", "product"] * 2
    kind = draw(st.sampled_from(kinds))
    if kind == "take":
        return leaf(shape, draw(st.integers(0, 2)))
    if kind == "draw":
        law = draw(st.sampled_from(["normal", "uniform", "keep", "subset"]))
        return Draw(law, 0.5, draw(st.integers(0, 2)), "w", shape, torch.float32)
    if kind == "fill":
        return Fill(draw(st.floats(-2, 2, width=32)), shape, torch.float32)
    below = {"depth": depth - 1}
    if kind == "slice":
        dim = draw(st.integers(0, len(shape) - 1))
        before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        larger = (*shape[:dim], before + shape[dim] + after, *shape[dim + 1 :])
        return rows(draw(expressions(larger, **below)), before, before + shape[dim], dim)
    if kind == "cat":
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, shape[dim] - 1))
        sizes = [size for size in (cut, shape[dim] - cut) if size]
        parts = [draw(expressions((*shape[:dim], n, *shape[dim + 1 :]), **below)) for n in sizes]
        return Cat(tuple(parts), dim)
    if kind == "reshape":
        return Reshape(draw(expressions(draw(same_size(shape)), **below)), shape)
    if kind == "mean":
        parts = [draw(expressions(shape, **below)) for _ in range(draw(st.integers(1, 3)))]
        return mean(parts, torch.float32, [draw(st.integers(1, 3)) for _ in parts])
    if kind == "product":
        thin = tuple(draw(st.sampled_from([1, size])) for size in shape)[draw(st.integers(0, 1)) :]
        parts = [draw(expressions(one, **below)) for one in (shape, thin) if one]
        return Product(tuple(parts), (Fill(0.75, shape[-1:], torch.float32),), torch.float32)
    if kind == "scaled":
        return scaled(draw(expressions(shape, **below)), draw(st.floats(-2, 2)))
    return Cast(Cast(draw(expressions(shape, **below)), torch.bfloat16), torch.float32)


@st.composite
def same_size(draw, shape):
    """Another shape of as many elements."""
    left, out = math.prod(shape), []
    while left > 1 and len(out) < 3:
        factor = draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0]))
        out.append(factor)
        left //= factor
    return (*out, left)


@st.composite
def boxes(draw, shape):
    box = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        box.append((start, draw(st.integers(start + 1, size))))
    return tuple(box)


def read_from(source):
    return lambda _, name, box: source.read(name, box)


@settings(max_examples=300)
@given(st.data())
def test_a_box_is_that_box_of_the_whole(data):
    expression = data.draw(expressions())
    read = read_from(source_of(expression))
    everything = expression.evaluate(whole(expression.shape), read)
    assert tuple(everything.shape) == expression.shape
    assert everything.dtype == expression.dtype
    assert everything.nbytes == nbytes(expression)
    box, source = data.draw(boxes(expression.shape)), source_of(expression)
    part = expression.evaluate(box, read_from(source))
    counted = sum(nbytes_at(source, name, asked) for _, name, asked in expression.reads(box))
    assert counted == source.bytes_read
    assert torch.equal(part, everything[tuple(slice(*ends) for ends in box)])


@settings(max_examples=150)
@given(st.data(), DTYPES)
def test_another_dtype_is_one_rounding_of_the_same_values(data, dtype):
    """Where nothing on the way rounds to fp32, ``to`` equals rounding the exact result once."""
    expression = data.draw(expressions())
    moved = expression.to(dtype)
    assert moved.dtype == dtype
    assert moved.shape == expression.shape
    read = read_from(source_of(expression))
    got = moved.evaluate(whole(moved.shape), read).double()
    want = expression.to(torch.float64).evaluate(whole(expression.shape), read)
    assert torch.equal(got, nearest(want, dtype).double())


@settings(max_examples=200)
@given(st.data())
def test_only_what_a_box_needs_is_read(data):
    """Without arithmetic every element of a box is read exactly once."""
    shape = data.draw(SHAPES)
    base = leaf((*shape, 6), 0)
    expression = Reshape(stack([Reshape(base, (math.prod(shape), 6)), rows(
        Reshape(leaf((math.prod(shape), 8), 1), (math.prod(shape), 8)), 1, 7, 1)]),
        (2, *shape, 2, 3))  # fmt: skip
    source = source_of(expression)
    box = data.draw(boxes(expression.shape))
    expression.evaluate(box, read_from(source))
    assert source.bytes_read == 4 * math.prod(extent(box))
    counted = sum(4 * math.prod(extent(read)) for _, _, read in expression.reads(box))
    assert counted == source.bytes_read


def test_query_key_value_by_group_read_exactly():
    """A tensor-parallel slice of interleaved qkv reads only that slice's rows of q, k and v."""
    groups, per_group, dim, hidden = 4, 2, 8, 16
    q, k, v = leaf((64, hidden), 0), leaf((32, hidden), 1), leaf((32, hidden), 2)
    qkv = Reshape(
        Cat(
            (
                Reshape(q, (groups, per_group, dim, hidden)),
                Reshape(k, (groups, 1, dim, hidden)),
                Reshape(v, (groups, 1, dim, hidden)),
            ),
            1,
        ),
        (128, hidden),
    )
    source = source_of(qkv)
    got = qkv.evaluate(((32, 64), (0, hidden)), read_from(source))
    assert source.bytes_read == 32 * hidden * 4
    want = [source.read(q.name, ((16, 32), (0, hidden)))]
    want += [source.read(other.name, ((8, 16), (0, hidden))) for other in (k, v)]
    assert torch.equal(got, torch.cat(want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 8])
def test_the_mean_of_copies_is_the_original(count, dtype):
    one = leaf((40, 50), 0, dtype)
    for weights in (None, list(range(1, count + 1)), [0.1] * count):
        average = mean([one] * count, dtype, weights)
        read = read_from(source_of(average))
        assert torch.equal(
            average.evaluate(whole((40, 50)), read), read("", one.name, ((0, 40), (0, 50)))
        )


def test_the_mean_is_the_exact_one_rounded_once():
    parts = [leaf((7, 5), index) for index in range(3)]
    weights = [1, 2, 4]
    average = mean(parts, torch.bfloat16, weights)
    read = read_from(source_of(average))
    values = [read("", part.name, whole(part.shape)).flatten().tolist() for part in parts]
    exact = [
        sum(w * Fraction(x) for w, x in zip(weights, column, strict=True)) / 7
        for column in zip(*values, strict=True)
    ]
    want = nearest(torch.tensor([float(x) for x in exact], dtype=torch.float64), torch.bfloat16)
    assert torch.equal(average.evaluate(whole((7, 5)), read).flatten(), want)


HALF = st.sampled_from([torch.bfloat16, torch.float16])


@settings(max_examples=200)
@given(HALF, st.integers(0, 2**31), st.sampled_from([1e-40, 1e-7, 1e-5, 1e-3, 1.0, 1e4]))
def test_fp64_is_rounded_to_the_nearest(dtype, seed, scale):
    """Beside points halfway between two neighbours too, nearer to them than fp32 can tell."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(400, generator=generator, dtype=torch.float64) * scale
    lower = values.to(dtype)
    upper = (lower.view(torch.int16) + 1).view(dtype)  # away from zero
    middle = (lower.double() + upper.double()) / 2
    off = torch.tensor([0, 1e-9, -1e-9, 1e-12, -1e-12], dtype=torch.float64)
    values = torch.cat([values, (middle[:, None] * (1 + off)).flatten()])
    values = values[values.abs() < 6e4]
    found = rounded(values, dtype)
    assert torch.equal(found, nearest(values, dtype))
    if dtype == torch.float16:  # which rounds once
        assert np.array_equal(found.numpy(), values.numpy().astype(np.float16))
    error = (found.double() - values).abs()
    for step in (-1, 1):  # to the left and to the right there is none that is nearer
        beside = (found.view(torch.int16) + step).view(dtype).double()
        further = (beside - values).abs()
        even = found.view(torch.int16) % 2 == 0
        assert ((error < further) | ((error == further) & even) | beside.isnan()).all()


def test_a_mean_beside_the_middle_of_two_bf16_numbers():
    """Of 1 + 2^-7 twice, 2 and 2^-30 it is 2^-32 above the middle of 1 and 1 + 2^-7."""
    ours = [torch.tensor([x]).bfloat16() for x in (1 + 2**-7, 1 + 2**-7, 2.0, 2**-30)]
    source = MemorySource({f"{index}/1": value for index, value in enumerate(ours)})
    parts = [leaf((1,), index, torch.bfloat16) for index in range(4)]
    found = mean(parts, torch.bfloat16).evaluate(whole((1,)), read_from(source))
    assert found.item() == 1.0078125


def test_draws_depend_on_seed_and_name_alone():
    """Blocks of 65536 elements; read through boxes that cross them."""
    draw = Draw("normal", 2.0, 1, "router", (300, 400), torch.float32)
    everything = draw.evaluate(whole(draw.shape), None)
    assert abs(everything.std() - 2.0) < 0.02
    assert abs(everything.mean()) < 0.02
    crossing = draw.evaluate(((150, 180), (90, 300)), None)
    assert torch.equal(crossing, everything[150:180, 90:300])
    other = Draw("normal", 2.0, 2, "router", (300, 400), torch.float32)
    assert not torch.equal(other.evaluate(whole(draw.shape), None), everything)
    flat = Draw("uniform", 1.0, 1, "router", (120000,), torch.float32)
    values = flat.evaluate(whole(flat.shape), None)
    assert values.min() >= -1
    assert values.max() <= 1
    assert abs(values.mean()) < 0.01


def test_a_subset_has_exactly_its_share():
    for seed in range(3):
        draw = Draw("subset", 0.3, seed, "units", (1001,), torch.float64)
        values = draw.evaluate(whole((1001,)), None)
        assert values.sum() == 300
        assert set(values.tolist()) == {0.0, 1.0}
        assert abs(values[:500].sum() - 150) < 40
        assert torch.equal(draw.evaluate(((7, 90),), None), values[7:90])


def test_draws_never_change():
    """Pinned: a mix must be repeatable with another version, on another machine."""
    draw = Draw("normal", 0.02, 1234, "decoder.layers.0.mlp.router.weight", (2, 2), torch.float32)
    got = draw.evaluate(whole((2, 2)), None).flatten().tolist()
    assert got == [
        -0.002496665809303522,
        0.029766593128442764,
        0.004292674828320742,
        0.027001937851309776,
    ]


@settings(max_examples=200)
@given(st.data())
def test_boxes_partition(data):
    shape = data.draw(SHAPES)
    numbers = torch.arange(math.prod(shape)).reshape(shape)
    box = data.draw(boxes(shape))
    index = tuple(slice(*ends) for ends in box)
    pieces = list(slabs(box, data.draw(st.integers(1, 20))))
    assert torch.equal(
        torch.cat([numbers[tuple(slice(*e) for e in piece)].flatten() for piece in pieces]),
        numbers[index].flatten(),
    )
    for start, stop, where in contiguous(shape, box):
        found = numbers[tuple(slice(*ends) for ends in where)].flatten()
        assert found.tolist() == list(range(start, stop))
    start = data.draw(st.integers(0, numbers.numel() - 1))
    stop = data.draw(st.integers(start + 1, numbers.numel()))
    held = [numbers[tuple(slice(*e) for e in run)].flatten() for run in runs(shape, start, stop)]
    assert torch.cat(held).tolist() == list(range(start, stop))
    assert len(held) <= 2 * len(shape) + 1


def test_expressions_print_and_hash():
    a, b = leaf((4, 2), 0), leaf((4, 2), 1)
    made = rows(mean([a, b], torch.bfloat16, [1, 3]), 1, 3)
    assert str(made) == "(memory:0/4x2[1:3, :] + 3*memory:1/4x2[1:3, :])/4"
    assert made == rows(mean([a, b], torch.bfloat16, [1, 3]), 1, 3)
    assert hash(made) != hash(rows(mean([b, a], torch.bfloat16, [1, 3]), 1, 3))
    assert str(item(a, 2)) == "memory:0/4x2[2:3, :].view(2)"


def test_shapes_that_do_not_fit_are_refused():
    a, b = leaf((4, 2), 0), leaf((3, 2), 1)
    with pytest.raises(ValueError, match="concatenate"):
        Cat((a, b), 1)
    with pytest.raises(ValueError, match="sum"):
        mean([a, b], torch.float32)
    with pytest.raises(ValueError, match="view"):
        Reshape(a, (3, 3))
    with pytest.raises(ValueError, match="outside"):
        rows(a, 4, 4)
