"""``btx init --seed`` and ``btx doctor``."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from megatron_btx import cpu_info
from megatron_btx.cli.main import main
from megatron_btx.data.tokenizer import train_tokenizer
from megatron_btx.errors import UserErrors
from megatron_btx.pipeline import doctor, graph, import_checkpoint
from megatron_btx.recipe import run_plan, starter
from megatron_btx.recipe.load import load_recipe, parse_recipe
from megatron_btx.recipe.schema import Model
from megatron_btx.recipe.starter import Start, Text
from tests.evaluate import made
from tests.small import tree_hash


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seed, two models of its shape and text of two domains."""
    root = tmp_path_factory.mktemp("material")
    tokenizer = made.tokenizer()
    for number, name in enumerate(("seed", "code", "math")):
        made.write(made.random_model(tokenizer, number), root / name, tokenizer)
    made.write(made.random_model(tokenizer, 3, seq_length=32), root / "a b: 'c'", tokenizer)
    made.write(made.moe(tokenizer), root / "moe", tokenizer)
    for name, changed in {"nope": {"no_rope_freq": (0, 1)}, "base": {"rotary_base": 5e5}}.items():
        plain = made.random_model(tokenizer, 4)
        model = replace(plain.architecture.model, **changed)
        other = replace(plain, architecture=replace(plain.architecture, model=model))
        made.write(other, root / name, tokenizer)
    lines = [text for texts in made.TEXTS.values() for text in texts]
    lines += [text.upper() for text in lines]
    train_tokenizer(lines, made.VOCABULARY, where="test").save(root / "speech")
    for stage in ("seed", "expert-code", "finetune"):
        (root / "run" / stage / "checkpoints" / "step_00000002").mkdir(parents=True)
    (root / "run" / "recipe.yaml").touch()
    for name, texts in (("code", made.TEXTS["x"]), ("math", made.TEXTS["y"])):
        lines = [json.dumps({"text": f"{text} {n}"}) for n, text in enumerate(texts * 20)]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def there(material: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory."""
    monkeypatch.chdir(material)
    return material


ASKED = "--seed seed --expert code=code --expert math --data code=code.jsonl --data math=math.jsonl"


def test_what_it_writes_is_a_recipe_as_it_is(there: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "recipe.yaml"
    assert main(["init", *ASKED.split(), "--out", str(out)]) == 0
    assert f"next: btx plan {out}" in capsys.readouterr().out
    recipe = load_recipe(out)
    assert tuple(recipe.experts) == ("code", "math")
    assert recipe.experts["code"].from_ == str(there / "code")
    assert recipe.experts["math"].tokens > 0
    assert recipe.seed.from_ == str(there / "seed")
    assert recipe.tokenizer.vocab_size == made.tokenizer().vocab_size
    import_checkpoint.check_all(recipe, graph.build(recipe))
    spoken = made.tokenizer()
    texts = [json.loads(line)["text"] for line in (there / "math.jsonl").read_text().splitlines()]
    tokens = sum(len(ids) + 1 for ids in spoken.encode(texts))
    assert recipe.experts["math"].tokens == int(tokens / starter.OWN), "a short text is counted"
    wanted = int(recipe.experts["math"].tokens * 80 / 453)
    assert recipe.finetune.tokens == wanted, "as in the paper, for each token of the experts'"
    assert not list(run_plan.warnings(recipe)), "warm-ups end"
    assert main(["plan", str(out)]) == 0
    assert main(["run", str(out), "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "expert:math" in said.out
    assert "warning" not in said.err


def test_a_run_is_called_as_its_file_and_an_expert_without_text_is_told(
    there: Path, tmp_path: Path, capsys
) -> None:
    words = [
        "--seed",
        "seed",
        "--expert",
        "code=code",
        "--expert",
        "math=code",
        "--data",
        "code=code.jsonl",
    ]
    assert main(["init", *words, "--out", str(tmp_path / "second.yaml")]) == 0
    assert load_recipe(tmp_path / "second.yaml").name == "second"
    assert "warning: --expert math has no --data math=FILE" in capsys.readouterr().err


def test_names_that_yaml_would_read_otherwise(there: Path, tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    words = [*ASKED.split(), "--expert", "quoted=a b: 'c'", "--out", str(out)]
    assert main(["init", *words]) == 0
    assert load_recipe(out).experts["quoted"].from_ == str(there / "a b: 'c'")


def test_what_no_family_computes_stays_in_megatrons_format(
    there: Path, tmp_path: Path, capsys
) -> None:
    """Known before anything is trained: in a layer of each of these, nothing is rotated."""
    out = tmp_path / "recipe.yaml"
    words = "--seed nope --expert code=nope --data code=code.jsonl --data math=math.jsonl"
    assert main(["init", *words.split(), "--out", str(out)]) == 0
    assert load_recipe(out).export.format == "none"
    out.write_text(out.read_text().replace("export: {format: none}", "export: {format: hf}"))
    capsys.readouterr()
    assert main(["run", str(out), "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert "export.format: no Hugging Face family computes this model" in told
    assert "fix: set `export: {format: none}`" in told


def test_a_tokenizer_that_is_not_the_seeds_is_told_by_the_plan(
    there: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "recipe.yaml"
    assert main(["init", *ASKED.split(), "--out", str(out)]) == 0
    out.write_text(f"{out.read_text()}tokenizer: {{path: {there / 'speech'}}}\n")
    capsys.readouterr()
    assert main(["run", str(out), "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert "was trained with another tokenizer than tokenizer.path: vocabulary: " in told
    out.write_text(out.read_text().replace(str(there / "speech"), str(there)))
    assert main(["run", str(out), "--dry-run"]) == 2
    assert "tokenizer.path: " in (told := capsys.readouterr().err)
    assert "holds no tokenizer.json and no tokenizer.model" in told


def test_vocabularies_to_be_aligned(there: Path, tmp_path: Path, capsys) -> None:
    """Asked of the models as of a recipe's: these have no tokenizer.json."""
    out = tmp_path / "recipe.yaml"
    assert main(["init", *ASKED.split(), "--align-vocab", "--out", str(out)]) == 2
    assert "mix.align_vocab: seed: comes without a tokenizer.json" in capsys.readouterr().err
    recipe = parse_recipe(starter.compose(start(align_vocab=True), out))
    assert recipe.mix.align_vocab


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--seed seed --expert code=base --data code=code.jsonl", "branched from the seed"),
        ("--seed seed --data code=code.jsonl", "--expert: is missing"),
        ("--seed seed --expert code=code", "--data: is missing"),
        ("--seed seed --expert prose --data code=code.jsonl", "prose has neither"),
        ("--seed seed --expert code=code --data code.jsonl", "is not NAME=FILE"),
        ("--seed seed --expert code=code --expert code --data code=code.jsonl", "no new NAME"),
        ("--seed seed --expert code=code --data code=none.jsonl", "none.jsonl does not exist"),
        ("--seed moe --expert code=code --data code=code.jsonl", "is a mixture of experts"),
        ("--seed meta/llama --expert code=code --data code=code.jsonl", "meta/llama: "),
        ("--seed seed --expert code=moe --data code=code.jsonl", "is a mixture of experts"),
        ("--seed run --expert code=code --data code=code.jsonl", "such as run/seed\n"),
        ("--seed seed --expert code=run --data code=code.jsonl", "run/expert-code\n"),
        (f"{ASKED} --valid web=code.jsonl", "web has no --data"),
        (f"{ASKED} --gpus -1", "out of range"),
        (f"{ASKED} --seq-length 0", "--seq-length: is 0"),
        (f"{ASKED} --seq-length 100000", "one step takes"),
        (f"{ASKED} --out code.jsonl", "exists already"),
        (f"{ASKED} --example demo", "cannot be combined with --seed"),
        ("--expert code=code --data code=code.jsonl", "--seed: is missing"),
        (f"{ASKED} --name a/b", "cannot name a directory"),
    ],
)
def test_a_mistake_is_told_and_nothing_written(there: Path, words: str, said: str, capsys) -> None:
    before = tree_hash(there)
    assert main(["init", *words.split()]) == 2
    assert said in capsys.readouterr().err
    assert tree_hash(there) == before


def test_all_mistakes_are_told_at_once(there: Path, capsys) -> None:
    words = "--seed nix --expert code=gone --expert code --data code.jsonl --data code=none.jsonl"
    assert main(["init", *words.split(), "--gpus", "-1", "--out", "math.jsonl"]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "fix: " not in line]
    assert told == [
        "error: --gpus, --gpu-memory: are out of range",
        "--expert: 'code' is no new NAME or NAME=DIR",
        "--data: 'code.jsonl' is not NAME=FILE",
        "math.jsonl: exists already",
        "nix: does not exist",
        "--expert code: gone: does not exist",
        "--data code: none.jsonl does not exist",
    ]


SEVEN = Model(
    num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, seq_length=4096
)


def start(**more) -> Start:
    domains = {name: Text(train=(Path(f"{name}.jsonl"),), tokens=10**10) for name in "abc"}
    experts = {name: Path(name) for name in "abc"}
    return Start(
        name="seven", model=SEVEN, seed=Path("seed"), experts=experts, domains=domains, **more
    )


@pytest.mark.parametrize("gpus", [8, 16, 64, 256])
def test_the_layout_fits_the_gpus(tmp_path: Path, gpus: int) -> None:
    recipe = parse_recipe(starter.compose(start(gpus=gpus), tmp_path / "recipe.yaml"))
    layout = recipe.finetune.layout
    assert layout.world_size == gpus
    assert layout.expert_model_parallel_size in (2, 4), "of three experts and the seed"
    (finetune,) = (stage for stage in run_plan.plan(recipe).stages if stage.name == "finetune")
    assert finetune.memory_per_rank.allocated < 0.9 * 80e9
    assert recipe.finetune.global_batch_size * 4096 <= starter.PAPER_BATCH
    assert recipe.finetune.lr_warmup_iters == 100
    assert recipe.finetune.lr == 1e-4


def test_too_few_gpus_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserErrors, match="2 GPUs of 24 GB are too few"):
        starter.compose(start(gpus=2, gpu_bytes=24e9), tmp_path / "recipe.yaml")


def test_the_doctor_says_what_is_here(tmp_path: Path, capsys) -> None:
    assert main(["doctor", "--dir", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["facts"]["packages"]["torch"] == metadata.version("torch")
    assert found["facts"]["disk"]["write_bytes_per_second"] > 0
    works = {feature["name"]: feature["works"] for feature in found["features"]}
    assert works["training"]
    assert works.get("fast bf16 on CPUs", cpu_info.has_avx512()) == cpu_info.has_avx512()
    assert list(tmp_path.iterdir()) == []
    assert main(["doctor", "--dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^yes  training +megatron-core", said, re.MULTILINE)
    assert main(["doctor", "--dir", str(tmp_path / "none")]) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_the_doctor_knows_the_releases(monkeypatch) -> None:
    """Those that the package asks for, whichever Python; and says what is wrong."""
    wanted = " ".join(metadata.requires("megatron-btx") or ())
    for version in ("0.16.1", "0.19.2"):
        assert f"megatron-core=={version}" in wanted
        assert version in Path(doctor.__file__).read_text()
    other = doctor._megatron({"megatron-core": "0.17.0", "torch": "2.0"}, None)
    assert (other.works, other.needed) == (False, True)
    assert "this Python has megatron-core==" in other.why
    assert "does not import: no libcuda" in doctor._megatron({}, "no libcuda").why
