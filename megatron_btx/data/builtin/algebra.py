"""Problems of algebra and calculus for the built-in mathematics (:mod:`.mathematics`), and how a
worked problem is written and checked."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import isqrt
from random import Random

import sympy
from sympy.polys.domains import QQ, ZZ
from sympy.polys.matrices import DomainMatrix
from sympy.polys.rings import ring


def check(ours: object, sympys: object) -> None:
    """That SymPy finds what we found."""
    assert ours == sympys, f"{ours} is not SymPy's {sympys}"


def steps(r: Random, task: str, lines: list[str], answer: str) -> str:
    """A problem's text: the task, the steps to the answer, the answer."""
    opening = r.choice(("Problem: ", "Question. ", "", "Exercise: ", "Q: "))
    middle = r.choice(("Solution.", "Step by step:", "We work it out.", "Solution:", "A:"))
    closing = r.choice(("Answer: {}", "The answer is {}.", "So the result is {}.", "Result: {}"))
    return "\n".join((opening + task, middle, *lines, closing.format(answer))) + "\n"


def frac(value: Fraction | int) -> str:
    """A number as it is written: ``3``, ``-7/2``."""
    value = Fraction(value)
    whole = value.denominator == 1
    return str(value.numerator) if whole else f"{value.numerator}/{value.denominator}"


_X_RING = ring("x", QQ)[0]
Poly = list[Fraction]
"""Coefficients from the constant term upwards."""


def _poly(p: Poly, x: str = "x") -> str:
    out = ""
    for power in range(len(p) - 1, -1, -1):
        c = p[power]
        if c == 0:
            continue
        size = abs(c)
        number = frac(size) if size != 1 or power == 0 else ""
        if size.denominator != 1:
            number = f"({number})"
        term = number + ("" if power == 0 else x if power == 1 else f"{x}^{power}")
        out += (" - " if c < 0 else " + ") + term if out else ("-" if c < 0 else "") + term
    return out or "0"


def _random_poly(r: Random, degree: int, size: int = 12) -> Poly:
    lead = r.choice([c for c in range(-size, size + 1) if c])
    return [Fraction(r.randint(-size, size)) for _ in range(degree)] + [Fraction(lead)]


def _times(p: Poly, q: Poly) -> Poly:
    out = [Fraction(0)] * (len(p) + len(q) - 1)
    for i, a in enumerate(p):
        for j, b in enumerate(q):
            out[i + j] += a * b
    return out


def _value(p: Poly, x: Fraction | int) -> Fraction:
    total = Fraction(0)
    for c in reversed(p):
        total = total * x + c
    return total


def _derived(p: Poly) -> Poly:
    return [c * i for i, c in enumerate(p)][1:] or [Fraction(0)]


def _integrated(p: Poly) -> Poly:
    return [Fraction(0), *(c / (i + 1) for i, c in enumerate(p))]


def _element(p: Poly):  # type: ignore[no-untyped-def]  # SymPy is untyped
    items = {(i,): QQ(c.numerator, c.denominator) for i, c in enumerate(p) if c}
    return _X_RING.from_dict(items)


def _linear(r: Random) -> str:
    a, c = r.sample([n for n in range(-39, 40) if n], 2)
    x = Fraction(r.randint(-60, 60), r.choice((1, 1, 1, 2, 3, 4, 5)))
    b = r.randint(-199, 199)
    d = a * x + b - c * x
    v = r.choice("xyztuwn")
    line = sympy.Poly([a - c, b - sympy.Rational(d.numerator, d.denominator)], sympy.Symbol(v))
    (root,) = line.ground_roots()
    check((x.numerator, x.denominator), (int(root.p), int(root.q)))
    left, right = _poly([Fraction(b), Fraction(a)], v), _poly([d, Fraction(c)], v)
    start, end = r.choice((("Subtract", "from both sides"), ("Move", "to the left")))
    lines = [
        f"{start} {_poly([Fraction(0), Fraction(c)], v)} {end}: "
        f"{_poly([Fraction(b), Fraction(a - c)], v)} = {frac(d)}.",
        f"Then take {b} away: {_poly([Fraction(0), Fraction(a - c)], v)} = {frac(d - b)}.",
    ]
    if a - c != 1:
        lines.append(f"Divide by {a - c}: {v} = {frac(x)}.")
    lines.append(f"Check: both sides are {frac(a * x + b)} for {v} = {frac(x)}.")
    task = f"{r.choice(('Solve', 'Solve for ' + v + ':', 'Find ' + v + ' if'))} {left} = {right}."
    return steps(r, task, lines, f"{v} = {frac(x)}")


def _quadratic(r: Random) -> str:
    p, q = r.randint(-35, 35), r.randint(-35, 35)
    a = r.choice((1, 1, 2, 3, -1, 5))
    b, c = -a * (p + q), a * p * q
    disc = b * b - 4 * a * c
    root = isqrt(disc)
    poly = [Fraction(c), Fraction(b), Fraction(a)]
    check(_element(poly), _element(_times([Fraction(-p), Fraction(1)],
                                           [Fraction(-a * q), Fraction(a)])))  # fmt: skip
    check(sympy.discriminant(sympy.Poly([a, b, c], sympy.Symbol("x"))), disc)
    lines = [
        f"Here a = {a}, b = {b} and c = {c}.",
        f"The discriminant is {b}^2 - 4 * {a} * {c} = {b * b} - ({4 * a * c}) = {disc}.",
        f"Its square root is {root}, so x = ({-b} ± {root}) / {2 * a}.",
        f"With plus: {-b + root} / {2 * a} = {frac(Fraction(-b + root, 2 * a))}.",
        f"With minus: {-b - root} / {2 * a} = {frac(Fraction(-b - root, 2 * a))}.",
    ]
    task = f"{r.choice(('Solve', 'Find the roots of', 'Find all x with'))} {_poly(poly)} = 0."
    answer = f"x = {p}" if p == q else f"x = {min(p, q)} or x = {max(p, q)}"
    return steps(r, task, lines, answer)


def _system(r: Random) -> str:
    x, y = r.randint(-40, 40), r.randint(-40, 40)
    while True:
        a, b, c, d = (r.choice([n for n in range(-15, 16) if n]) for _ in range(4))
        if a * d != b * c:
            break
    e, f = a * x + b * y, c * x + d * y
    matrix = DomainMatrix([[QQ(a), QQ(b)], [QQ(c), QQ(d)]], (2, 2), QQ)
    found = matrix.lu_solve(DomainMatrix([[QQ(e)], [QQ(f)]], (2, 1), QQ)).to_list_flat()
    check([x, y], [int(v) for v in found])
    det = a * d - b * c
    first, second = f"{a}x + ({b})y = {e}", f"{c}x + ({d})y = {f}"
    lines = [
        f"Multiply the first by {d}: {a * d}x + ({b * d})y = {e * d}.",
        f"Multiply the second by {b}: {b * c}x + ({b * d})y = {f * b}.",
        f"Subtract: {det}x = {e * d - f * b}, so x = {x}.",
        f"Put it in: {a} * ({x}) + ({b})y = {e}, so ({b})y = {e - a * x} and y = {y}.",
    ]
    return steps(r, f"Solve the system {first} and {second}.", lines, f"x = {x}, y = {y}")


def _derivative(r: Random) -> str:
    p = _random_poly(r, r.randint(2, 5))
    at = r.randint(-6, 6)
    d = _derived(p)
    check(_element(d), _element(p).diff(_X_RING.gens[0]))
    rules = [
        f"d/dx {_poly([Fraction(0)] * i + [c])} = {_poly([Fraction(0)] * (i - 1) + [c * i])}"
        for i, c in reversed(list(enumerate(p)))
        if i and c
    ]
    value = _value(d, at)
    f = r.choice("fghpq")
    task = f"Let {f}(x) = {_poly(p)}. Find {f}'(x) and {f}'({at})."
    lines = [*rules, f"Together {f}'(x) = {_poly(d)}.", f"At x = {at} this is {frac(value)}."]
    return steps(r, task, lines, f"{f}'({at}) = {frac(value)}")


def _product_rule(r: Random) -> str:
    p, q = _random_poly(r, r.randint(1, 2), 9), _random_poly(r, r.randint(1, 3), 9)
    dp, dq = _derived(p), _derived(q)
    one, two = _times(dp, q), _times(p, dq)
    size = max(len(one), len(two))
    both = [
        (one[i] if i < len(one) else Fraction(0)) + (two[i] if i < len(two) else Fraction(0))
        for i in range(size)
    ]
    check(_element(both), (_element(p) * _element(q)).diff(_X_RING.gens[0]))
    lines = [
        f"With u = {_poly(p)} and v = {_poly(q)}: u' = {_poly(dp)}, v' = {_poly(dq)}.",
        f"u'v = {_poly(one)}",
        f"uv' = {_poly(two)}",
        f"(uv)' = u'v + uv' = {_poly(both)}",
    ]
    task = f"Differentiate ({_poly(p)})({_poly(q)}) by the product rule."
    return steps(r, task, lines, _poly(both))


def _integral(r: Random) -> str:
    p = _random_poly(r, r.randint(1, 4), 15)
    low = r.randint(-5, 4)
    high = low + r.randint(1, 6)
    whole = _integrated(p)
    check(_element(p), _element(whole).diff(_X_RING.gens[0]))
    top, bottom = _value(whole, high), _value(whole, low)
    lines = [
        f"An antiderivative is F(x) = {_poly(whole)}.",
        f"F({high}) = {frac(top)}",
        f"F({low}) = {frac(bottom)}",
        f"F({high}) - F({low}) = {frac(top)} - ({frac(bottom)}) = {frac(top - bottom)}",
    ]
    task = f"Integrate {_poly(p)} from x = {low} to x = {high}."
    return steps(r, task, lines, frac(top - bottom))


def _expand(r: Random) -> str:
    p, q = _random_poly(r, r.randint(1, 2), 14), _random_poly(r, r.randint(1, 3), 14)
    v = r.choice("xyzt")
    out = _times(p, q)
    check(_element(out), _element(p) * _element(q))
    lines = [
        f"{_poly([Fraction(0)] * i + [c], v)} times {_poly(q, v)} is "
        f"{_poly([Fraction(0)] * i + [c * d for d in q], v)}"
        for i, c in reversed(list(enumerate(p)))
        if c
    ]
    return steps(r, f"Expand ({_poly(p, v)})({_poly(q, v)}).", lines, _poly(out, v))


def _polynomial_division(r: Random) -> str:
    q, root = _random_poly(r, r.randint(2, 3), 12), r.randint(-9, 9)
    rest = Fraction(r.randint(-40, 40))
    p = _times(q, [Fraction(-root), Fraction(1)])
    p[0] += rest
    quotient, remainder = _element(p).div(_element([Fraction(-root), Fraction(1)]))
    check((_element(q), _element([rest])), (quotient, remainder))
    lines, carry = [], Fraction(0)
    for c in reversed(p):
        lines.append(f"{frac(c)} + ({root}) * ({frac(carry)}) = {frac(c + root * carry)}")
        carry = c + root * carry
    divisor = _poly([Fraction(-root), Fraction(1)])
    answer = f"{_poly(q)}, remainder {frac(rest)}"
    return steps(r, f"Divide {_poly(p)} by {divisor} (Horner's scheme).", lines, answer)


def _limit(r: Random) -> str:
    a, p = r.randint(-25, 25), _random_poly(r, 1, 15)
    b = r.choice([n for n in range(-25, 26) if n != a])
    top = _times(p, [Fraction(-a), Fraction(1)])
    bottom = _times([Fraction(-b), Fraction(1)], [Fraction(-a), Fraction(1)])
    value = _value(p, a) / (a - b)
    common = _element(top).gcd(_element(bottom))
    check(common.evaluate(0, QQ(a)), QQ(0))
    left, right = _poly(p), _poly([Fraction(-b), Fraction(1)])
    lines = [
        f"At x = {a} both are 0, so x - ({a}) divides them.",
        f"Numerator: (x - ({a}))({left}). Denominator: (x - ({a}))({right}).",
        f"What is left is ({left}) / ({right}).",
        f"Put in x = {a}: {frac(_value(p, a))} / {a - b} = {frac(value)}.",
    ]
    task = f"Find the limit of ({_poly(top)}) / ({_poly(bottom)}) as x goes to {a}."
    return steps(r, task, lines, frac(value))


def _matrix_product(r: Random) -> str:
    a = [[r.randint(-19, 19) for _ in range(2)] for _ in range(2)]
    b = [[r.randint(-19, 19) for _ in range(2)] for _ in range(2)]
    out = [[sum(a[i][k] * b[k][j] for k in range(2)) for j in range(2)] for i in range(2)]
    left, right = (DomainMatrix([[ZZ(v) for v in row] for row in m], (2, 2), ZZ) for m in (a, b))
    check([v for row in out for v in row], [int(v) for v in (left * right).to_list_flat()])
    lines = [
        f"Row {i + 1}, column {j + 1}: {a[i][0]} * {b[0][j]} + {a[i][1]} * {b[1][j]} = {out[i][j]}"
        for i in range(2)
        for j in range(2)
    ]
    det = a[0][0] * a[1][1] - a[0][1] * a[1][0]
    lines.append(f"The determinant of the first one is {det}.")
    return steps(r, f"Multiply the matrices {a} and {b}.", lines, str(out))


def _determinant(r: Random) -> str:
    m = [[r.randint(-12, 12) for _ in range(3)] for _ in range(3)]
    (a, b, c), (d, e, f), (g, h, i) = m
    x, y, z = e * i - f * h, d * i - f * g, d * h - e * g
    det = a * x - b * y + c * z
    check(det, int(DomainMatrix([[ZZ(v) for v in row] for row in m], (3, 3), ZZ).det()))
    lines = [
        f"Expand along the first row ({a}, {b}, {c}).",
        f"({e}) * ({i}) - ({f}) * ({h}) = {x}",
        f"({d}) * ({i}) - ({f}) * ({g}) = {y}",
        f"({d}) * ({h}) - ({e}) * ({g}) = {z}",
        f"({a}) * ({x}) - ({b}) * ({y}) + ({c}) * ({z}) = {det}",
    ]
    return steps(r, f"Find the determinant of {m}.", lines, str(det))


def _complex(r: Random) -> str:
    a, b, c, d = (r.choice([n for n in range(-29, 30) if n]) for _ in range(4))
    real, imaginary = a * c - b * d, a * d + b * c
    norm = c * c + d * d
    gaussian = sympy.ZZ_I(a, b) * sympy.ZZ_I(c, d)
    check((real, imaginary), (int(gaussian.x), int(gaussian.y)))
    lines = [
        f"Multiply out: {a} * {c} + {a} * ({d})i + ({b}) * {c} * i + ({b}) * ({d}) * i^2.",
        f"Since i^2 = -1, the real part is {a * c} - ({b * d}) = {real}.",
        f"The imaginary part is {a * d} + ({b * c}) = {imaginary}.",
        f"The norm of the second factor is {c}^2 + ({d})^2 = {norm}.",
    ]
    task = f"Multiply the complex numbers ({a} + ({b})i) and ({c} + ({d})i)."
    return steps(r, task, lines, f"{real} + ({imaginary})i")


FAMILIES: tuple[Callable[[Random], str], ...] = (
    _linear,
    _quadratic,
    _system,
    _derivative,
    _product_rule,
    _integral,
    _expand,
    _polynomial_division,
    _limit,
    _matrix_product,
    _determinant,
    _complex,
)
