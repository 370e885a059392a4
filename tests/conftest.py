"""Set-up for every test: offline, quiet, one thread a worker.

The environment is set before torch and the Hub clients are imported, because they read it then.
"""

from __future__ import annotations

import os
import socket


# Read at import by huggingface_hub, transformers, datasets and trl; none of them may ask a server anything.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_DISABLED="true",
    MPLBACKEND="Agg",
)
# `make test` runs one worker a core; a thread pool in each would only make them wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.pico import pico_adapter, pico_base, pico_tokenizer  # noqa: E402


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch):
    """Refuse connections to other machines; process groups and local servers of a test stay possible."""
    connect = socket.socket.connect

    def connect_locally(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"a test tried to reach {address[0]!r}: tests use this machine only.")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from the same random state, whatever ran before it in this worker."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_environment():
    """Put the environment back: transformers 4 leaves ACCELERATE_MIXED_PRECISION in it for the next test to read."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def base():
    """A fresh Llama of two layers and width 32."""
    return pico_base()


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer for `base`."""
    return pico_tokenizer()


@pytest.fixture(scope="session")
def adapter_folders(tmp_path_factory) -> dict[str, str]:
    """Three plain PEFT LoRA adapters of `base`, with different ranks and target modules, as name -> folder."""
    root = tmp_path_factory.mktemp("adapters")
    pico_adapter(root / "plurals", seed=1, r=4, target_modules=["q_proj", "v_proj"])
    pico_adapter(root / "dates", seed=2, r=8, target_modules=["q_proj", "v_proj", "o_proj"])
    pico_adapter(root / "sql", seed=3, r=2, target_modules=["q_proj", "down_proj"])
    return {name: str(root / name) for name in ("plurals", "dates", "sql")}
