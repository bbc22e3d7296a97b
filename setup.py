"""Packaging of Megatron-BTX. ``pip install -e .[hf,dev]`` for work on it."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-btx",
    version="0.1.0",
    description="Branch-Train-MiX (arXiv 2403.07816) on Megatron-Core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["megatron_btx", "megatron_btx.*"]),
    package_data={"megatron_btx": ["py.typed", "pipeline/slurm/*.sh", "evaluate/items/*.yaml"]},
    install_requires=[
        "torch>=2.10",
        # One code base for two releases (megatron_btx/engine/megatron_release.py): the newest for
        # each Python, none between.
        "megatron-core==0.16.1; python_version < '3.12'",
        "megatron-core==0.19.2; python_version >= '3.12'",
        "numpy",
        # Megatron's checkpoint writer needs it without declaring it: its worker dies, the parent
        # waits for ever.
        "psutil",
        "pyyaml",
        "rich",
        "safetensors",
        "sentencepiece",
        "sympy",
        "wandb",
        "xxhash",
    ],
    extras_require={
        # Parquet, Arrow and Zstandard.
        "data": ["pyarrow"],
        "hf": ["transformers>=4.57", "tokenizers"],
        # Exactly: we build its tasks ourselves, which is not part of its promised interface.
        "eval": ["lm-eval==0.4.13"],
        # NVIDIA Apex is built from source and detected; the package called apex on the index is
        # something else, so it appears nowhere here.
        "te": ["transformer-engine[pytorch]"],
        "dev": [
            "hypothesis",
            "lm-eval==0.4.13",
            "mypy",
            "pyarrow",
            "pytest",
            "pytest-xdist",
            "ruff",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["btx=megatron_btx.cli.main:main"]},
)
