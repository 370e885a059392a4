"""Resident memory of a routed model whose experts are in memory, and of one whose experts are paged to a folder."""

from __future__ import annotations

import argparse
import gc
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from peft_arrow import ArrowLoraModel
from peft_arrow.quickstart.base import silence_known_warnings

from .bases import base_and_tokenizer
from .experts import Experts, expert_bytes, write_folders


STATUS = Path("/proc/self/status")


def resident() -> dict[str, int]:
    """Bytes of this process's private memory (RssAnon) and of files mapped into it (RssFile) that are resident."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return {kind: 1024 * int(lines[kind].split()[0]) for kind in ("RssAnon", "RssFile")}


class Peak:
    """While open, the largest private memory, looked at every few milliseconds."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, resident()["RssAnon"])

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def load(args: argparse.Namespace, folders: list[str], store: str | None) -> dict[str, int]:
    """In a process of its own: what loading, prototypes and a prefill add to its resident memory."""
    silence_known_warnings()
    base, _ = base_and_tokenizer(args.base, args.device, args.dtype)
    ids = torch.randint(0, base.config.vocab_size, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base(input_ids=ids, logits_to_keep=1)
        before = resident()
        with Peak() as peak:
            options = {"top_k": args.top_k, "autocast_adapter_dtype": False}
            model = ArrowLoraModel.from_pretrained(base, folders, expert_store=store, **options)
            model.build_prototypes()
        model(input_ids=ids, logits_to_keep=1)
    gc.collect()
    after = resident()
    found = {kind: after[kind] - before[kind] for kind in after}
    return {**found, "peak RssAnon": peak.bytes - before["RssAnon"]}


def measure_paged(args: argparse.Namespace, base: torch.nn.Module, experts: Experts) -> list[dict]:
    """One row a side, and the formula's bytes of all experts."""
    factors = experts.count * expert_bytes(base, experts.rank)
    rows = []
    with tempfile.TemporaryDirectory() as root:
        folders = write_folders(base, experts, Path(root, "adapters"), experts.count)
        for side, store in (("in memory", None), ("paged to a folder", str(Path(root, "store")))):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                found = process.submit(load, args, folders, store).result()
            rows.append({"work": "paged", "side": side, "experts": experts.count, "factors": factors, **found})
    return rows


def told_paged(rows: list[dict]) -> str:
    """In Markdown, MiB."""
    count, factors = rows[0]["experts"], rows[0]["factors"] / 2**20
    lines = [
        f"\n### Resident memory of {count} experts, whose factors take {factors:.4g} MiB\n",
        "| experts | RssAnon, MiB | RssFile, MiB | peak RssAnon of loading, MiB |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [f"{row[kind] / 2**20:.4g}" for kind in ("RssAnon", "RssFile", "peak RssAnon")]
        lines.append(f"| {row['side']} | {' | '.join(cells)} |")
    return "\n".join(lines)
