"""Install with ``pip install -e .``; ``make`` does it into an environment of its own."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "megatron_phf/__init__.py").read_text())[1]

# Whatever is not Python's own: page templates, presets.
DATA = [
    str(path.relative_to(HERE / "megatron_phf"))
    for path in sorted((HERE / "megatron_phf").rglob("*"))
    if path.is_file() and path.suffix not in (".py", ".pyc")
]

COMMANDS = (
    *("acceptance", "check_export", "convert_checkpoint", "dry_run", "evaluate", "gguf_to_hf"),
    *("grid", "make_embedded", "parity", "plan", "prepare_data", "report"),
)

TRL = "trl>=1.16,<2"  # examples/integrations/trl_trainer.py

setup(
    name="megatron_phf",
    version=VERSION,
    description="PHF and OPSD on-policy self-distillation on Megatron-Core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_phf", "megatron_phf.*"]),
    package_data={"megatron_phf": DATA},
    entry_points={
        "console_scripts": [
            f"megatron-phf-{name.replace('_', '-')} = megatron_phf.cli.{name}:main"
            for name in COMMANDS
        ],
        # In vLLM's environment: a way to get weights (docs/vllm.md).
        "vllm.general_plugins": ["megatron_phf = megatron_phf.rollout.vllm.plugin:register"],
    },
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        # megatron-core from 0.19, for Python 3.12, imports it; a CPU's build of torch lacks it
        "triton; python_version >= '3.12' and sys_platform == 'linux'",
        "mbridge==0.15.1",  # upstream is quiet, and its private names are used
        "transformers>=4.56",
        "safetensors",
        "einops",  # mbridge and megatron-core import it without asking for it
        "sentencepiece",
        "numpy",
        "psutil",  # megatron-core's checkpoint writer imports it without asking for it
        "tensorboard",
        "tqdm",
        "matplotlib",
        "scipy",  # the report's t intervals
        "jinja2",  # its page; torch and transformers ask for it too
        "math-verify>=0.9",  # every evaluation grades; it brings sympy, which torch brings anyway
    ],
    extras_require={
        "test": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "peft", TRL],
        "wandb": ["wandb"],
        "integrations": [TRL],
    },
)
