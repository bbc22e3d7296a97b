"""Mathematics worked out step by step: every problem drawn from a named seed, checked by SymPy.

Each family is a function of a random generator that writes one problem with its solution, computed
with plain integers and fractions, and checked against SymPy's own algorithms. No sentence has many
words in a row without a number of its own, so that problems seldom share a long run of words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from math import comb, gcd, isqrt, lcm, prod
from random import Random

import sympy

from megatron_btx.data.builtin import algebra
from megatron_btx.data.builtin.algebra import check, frac, steps


def problems(name: str) -> Iterator[str]:
    """An endless stream of solved problems, the same for the same ``name``.

    Raises:
        AssertionError: SymPy disagrees with a solution.
    """
    random = Random(name)  # a string seeds by its SHA-512, the same in every process
    while True:
        yield random.choice(FAMILIES)(random)


def _arithmetic(r: Random) -> str:
    a, b, c, d = (r.randint(11, 989) for _ in range(4))
    e = r.randint(2, 29)
    inner, product = c - d, e * (c - d)
    total = a + b + product
    x = sympy.Integer
    check(total, int(x(a) + x(b) + x(e) * (x(c) - x(d))))
    return steps(
        r,
        f"{r.choice(('Evaluate', 'Compute', 'Find the value of'))} {a} + {b} + {e} * ({c} - {d}).",
        [
            f"The parentheses come first: {c} - {d} = {inner}.",
            f"Then the product: {e} * {inner} = {product}.",
            f"From left to right: {a} + {b} = {a + b}, and {a + b} + ({product}) = {total}.",
        ],
        str(total),
    )


def _multiplication(r: Random) -> str:
    a, b = r.randint(103, 9897), r.randint(12, 987)
    digits = [(int(d), 10**i) for i, d in enumerate(reversed(str(b))) if d != "0"]
    lines, sums = [], 0
    for digit, power in digits:
        part = a * digit * power
        lines.append(f"{a} * {digit * power} = {part}" + (f", {sums} + {part} = {sums + part}"
                                                          if sums else ""))  # fmt: skip
        sums += part
    check(sums, int(sympy.Integer(a) * sympy.Integer(b)))
    parts = " + ".join(str(d * p) for d, p in reversed(digits))
    task = r.choice((f"Multiply {a} by {b}.", f"What is {a} * {b}?", f"Work out {a} times {b}."))
    return steps(r, task, [f"Write {b} = {parts}.", *lines], f"{a} * {b} = {sums}")


def _division(r: Random) -> str:
    a, b = r.randint(10_000, 999_999), r.randint(13, 97)
    lines, rest = [], 0
    for i, digit in enumerate(str(a)):
        rest = rest * 10 + int(digit)
        if rest >= b:
            times = rest // b
            lines.append(f"{b} goes {times} times into {rest}: {rest} - {times * b} = "
                         f"{rest - times * b} (digit {i + 1}).")  # fmt: skip
            rest -= times * b
    quotient, remainder = divmod(sympy.Integer(a), sympy.Integer(b))
    check((a // b, rest), (int(quotient), int(remainder)))
    lines.append(f"Check: {b} * {a // b} + {rest} = {a}.")
    task = f"Divide {a} by {b}, with remainder."
    return steps(r, task, lines, f"{a // b} remainder {rest}")


def _fractions(r: Random) -> str:
    a, c = r.randint(1, 60), r.randint(1, 60)
    b, d = r.randint(2, 48), r.randint(2, 48)
    common = lcm(b, d)
    sign = r.choice((1, -1))
    op = "+" if sign > 0 else "-"
    left, right = a * common // b, c * common // d
    result = Fraction(a, b) + sign * Fraction(c, d)
    found = sympy.Rational(a, b) + sign * sympy.Rational(c, d)
    check((result.numerator, result.denominator), (int(found.p), int(found.q)))
    shared = gcd(left + sign * right, common)
    lines = [
        f"The least common multiple of {b} and {d} is {common}.",
        f"{a}/{b} = {left}/{common} and {c}/{d} = {right}/{common}.",
        f"{left} {op} {right} = {left + sign * right}, which gives {left + sign * right}/{common}.",
    ]
    if shared > 1:
        lines.append(f"Both are divisible by {shared}: {frac(result)}.")
    task = f"{r.choice(('Simplify', 'Calculate', 'Write as one fraction'))}: {a}/{b} {op} {c}/{d}."
    return steps(r, task, lines, frac(result))


def _factor(r: Random) -> str:
    primes = (2, 2, 2, 3, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61)
    n = prod(r.choice(primes) for _ in range(r.randint(3, 6)))
    rest, p = n, 2
    lines: list[str] = []
    counts: dict[int, int] = {}
    while rest > 1:
        while rest % p == 0:
            lines.append(f"{rest} = {p} * {rest // p}")
            counts[p] = counts.get(p, 0) + 1
            rest //= p
        p += 1
    check(counts, sympy.factorint(n))
    written = " * ".join(f"{p}^{e}" if e > 1 else str(p) for p, e in counts.items())
    divisors = prod(e + 1 for e in counts.values())
    lines.append(f"It has {' * '.join(str(e + 1) for e in counts.values())} = {divisors} divisors.")
    verb = r.choice(("Factor", "Find the prime factors of", "Decompose"))
    return steps(r, f"{verb} {n}.", lines, f"{n} = {written}")


def _euclid(r: Random) -> str:
    scale = r.randint(1, 60)
    a, b = scale * r.randint(20, 900), scale * r.randint(20, 900)
    lines, x, y = [], max(a, b), min(a, b)
    s, t, u, v = 1, 0, 0, 1
    while y:
        q = x // y
        lines.append(f"{x} = {q} * {y} + {x % y}")
        x, y, s, t, u, v = y, x % y, t, s - q * t, v, u - q * v
    g, big, small = x, max(a, b), min(a, b)
    check(g, int(sympy.igcd(a, b)))
    check(g, s * big + u * small)
    lines.append(f"Backwards: {g} = ({s}) * {big} + ({u}) * {small}.")
    lines.append(f"The least common multiple is {a} * {b} / {g} = {lcm(a, b)}.")
    task = f"Find the greatest common divisor of {a} and {b} by Euclid's algorithm."
    return steps(r, task, lines, f"gcd({a}, {b}) = {g}")


def _series(r: Random) -> str:
    a, d, n = r.randint(-90, 190), r.choice((*range(-25, 0), *range(1, 26))), r.randint(8, 120)
    last = a + (n - 1) * d
    total = n * (a + last) // 2
    check(total, int(sympy.Rational(n, 2) * (2 * sympy.Integer(a) + (n - 1) * d)))
    shown = ", ".join(str(a + i * d) for i in range(4))
    lines = [
        f"The difference is {a + d} - ({a}) = {d}.",
        f"Term {n} is {a} + {n - 1} * ({d}) = {last}.",
        f"The sum is {n} * ({a} + {last}) / 2 = {n} * {a + last} / 2 = {total}.",
    ]
    return steps(r, f"Add the first {n} terms of {shown}, ...", lines, str(total))


def _geometric(r: Random) -> str:
    a, q, n = r.randint(2, 99), r.choice((2, 3, 4, 5, -2, -3)), r.randint(4, 11)
    terms = [a * q**i for i in range(n)]
    total = a * (q**n - 1) // (q - 1)
    check(total, int(sum(map(sympy.Integer, terms))))
    lines = [
        f"The terms are {', '.join(map(str, terms[: r.randint(4, n)]))} and so on.",
        f"{q}^{n} = {q**n}, so the sum is {a} * ({q**n} - 1) / ({q} - 1).",
        f"That is {a} * {q**n - 1} / {q - 1} = {total}.",
    ]
    task = f"A geometric series starts at {a} with ratio {q}. Add its first {n} terms."
    return steps(r, task, lines, str(total))


def _modular_power(r: Random) -> str:
    base, exponent, modulus = r.randint(2, 99), r.randint(20, 900), r.randint(11, 499)
    lines, result, square = [], 1, base % modulus
    for i, bit in enumerate(reversed(bin(exponent)[2:])):
        if i:
            lines.append(f"{base}^{2**i} = {square}^2 = {square * square % modulus}")
            square = square * square % modulus
        if bit == "1":
            result = result * square % modulus
            lines.append(f"bit {i} of {exponent} is set: the product is now {result}")
    check(result, int(sympy.Mod(sympy.Integer(base) ** exponent, modulus)))
    task = f"Find {base}^{exponent} modulo {modulus} by repeated squaring."
    return steps(r, task, [f"In binary {exponent} = {exponent:b}.", *lines], str(result))


_NAMES = (
    "Ada", "Ben", "Cleo", "Dev", "Ema", "Finn", "Gita", "Hugo", "Ines", "Jun", "Kofi", "Lea",
    "Mika", "Nora", "Omar", "Pia", "Quin", "Rosa",
)  # fmt: skip
_THINGS = (
    "apples", "books", "candles", "coins", "pens", "stamps", "tickets", "tiles", "bottles",
    "marbles", "cards", "nails",
)  # fmt: skip


def _shopping(r: Random) -> str:
    name, other = r.sample(_NAMES, 2)
    one, two = r.sample(_THINGS, 2)
    n, m, p, q = r.randint(3, 48), r.randint(3, 48), r.randint(2, 79), r.randint(2, 79)
    off = r.choice((5, 10, 15, 20, 25, 30, 40))
    cost = n * p + m * q
    paid = Fraction(cost * (100 - off), 100)
    found = sympy.Rational(cost) * (1 - sympy.Rational(off, 100))
    check((paid.numerator, paid.denominator), (int(found.p), int(found.q)))
    task = (
        f"{name} buys {n} {one} at {p} cents and {m} {two} at {q} cents. "
        f"{other} has a voucher for {off} percent off. What do they pay?"
    )
    lines = [
        f"The {one} cost {n} * {p} = {n * p} cents, the {two} {m} * {q} = {m * q} cents.",
        f"Together {n * p} + {m * q} = {cost} cents.",
        f"{off} percent of {cost} is {frac(Fraction(cost * off, 100))}.",
        f"{cost} - {frac(Fraction(cost * off, 100))} = {frac(paid)}",
    ]
    return steps(r, task, lines, f"{frac(paid)} cents")


def _travel(r: Random) -> str:
    name, other = r.sample(_NAMES, 2)
    v, w, t = r.randint(11, 95), r.randint(11, 95), r.randint(2, 14)
    distance = (v + w) * t
    check(Fraction(distance, v + w), Fraction(int(sympy.Rational(distance, v + w))))
    task = (
        f"{name} and {other} start {distance} km apart and drive towards each other, "
        f"{name} at {v} km/h, {other} at {w} km/h. When do they meet?"
    )
    lines = [
        f"Every hour they come {v} + {w} = {v + w} km closer.",
        f"{distance} / {v + w} = {t} hours.",
        f"{name} has driven {v} * {t} = {v * t} km, {other} {w} * {t} = {w * t} km.",
        f"Check: {v * t} + {w * t} = {distance}.",
    ]
    return steps(r, task, lines, f"after {t} hours")


def _base(r: Random) -> str:
    n, base = r.randint(500, 99_999), r.choice((2, 3, 5, 6, 7, 8, 9))
    lines, rest, digits = [], n, []
    while rest:
        lines.append(f"{rest} = {rest // base} * {base} + {rest % base}")
        digits.append(rest % base)
        rest //= base
    check(sum(d * base**i for i, d in enumerate(digits)), n)
    check([base, *reversed(digits)], list(map(int, sympy.ntheory.digits(n, base))))
    written = "".join(map(str, reversed(digits)))
    lines.append(f"Read the remainders from the last to the first: {written}.")
    return steps(r, f"Write {n} in base {base}.", lines, written)


def _binomial(r: Random) -> str:
    n = r.randint(7, 40)
    k = r.randint(2, min(6, n - 2))
    top, bottom = [n - i for i in range(k)], list(range(k, 0, -1))
    value = comb(n, k)
    check(value, int(sympy.binomial(n, k)))
    things, name = r.choice(_THINGS), r.choice(_NAMES)
    lines = [
        f"C({n}, {k}) = ({' * '.join(map(str, top))}) / ({' * '.join(map(str, bottom))})",
        f"The numerator is {prod(top)}, the denominator {prod(bottom)}.",
        f"{prod(top)} / {prod(bottom)} = {value}",
    ]
    task = f"{name} has {n} different {things} and picks {k} of them. How many ways are there?"
    return steps(r, task, lines, str(value))


def _statistics(r: Random) -> str:
    data = [r.randint(-30, 150) for _ in range(r.randint(4, 7))]
    n, total = len(data), sum(data)
    mean = Fraction(total, n)
    variance = sum(((x - mean) ** 2 for x in data), Fraction(0)) / n
    found = sympy.Rational(sum(x * x for x in data), n) - sympy.Rational(total, n) ** 2
    check((variance.numerator, variance.denominator), (int(found.p), int(found.q)))
    squares = ", ".join(frac((x - mean) ** 2) for x in data)
    lines = [
        f"The sum is {total} and there are {n} numbers: the mean is {frac(mean)}.",
        f"The squared deviations are {squares}.",
        f"Divided by {n} their sum gives {frac(variance)}.",
        f"Sorted: {sorted(data)}, from {min(data)} to {max(data)}.",
    ]
    task = f"Find mean and variance of {', '.join(map(str, data))}."
    return steps(r, task, lines, f"mean {frac(mean)}, variance {frac(variance)}")


def _primality(r: Random) -> str:
    n = r.randint(200, 9999) | 1
    lines, found = [], 0
    for p in sympy.primerange(3, isqrt(n) + 1):
        lines.append(f"{n} = {p} * {n // p} + {n % p}")
        if n % p == 0:
            found = p
            break
    check(not found, sympy.isprime(n))
    lines = lines if len(lines) <= 8 else [*lines[:4], "and so on up to", *lines[-3:]]
    root = isqrt(n)
    opening = f"It is enough to try odd primes up to {root}, for {root + 1}^2 = {(root + 1) ** 2}."
    answer = f"{n} is {found} times {n // found}, not prime" if found else f"{n} is prime"
    return steps(r, f"Is {n} a prime number?", [opening, *lines], answer)


FAMILIES: tuple[Callable[[Random], str], ...] = (
    _arithmetic,
    _multiplication,
    _division,
    _fractions,
    _factor,
    _euclid,
    _series,
    _geometric,
    _modular_power,
    _shopping,
    _travel,
    _base,
    _binomial,
    _statistics,
    _primality,
    *algebra.FAMILIES,
)
"""Every kind of problem; each is as likely as the others."""
