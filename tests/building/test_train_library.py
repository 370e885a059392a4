"""`train_library`: the kinds, their budgets, the exactness of converted Poly models, failures, and bad arguments."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from peft import PeftModel

from peft_arrow import AdapterLibrary, TrainingFailed, train_groups, train_library
from peft_arrow.building import KINDS, Options
from peft_arrow.building.budget import divided, private_share
from peft_arrow.building.partition import random_tasks
from peft_arrow.cli.library_options import KINDS as CLI_KINDS
from tests.building.data import QUICK, TASKS, base_in
from tests.pico import pico_base
from tests.training.helpers import token_batch


STAGES = {
    "private": [("private", 4, 20)],
    "shared": [("shared", 1, 20)],
    "mbc": [("private", 4, 8), ("clusters", 2, 12)],
    "random": [("clusters", 2, 20)],
    "random_examples": [("clusters", 2, 20)],
    "embedding": [("clusters", 2, 20)],
    "poly": [("poly", 1, 20), ("experts", 4, 0)],
    "mhr": [("poly", 1, 20), ("experts", 4, 0)],
}


@pytest.fixture
def base_folder(tmp_path) -> str:
    return base_in(tmp_path)


def build(base, folder, datasets=TASKS, **options):
    defaults = {"kind": "private", "n_clusters": 2, "steps": 5, "sft_config": QUICK, "progress": False}
    return train_library(base, datasets, output_dir=folder, **{**defaults, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_takes_the_same_steps(kind, base_folder, tmp_path):
    library = build(base_folder, tmp_path / "library", kind=kind)
    made = AdapterLibrary.from_pretrained(tmp_path / "library").notes.made
    assert [(stage["stage"], stage["experts"], stage["steps"]) for stage in made["stages"]] == STAGES[kind]
    assert made["steps"] == 20 and made["kind"] == kind
    assert made["tokens"] == 20 * 2 * 8, "all rows have 8 tokens, and a step takes 2"
    tasks = [task for tasks in made["groups"].values() for task in tasks]
    assert set(tasks) == set(TASKS) and (len(tasks) == 4 or kind == "random_examples")
    assert list(library) == list(made["groups"])
    PeftModel.from_pretrained(pico_base(), str(tmp_path / "library/experts" / list(library)[0]))
    assert "How it was made" in (tmp_path / "library/README.md").read_text()


def test_tasks_are_read_once(base_folder, tmp_path, monkeypatch, capsys):
    """A build that was interrupted while it read goes on with the tasks that are left; other seeds read others."""
    real, read = sys.modules["peft_arrow.building.kinds"].mean_state, []

    def state(model, tokenizer, part, *rest):
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(part.name)
        return real(model, tokenizer, part, *rest)

    monkeypatch.setattr("peft_arrow.building.kinds.mean_state", state)
    with pytest.raises(KeyboardInterrupt):
        build(base_folder, tmp_path / "library", kind="embedding", progress=True)
    assert "reading tasks" in capsys.readouterr().err
    read[:] = []
    build(base_folder, tmp_path / "library", kind="embedding")
    assert read == list(TASKS)[2:]
    read[:] = []
    with pytest.raises(KeyboardInterrupt):
        build(base_folder, tmp_path / "library", kind="embedding", seed=1, overwrite=True)
    monkeypatch.undo()
    build(base_folder, tmp_path / "whole", kind="embedding")
    kept, whole = (list((tmp_path / f"{name}-training/states").glob("*.npy")) for name in ("library", "whole"))
    assert len(kept) == 6 and len(whole) == 4
    assert all(np.array_equal(np.load(path), np.load(kept[0].parent / path.name)) for path in whole)


def test_the_clis_kinds_are_these():
    assert tuple(KINDS) == CLI_KINDS


@pytest.mark.parametrize("kind", ["poly", "mhr"])
def test_converted_experts_are_the_poly_model_of_their_task(kind, base_folder, tmp_path):
    options = {"options": Options(n_skills=3, n_splits=4), "steps": 20, "lora_config": {"r": 3}}
    library = build(base_folder, tmp_path / "library", kind=kind, **options)
    source = PeftModel.from_pretrained(pico_base(), str(tmp_path / "library-training/poly")).eval()
    ids = token_batch(2)["input_ids"]
    with torch.no_grad():
        base = pico_base()(input_ids=ids).logits
        for number, task in enumerate(library):
            expected = source(input_ids=ids, task_ids=torch.tensor([number, number])).logits
            expert = PeftModel.from_pretrained(pico_base(), str(tmp_path / "library/experts" / task)).eval()
            assert (expert(input_ids=ids).logits - expected).abs().max() < 2e-6
            assert (expected - base).abs().max() > 1e-3
        others = [source(input_ids=ids, task_ids=torch.tensor([n, n])).logits for n in (0, 1)]
        assert (others[0] - others[1]).abs().max() > 1e-4, "the tasks differ, or nothing would be compared"


def test_again_trains_nothing(base_folder, tmp_path, monkeypatch):
    for kind in ("mbc", "poly"):
        build(base_folder, tmp_path / kind, kind=kind)
    manifests = {kind: (tmp_path / kind / "library.json").read_text() for kind in ("mbc", "poly")}
    monkeypatch.setattr("peft_arrow.training.jobs.fit", None)
    for kind, manifest in manifests.items():
        build(base_folder, tmp_path / kind, kind=kind)
        assert (tmp_path / kind / "library.json").read_text() == manifest
    with pytest.raises(ValueError, match="sft.max_steps was 2 and is now 4"):
        build(base_folder, tmp_path / "mbc", kind="mbc", steps=10)


def test_a_failing_task_stops_nothing_else(base_folder, tmp_path, monkeypatch, capsys):
    real = sys.modules["peft_arrow.training.jobs"].fit

    def fit(model, tokenizer, dataset, arguments, **options):
        if "task2" in arguments.output_dir:
            raise RuntimeError("CUDA out of memory\nmore")
        return real(model, tokenizer, dataset, arguments, **options)

    monkeypatch.setattr("peft_arrow.training.jobs.fit", fit)
    with pytest.raises(
        TrainingFailed, match="1 experts failed and 3 are in .*task2: RuntimeError: CUDA out"
    ) as caught:
        build(base_folder, tmp_path / "library", progress=True)
    assert list(caught.value.library) == ["task0", "task1", "task3"]
    assert caught.value.failures == {"task2": "RuntimeError: CUDA out of memory"}
    assert "task2: failed, CUDA out of memory" in capsys.readouterr().err
    monkeypatch.undo()
    trained = []
    monkeypatch.setattr(
        "peft_arrow.training.jobs.fit", lambda *a, **k: trained.append(a[3].output_dir) or real(*a, **k)
    )
    assert list(build(base_folder, tmp_path / "library")) == list(TASKS)
    assert len(trained) == 1 and "task2" in trained[0]


def test_a_task_without_memory_stops_nothing_else(base_folder, tmp_path, monkeypatch):
    real = sys.modules["peft_arrow.training.jobs"].fit

    def fit(model, tokenizer, dataset, arguments, **options):
        if "task0." in arguments.output_dir:
            raise MemoryError
        return real(model, tokenizer, dataset, arguments, **options)

    monkeypatch.setattr("peft_arrow.training.jobs.fit", fit)
    datasets = {task: TASKS[task] for task in ("task0", "task1")}
    with pytest.raises(TrainingFailed, match="task0: MemoryError") as caught:
        build(base_folder, tmp_path / "library", datasets)
    assert list(caught.value.library) == ["task1"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kind": "poly"}, "kinds 'poly' and 'mhr' cannot be trained under FSDP or DeepSpeed"),
        ({"base": "a model"}, "under FSDP or DeepSpeed pass its Hub id or folder"),
    ],
)
def test_what_a_sharded_base_cannot_do_is_refused(options, told, base_folder, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    if "base" in options:
        options = {"base": pico_base(), "tokenizer": tokenizer}
    with pytest.raises(ValueError, match=told):
        build(**{"base": base_folder, "folder": tmp_path / "library", **options})
    assert [path.name for path in tmp_path.iterdir()] == ["my-base"]


def test_sharding_is_accelerates(base_folder, tmp_path):
    with pytest.raises(ValueError, match="sft_config has fsdp=.+; give it in accelerate's config"):
        build(base_folder, tmp_path / "library", sft_config={**QUICK, "fsdp": True})


def test_a_task_whose_loss_is_nan_is_left_out_of_the_clusters(base_folder, tmp_path, monkeypatch):
    real = sys.modules["peft_arrow.training.jobs"].fit

    def fit(model, tokenizer, dataset, arguments, **options):
        if "task1." in arguments.output_dir:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.fill_(float("nan"))
        return real(model, tokenizer, dataset, arguments, **options)

    monkeypatch.setattr("peft_arrow.training.jobs.fit", fit)
    with pytest.raises(TrainingFailed, match="task1: NotFinite: .* is nan at step 1") as caught:
        build(base_folder, tmp_path / "library", kind="mbc")
    made = caught.value.library.notes.made
    assert sorted(task for tasks in made["groups"].values() for task in tasks) == ["task0", "task2", "task3"]
    assert list(made["failed"]) == ["task1"]


def test_a_task_that_failed_joins_its_group_in_the_next_run(base_folder, tmp_path, monkeypatch):
    """Too few adapters for the clusters are told with what failed; once all are there, so is the whole library."""
    real = sys.modules["peft_arrow.training.jobs"].fit

    def fit(model, tokenizer, dataset, arguments, **options):
        if "task1." in arguments.output_dir:
            raise OSError(28, "No space left on device")
        return real(model, tokenizer, dataset, arguments, **options)

    monkeypatch.setattr("peft_arrow.training.jobs.fit", fit)
    with pytest.raises(
        TrainingFailed, match="task1: OSError: .*clusters: n_clusters=4 is more than there are"
    ) as caught:
        build(base_folder, tmp_path / "library", kind="mbc", n_clusters=4)
    assert caught.value.library is None and not (tmp_path / "library").exists()
    with pytest.raises(TrainingFailed, match="1 experts failed and 2 are in .*library; .* task1: OSError"):
        build(base_folder, tmp_path / "library", kind="mbc")
    monkeypatch.undo()
    build(base_folder, tmp_path / "library", kind="mbc")
    build(base_folder, tmp_path / "good", kind="mbc")
    assert (tmp_path / "library/library.json").read_text() == (tmp_path / "good/library.json").read_text()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kind": "mcb"}, "kind='mcb' is unknown; allowed are"),
        ({"kind": "mbc", "n_clusters": 5}, "n_clusters=5 is not allowed for 4 tasks; it must be 1 to 4, or 'auto'"),
        ({"kind": "random", "n_clusters": "auto"}, "n_clusters='auto' is not allowed"),
        ({"kind": "mbc", "steps": 1}, "steps=1 is not allowed; a task needs at least 2, one for each stage"),
        ({"datasets": {}}, "datasets is empty"),
        ({"datasets": [{"prompt": "a", "completion": "b"}]}, "datasets holds a dict; a list is one of files, folders"),
        ({"datasets": {"a/b": TASKS["task0"]}}, "expert name 'a/b' is not allowed"),
        ({"datasets": {**TASKS, "chats": [{"text": "a"}]}}, "datasets are of different kinds"),
        ({"kind": "poly", "sft_config": {**QUICK, "packing": True}}, "Poly cannot have"),
    ],
)
def test_bad_arguments_write_nothing(options, told, base_folder, tmp_path):
    with pytest.raises(ValueError, match=told):
        build(base_folder, tmp_path / "library", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["my-base"]


def test_a_folder_with_other_things_is_left_alone(base_folder, tmp_path):
    with pytest.raises(ValueError, match="holds something else than a library"):
        build(base_folder, tmp_path)


def test_a_base_without_name_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="base has no name"):
        build(pico_base(), tmp_path / "library", tokenizer=tokenizer)


def test_groups(base_folder, tmp_path):
    groups = {"even": ["task0", "task2"], "all": list(TASKS)}
    library = train_groups(
        base_folder, groups, TASKS, output_dir=tmp_path / "library", steps={"even": 2, "all": 3}, sft_config=QUICK
    )
    records = [
        json.loads((tmp_path / "library-training/groups" / name / "training.json").read_text()) for name in groups
    ]
    assert [(record["rows"], record["steps"]) for record in records] == [(16, 2), (32, 3)]
    assert library["even"].origin.task == "task0, task2"
    with pytest.raises(ValueError, match="holds 'task9', for which there is no dataset"):
        train_groups(base_folder, {"x": ["task9"]}, TASKS, output_dir=tmp_path / "other")


def test_partitions_and_budgets():
    names = [f"t{i}" for i in range(7)]
    dealt = random_tasks(names, 3, seed=1)
    assert sorted(len(tasks) for tasks in dealt.values()) == [2, 2, 3]
    assert sorted(task for tasks in dealt.values() for task in tasks) == names
    assert dealt == random_tasks(names, 3, seed=1) != random_tasks(names, 3, seed=2)
    assert [private_share(steps) for steps in (2, 3, 5, 10, 100)] == [1, 1, 2, 4, 40]
    assert divided(10, ["a", "b", "c"]) == {"a": 4, "b": 3, "c": 3}


def test_the_clustering_is_drawn_and_told(base_folder, tmp_path):
    """Pictures of the private adapters' clustering lie with the work; the card shows one and tells the silhouette."""
    pytest.importorskip("matplotlib")
    library = build(base_folder, tmp_path / "library", kind="mbc")
    drawn = sorted(path.name for path in (tmp_path / "library-training/clustering").iterdir())
    assert drawn == ["dendrogram.png", "map.png", "similarity.png"]
    assert [picture.file for picture in library.notes.pictures] == ["similarity.png"]
    shown = tmp_path / "library/pictures/similarity.png"
    assert shown.read_bytes() == (tmp_path / "library-training/clustering/similarity.png").read_bytes()
    assert "](pictures/similarity.png)" in (tmp_path / "library/README.md").read_text()
    told = library.notes.made["clustering"]
    assert told["embedding"] == "delta" and told["n_clusters"] == 2 and -1 <= told["silhouette"] <= 1


def test_without_matplotlib_nothing_is_drawn(base_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    library = build(base_folder, tmp_path / "library", kind="mbc", progress=True)
    assert len(library) == 2 and library.notes.pictures == () and "silhouette" in library.notes.made["clustering"]
    told = [line for line in capsys.readouterr().err.splitlines() if "not drawn" in line]
    assert len(told) == 1 and "pip install 'peft-arrow[viz]'" in told[0]


def test_one_task_is_one_cluster(base_folder, tmp_path):
    library = build(base_folder, tmp_path / "library", {"only": TASKS["task0"]}, kind="mbc", n_clusters=1)
    assert library.notes.made["groups"] == {"cluster_0": ["only"]}
    assert library.notes.made["clustering"]["silhouette"] is None
