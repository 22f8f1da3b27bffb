"""Packaging: what is needed to import megatron_cppo, as ranges; requirements.lock holds the tested versions."""

import ast
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """`__version__`, read from the source: importing the package is not possible before its needs are installed."""
    for statement in ast.parse((ROOT / "megatron_cppo" / "__init__.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__version__":
            return str(ast.literal_eval(statement.value))
    raise RuntimeError("megatron_cppo/__init__.py has no line __version__ = '...'")


setup(
    name="megatron_cppo",
    version=version(),
    description="Perception-aware reinforcement learning of vision-language models on Megatron-Core.",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_cppo", "megatron_cppo.*"]),
    package_data={"megatron_cppo": ["rollout/inside_vllm/*.py"]},  # for vLLM's processes, no package of ours
    install_requires=[
        "torch>=2.6,<3",  # Megatron-Core's own minimum
        "megatron-core==0.16.1",  # moves functions and arguments between minor releases
        "transformers>=5.0,<6",  # 4.x chooses image processors, and writes rope's settings, in another way
        "safetensors>=0.5",
        "numpy>=1.26",
        "pillow>=10.1",
        "pyarrow>=15",
        "math-verify==0.9.0",  # another version is another grader: rewards and scores would not compare
        "xxhash>=3.4",
        "aiohttp>=3.10",
        "psutil>=5.9",  # Megatron-Core's checkpoint writer imports it without asking for it
        "tensorboard>=2.16",
        "tyro>=0.9,<2",
    ],
    extras_require={
        # Transformer Engine is built against the torch and CUDA that are there: best in an image that holds all three.
        # vLLM is no extra: it pins its own torch and is a server in an environment of its own.
        "gpu": ["transformer-engine[pytorch]>=2.9,<2.12"],  # the range of megatron-core 0.16.1
        "wandb": ["wandb>=0.19"],
        "demo": ["scikit-learn>=1.5"],  # its handwritten digits
        "dev": [
            "hypothesis>=6.100",
            "pytest>=8.2",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "pyrefly>=1.0",
            "import-linter>=2.5",
            # CUDA builds of torch bring it; the tests interpret its kernels where there is no GPU.
            "triton>=3.1; platform_system == 'Linux'",
        ],
    },
    entry_points={"console_scripts": ["megatron-cppo-train = megatron_cppo.train:main"]},
)
