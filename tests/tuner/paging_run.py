"""A process that pages experts into a folder, for tests that kill it: `paging_run.py FOLDER STOP`."""

from __future__ import annotations

import sys
import time

import torch
from peft import get_peft_model

from peft_arrow import ArrowLoraConfig
from peft_arrow.tuner.expert_store import ExpertStore, StoreFile
from tests.pico import pico_base


def memory(kind: str) -> int:
    """Bytes of this process's resident memory: `RssAnon` or `RssFile`."""
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def stop(*_) -> None:
    """Tell the parent, and wait for its kill."""
    print("stopped", flush=True)
    time.sleep(600)


def main() -> None:
    folder, where = sys.argv[1:]
    bank, copies = ExpertStore.bank, []

    def bank_in_the_middle(self, *args):
        copies.append(args)
        return stop() if len(copies) == 5 else bank(self, *args)

    if where == "while copying":
        ExpertStore.bank = bank_in_the_middle
    if where == "before the name":
        StoreFile.finish = stop
    torch.manual_seed(0)
    rank, experts = (64, 400) if where == "memory" else (4, 6)
    options = {"num_experts": experts, "r": rank, "top_k": 2, "init_weights": False, "inference_mode": True}
    model = get_peft_model(pico_base(), ArrowLoraConfig(target_modules="all-linear", **options)).eval()
    before = memory("RssAnon"), memory("RssFile")
    model.page_experts(folder)
    after = memory("RssAnon"), memory("RssFile")
    weights = [w for name, w in model.named_parameters() if "arrow_lora_A" in name or "arrow_lora_B" in name]
    print(*(new - old for new, old in zip(after, before, strict=True)), sum(w.nbytes for w in weights), flush=True)
    if where == "in use":
        stop()


if __name__ == "__main__":
    main()
