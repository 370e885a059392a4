"""What the tests with a Hub share: a library to push, files as repositories, and client code in other processes.

The process of the tests is offline, and huggingface_hub reads its settings at import. So what a user would do runs as
`python -m tests.library.<module>`: a module of functions `check_*`, each of which is one test.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

from tests.hub_server import ROOT, HubServer, client_environment, steer
from tests.pico import pico_adapter, pico_base, pico_tokenizer


BASE = "alice/pico"
TOKENS = torch.arange(12).reshape(2, 6) + 5
SHAPES = {
    "plurals": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "dates": {"r": 8, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    "sql": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
}


class Hub:
    """The test Hub as a client process sees it: what it holds, what was asked of it, and faults to order."""

    def __init__(self, endpoint: str):
        self.endpoint = endpoint

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: steer(self.endpoint, name, *args, **kwargs)

    def asked_by(self, function, *args, **kwargs) -> tuple[object, list[str]]:
        """What a call returns, and the requests it made."""
        before = len(self.requests())
        result = function(*args, **kwargs)
        return result, self.requests()[before:]


def files_of(folder: str | Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """The logits of two short rows."""
    with torch.no_grad():
        return model(TOKENS).logits


def make_adapter(folder: str | Path, seed: int, license: str | None = None, **lora_config) -> dict[str, bytes]:
    """The files of a plain PEFT adapter of the base `BASE`, with a card."""
    config = Path(pico_adapter(folder, seed=seed, **lora_config), "adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": BASE}))
    terms = f"license: {license}\n" if license else ""
    card = f"---\nbase_model: {BASE}\nlibrary_name: peft\n{terms}---\n# An adapter\n"
    Path(folder, "README.md").write_text(card)
    return files_of(folder)


def make_adapters(root: Path) -> dict[str, Path]:
    """Three adapters of different ranks and modules, as name -> folder."""
    for seed, (name, shape) in enumerate(SHAPES.items(), 1):
        make_adapter(root / name, seed, license="apache-2.0" if name == "sql" else None, **shape)
    return {name: root / name for name in SHAPES}


def add_base(hub: HubServer, root: Path) -> None:
    """The base with its tokenizer, as the repository `BASE`."""
    pico_base().save_pretrained(root)
    pico_tokenizer().save_pretrained(root)
    hub.create(BASE, files_of(root))


def start_client(module: str, endpoint: str, home: Path, *arguments: object, **more: str) -> subprocess.Popen:
    """Start `python -m tests.library.<module>`, or another one's full name, with `home` for its cache.

    more: `token`, and environment variables.
    """
    environment = client_environment(endpoint, home, **{"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0", **more})
    name = module if "." in module else f"tests.library.{module}"
    command = [sys.executable, "-m", name, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run_client(module: str, endpoint: str, home: Path, *arguments: object, **more: str) -> list[str]:
    """Run it to its end, which must be a good one; the names of the checks that passed."""
    return finish(start_client(module, endpoint, home, *arguments, **more))


def finish(client: subprocess.Popen) -> list[str]:
    """Wait for a client that `start_client` started."""
    try:
        text, _ = client.communicate(timeout=300)
    finally:
        client.kill()
    assert client.returncode == 0, text[-12000:]
    return re.findall(r"passed check_(\w+)$", text, re.MULTILINE)  # a progress bar may stand before it on its line


def run_checks(functions: dict, *arguments: object, only: str = "") -> None:
    """Call all functions `check_*`; each gets as many of the arguments as it takes. Exit code 1 where one fails."""
    failed = False
    for name, check in list(functions.items()):
        if not name.startswith("check_") or only not in name:
            continue
        for hub in (argument for argument in arguments if isinstance(argument, Hub)):
            hub.clear_faults()
        try:
            check(*arguments[: len(inspect.signature(check).parameters)])
        except (Exception, pytest.fail.Exception):  # noqa: BLE001  (the others run too)
            failed = True
            print(f"\nFAILED {name}\n{traceback.format_exc(limit=-4)}", flush=True)
        else:
            print(f"passed {name}", flush=True)
    sys.exit(1 if failed else 0)
