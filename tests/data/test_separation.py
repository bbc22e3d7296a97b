"""What training and held-out text share, against plain sets of words."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_btx.cli.main import main
from megatron_btx.data import separation
from megatron_btx.data.overlap import HeldOutRuns
from megatron_btx.data.prepare import check, prepare
from megatron_btx.data.separation import Found, check_separation
from megatron_btx.errors import UserError
from megatron_btx.recipe.load import dump, load_recipe
from megatron_btx.recipe.schema import Domain, Recipe, TokenizerBlock
from tests.data.conftest import TINY
from tests.data.oracle import shared
from tests.data.test_prepare import recipe_of, write
from tests.data.test_shards import pair_of

Prepared = tuple[Recipe, Path]
COMMON = "one two three four five six seven eight nine ten eleven twelve thirteen"


def words(seed: int, number: int, length: int = 60) -> list[str]:
    """Documents that share no run of 13 words."""
    draw = random.Random(seed)
    return [" ".join(str(draw.randrange(10**6)) for _ in range(length)) for _ in range(number)]


def mixed(tmp_path: Path) -> tuple[dict[str, Domain], list[tuple[str, str, str, str, str]]]:
    """Two domains with known faults, and what is to be found."""
    train, valid = words(1, 300), words(2, 40)
    other, held = words(3, 200), words(4, 40)
    train[7] = valid[3]
    train[150] = f"before {COMMON.upper()}, after"
    valid[9] = f"x {COMMON.replace(' ', chr(10))} y"
    other[5] = f"{other[5]} {' '.join(held[11].split()[20:33])}"
    other[6] = f"{other[6]} {' '.join(held[12].split()[20:32])}"  # twelve words may be shared
    other[100] = valid[20]
    a, v = write(tmp_path / "a.jsonl", train), write(tmp_path / "v.jsonl", valid)
    parquet.write_table(pyarrow.table({"text": other}), tmp_path / "b.parquet", row_group_size=30)
    b, w = str(tmp_path / "b.parquet"), write(tmp_path / "w.jsonl", held)
    domains = {"a": Domain(train=(a,), valid=(v,)), "b": Domain(train=(b,), valid=(w,))}
    return domains, [
        ("a", f"{a}:151", "overlap", "a", f"{v}:10"),
        ("a", f"{a}:8", "duplicate", "a", f"{v}:4"),
        ("b", f"{b}, row 101", "duplicate", "a", f"{v}:21"),
        ("b", f"{b}, row 6", "overlap", "b", f"{w}:12"),
    ]


def as_tuples(found: list[Found]) -> list[tuple[str, str, str, str, str]]:
    return sorted(
        (one.domain, one.document, one.kind, one.heldout_domain, one.heldout_document)
        for one in found
    )


@pytest.mark.parametrize(("shard", "cores", "size"), [(1 << 24, 1, 1 << 26), (9000, 2, 9000)])
def test_every_fault_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: int, cores: int, size: int
) -> None:
    """By all cores and in several passes too."""
    monkeypatch.setattr(separation, "_SHARD", shard)
    monkeypatch.setattr(separation, "cores", lambda: cores)
    monkeypatch.setattr(separation, "PASS", size)
    domains, expected = mixed(tmp_path)
    assert as_tuples(list(check_separation(recipe_of(domains), tmp_path / "x"))) == expected


def test_the_index_against_plain_sets(tmp_path: Path) -> None:
    draw = random.Random(8)
    texts = [" ".join(draw.choices("ab", k=draw.randrange(5, 60))) for _ in range(60)]
    held, others = texts[:6], texts[6:]
    index = HeldOutRuns(held)
    index.save(tmp_path)
    for text in others:
        owner = HeldOutRuns.load(tmp_path).owner(text)
        assert owner == index.owner(text)
        assert (owner is None) == (not shared([text], held))
        assert owner is None or shared([text], [held[owner]])


def test_a_split_domain_and_pairs(tmp_path: Path, prepared: Prepared) -> None:
    """Held-out text of a domain without `valid:` is that which `prepare` holds out."""
    documents = words(1, 400)
    recipe = recipe_of({"a": Domain(train=(write(tmp_path / "a.jsonl", documents),))})
    assert not list(check_separation(recipe, tmp_path / "x"))
    twice = [*documents, *(f"{text} more" for text in documents[:200])]
    write(tmp_path / "a.jsonl", twice)
    assert list(check_separation(recipe, tmp_path / "x"))
    pair = pair_of(tmp_path / "p", [*words(5, 20), COMMON], prepared)
    held = write(tmp_path / "v.jsonl", [f"a {COMMON} b"])
    tokenizer = prepared[1] / "prepare" / "tokenizer"
    domain = Domain(train=(pair,), valid=(held,))
    recipe = recipe_of({"a": domain}, tokenizer=TokenizerBlock(path=str(tokenizer)))
    (one,) = check_separation(recipe, tmp_path / "x", tokenizer)
    assert one.document == f"{pair}.idx, document 21"
    with pytest.raises(UserError, match="only the run's tokenizer can decode"):
        list(check_separation(recipe, tmp_path / "x"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit codes, the list, and cleaned text in which nothing is found any more."""
    domains, expected = mixed(tmp_path)
    recipe = load_recipe(TINY)
    text = dump(recipe)
    files = {"code": domains["a"], "math": domains["b"]}
    plain = {name: files.get(name, domains["a"]) for name in recipe.domains}
    written = tmp_path / "recipe.yaml"

    def save(chosen: dict[str, Domain]) -> None:
        import yaml

        tree = yaml.safe_load(text)
        tree["run_dir"] = str(tmp_path / "run")
        tree["domains"] = {
            name: {"train": list(domain.train), "valid": list(domain.valid)}
            for name, domain in chosen.items()
        }
        written.write_text(yaml.safe_dump(tree, sort_keys=False))

    save(plain)
    out, clean = tmp_path / "found.jsonl", tmp_path / "clean"
    command = ["data", "check", str(written), "--out", str(out), "--clean", str(clean)]
    assert main(command) == 1
    assert "1 training documents of math share 13 words with" in capsys.readouterr().out
    (tmp_path / "math.jsonl").symlink_to(plain["math"].train[0])
    for flag, path in (("--clean", tmp_path), ("--out", plain["math"].train[0])):
        assert main([*command[:3], flag, str(path)]) == 2
        assert "is read here, and would be replaced" in capsys.readouterr().err
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert {one["document"] for one in found} == {document for _, document, *_ in expected}
    assert len((clean / "math.jsonl").read_text().splitlines()) == 198
    save({
        name: Domain(train=(str(clean / f"{name}.jsonl"),), valid=domain.valid)
        for name, domain in plain.items()
    })  # fmt: skip
    assert main(["data", "check", str(written), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"shared": []}


def test_held_out_text_that_is_training_text(tmp_path: Path) -> None:
    """The file itself, by another name, or a copy; in any domain."""
    documents = words(1, 50)
    a = write(tmp_path / "a.jsonl", documents)
    copy = write(tmp_path / "copy.jsonl", documents)
    (tmp_path / "link.jsonl").symlink_to(a)
    b, v = write(tmp_path / "b.jsonl", words(2, 50)), write(tmp_path / "v.jsonl", words(3, 50))
    for held, said in ((a, "is training text of domain a"), (copy, "has the content of"),
                       (str(tmp_path / "link.jsonl"), "is training text")):  # fmt: skip
        domains = {
            "a": Domain(train=(a,), valid=(v,)),
            "b": Domain(train=(b,), valid=(held,)),
        }
        for do in (check, lambda recipe: prepare(recipe, tmp_path / "out")):
            with pytest.raises(UserError, match=said) as error:
                do(recipe_of(domains))
            assert "domains.b.valid" in str(error.value)
    assert not (tmp_path / "out").exists()
