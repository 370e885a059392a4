"""The paper's controls for clustering: tasks or rows dealt out by chance, and tasks grouped by what the base sees."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from sklearn.cluster import KMeans
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..training.base import lent
from ..training.data import Examples, joined


ROWS_A_TASK = 256
PENULTIMATE = -2


def cluster_names(count: int) -> list[str]:
    """`cluster_0`, `cluster_1`, ..."""
    return [f"cluster_{number}" for number in range(count)]


def random_tasks(tasks: list[str], count: int, seed: int) -> dict[str, list[str]]:
    """Deal the tasks out to `count` groups of equal size, up to one; inside a group they keep their order."""
    dealt = np.random.default_rng(seed).permutation(len(tasks))
    shares = np.array_split(dealt, count)
    return {name: [tasks[i] for i in sorted(share)] for name, share in zip(cluster_names(count), shares)}


def random_examples(parts: Mapping[str, Examples], count: int, seed: int) -> dict[str, Examples]:
    """Deal the rows of all tasks out to `count` groups of equal size, up to one.

    Raises:
        ValueError: fewer rows than groups, or tasks of different kinds of rows.
    """
    whole = joined("all", list(parts.values()))
    if len(whole.dataset) < count:
        raise ValueError(f"n_clusters={count} is more than the {len(whole.dataset)} rows of all tasks.")
    shares = np.array_split(np.random.default_rng(seed).permutation(len(whole.dataset)), count)
    groups = {}
    for name, share in zip(cluster_names(count), shares):
        digest = hashlib.sha256(f"{whole.fingerprint} {seed} {count} {name}".encode()).hexdigest()
        groups[name] = Examples(name, whole.dataset.select(sorted(share)), digest, whole.tasks, whole.sources)
    return groups


def mean_state(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, part: Examples, max_length: int, seed: int
) -> np.ndarray:
    """The mean hidden state of a task in the base's last layer but one: over tokens, then over rows (section 5.1).

    At most 256 rows of the task, drawn with the seed; prompts and completions are read as one text.

    Returns:
        `np.ndarray`: (hidden size,), float32.
    """
    chosen = np.random.default_rng(seed).permutation(len(part.dataset))[:ROWS_A_TASK]
    states = []
    with lent(model), torch.inference_mode():
        model.eval()
        for row in part.dataset.select(sorted(chosen)):
            ids = torch.tensor([_ids(tokenizer, row)[:max_length]], device=model.device)
            read = model.base_model(input_ids=ids, output_hidden_states=True)  # no logits
            states.append(read.hidden_states[PENULTIMATE][0].float().mean(0))
    return torch.stack(states).mean(0).cpu().numpy()


def _ids(tokenizer: PreTrainedTokenizerBase, row: Mapping) -> list[int]:
    if "text" in row:
        return tokenizer(row["text"])["input_ids"]
    if isinstance(row["prompt"], str):
        return tokenizer(row["prompt"] + row["completion"])["input_ids"]
    chat = row["prompt"] + row["completion"]
    return tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]


def by_state(states: Mapping[str, np.ndarray], count: int, seed: int) -> dict[str, list[str]]:
    """k-means on the tasks' mean states."""
    names = list(states)
    found = KMeans(count, n_init=10, random_state=seed).fit(np.stack([states[name] for name in names]))
    groups = {
        name: [task for task, label in zip(names, found.labels_) if label == number]
        for number, name in enumerate(cluster_names(count))
    }
    return {name: tasks for name, tasks in groups.items() if tasks}
