"""What each way of choosing adapters is worth on held-out rows: completion loss and exact match."""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedTokenizerBase

from .tasks import Row


@dataclass(frozen=True)
class Score:
    """The result of one method on the held-out rows of one task.

    Args:
        loss (`float`): nats per token of the completions, the end-of-sequence token included.
        exact (`float`): share of rows whose completion is what greedy decoding would write.
        row_losses (`list[float]`): nats per token of each row.
    """

    loss: float
    exact: float
    row_losses: list[float]


@torch.no_grad()
def judge_rows(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> Score:
    """Loss and exact match of `rows` in one left-padded batch.

    Greedy decoding writes the completion exactly if and only if each of its tokens has the largest logit after the
    ones before it, so exact match needs no generation.
    """
    batch, labels = encode(tokenizer, rows)
    logits = model(**batch, logits_to_keep=labels.shape[1] + 1).logits[:, :-1].float()
    losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    counted = labels != -100
    exact = ((logits.argmax(-1) == labels) | ~counted).all(1)
    row_losses = losses.sum(1) / counted.sum(1)
    return Score((losses.sum() / counted.sum()).item(), exact.float().mean().item(), row_losses.tolist())


def encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Left-padded inputs (B, S), and labels (B, C) for the last C positions with -100 before each completion."""
    prompts = [tokenizer(row.prompt).input_ids for row in rows]
    completions = [tokenizer(row.completion).input_ids + [tokenizer.eos_token_id] for row in rows]
    pairs = [torch.tensor(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]
    length, kept = max(map(len, pairs)), max(map(len, completions))
    ids = torch.stack([pad(pair, (length - len(pair), 0), value=tokenizer.pad_token_id) for pair in pairs])
    mask = torch.stack([pad(torch.ones_like(pair), (length - len(pair), 0)) for pair in pairs])
    labels = [pad(torch.tensor(completion), (kept - len(completion), 0), value=-100) for completion in completions]
    return {"input_ids": ids, "attention_mask": mask}, torch.stack(labels)


def files_fingerprint(folders: Sequence[Path], settings: object) -> str:
    """Changes with the adapters' weights and configs, and with `settings` (anything JSON knows)."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for folder in folders:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]


class PlainJudge:
    """Judges the base model and single adapters with plain PEFT, without any routing."""

    def __init__(self, base: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folders: Mapping[str, Path]) -> None:
        first, *others = folders
        self.tokenizer = tokenizer
        self.model = PeftModel.from_pretrained(base, folders[first], adapter_name=first).eval()
        for name in others:
            self.model.load_adapter(folders[name], adapter_name=name)

    def base(self, rows: Sequence[Row]) -> Score:
        """The base model alone."""
        with self.model.disable_adapter():
            return judge_rows(self.model, self.tokenizer, rows)

    def single(self, adapter: str, rows: Sequence[Row]) -> Score:
        """One adapter for all tokens."""
        self.model.set_adapter(adapter)
        return judge_rows(self.model, self.tokenizer, rows)


def best_single(judge: PlainJudge, names: Sequence[str], rows: Mapping[str, Sequence[Row]]) -> str:
    """The adapter of `names` with the lowest mean row loss, averaged over the tasks of `rows`."""
    together = [row for task_rows in rows.values() for row in task_rows]
    means = {}
    for name in names:
        losses = iter(judge.single(name, together).row_losses)
        means[name] = statistics.fmean(
            statistics.fmean(next(losses) for _ in task_rows) for task_rows in rows.values()
        )
    return min(means, key=means.__getitem__)
