"""Rows of every form, and tasks made of them; what cannot be judged is refused with the task and the row."""

from __future__ import annotations

import json

import pytest

from peft_arrow.evaluation.rows import read_row
from peft_arrow.evaluation.tasks import Task, evenly, list_tasks, own_experts, read_task


def row(**columns):
    return read_row(columns, "task 't', row 0")


def test_training_rows_are_joined_as_trl_joins_them():
    read = row(prompt="2 + 2 =", completion=" 4")
    assert (read.prompt, read.completion, read.options) == ("2 + 2 =", " 4", ())
    read = row(instruction="Add.", input="2 2", output="4", references=["4", "four"])
    assert read.prompt == "Add.\n\n2 2\n" and read.completion == "4" and read.references == ("4", "four")
    assert row(instruction="Say hi.", input=None, output="hi").prompt == "Say hi.\n"


def test_gold_is_found_among_the_options():
    read = row(instruction="Good?", output=" yes", options=["no", "yes"])
    assert (read.gold, read.references, read.continuations()) == (1, ("yes",), ("no", "yes"))
    read = row(input="Water is", options=["dry", "wet"], gold=1, output="wet")
    assert (read.prompt, read.delimiter, read.completion) == ("Water is", " ", " wet")
    assert row(input="Water is\n", options=["dry", "wet"], gold=1).delimiter == ""
    assert read_row({"input": "a", "options": ["b", "c"], "gold": 0}, "row", None, "->").completion == "->b"


def test_chats(tokenizer):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    read = read_row({"messages": messages}, "row", tokenizer)
    assert (read.prompt, read.completion, read.is_templated) == ("user: hi\nassistant: ", "ho", True)
    split = read_row({"prompt": messages[:1], "completion": messages[1:]}, "row", tokenizer)
    assert split == read
    asked = read_row({"messages": messages[:1], "options": ["ho", "hu"], "gold": 1}, "row", tokenizer)
    assert asked.prompt == "user: hi\n" and asked.references == ("hu",)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": "a"}, r"task 't', row 0 has the columns \['question'\]; allowed are 'prompt'"),
        ({"prompt": "a", "completion": ["b"]}, "the answer is .* must be a text"),
        ({"prompt": "a"}, "has no answer to compare with"),
        ({"prompt": "a", "completion": " "}, "has no answer to compare with"),
        ({"prompt": "a", "completion": "b", "references": "b"}, "references='b' must be a list of texts"),
        ({"prompt": "a", "completion": "b", "options": ["b"]}, r"has 1 option, \['b'\]; a choice is between at least"),
        ({"prompt": "a", "completion": "b", "options": ["c", "d"]}, "the answer 'b' is none of the options"),
        ({"prompt": "a", "options": ["c", "d"]}, "the answer None is none of the options"),
        ({"prompt": "a", "options": ["c", "c"], "gold": 0}, "holds an option twice"),
        ({"prompt": "a", "options": ["c", ""], "gold": 0}, "texts that are not empty"),
        ({"prompt": "a", "options": ["c", "d"], "gold": 2}, "gold=2 must be a position in the 2 options"),
        ({"prompt": "a", "options": ["c", "d"], "gold": True}, "gold=True must be a position"),
        ({"messages": [{"role": "user", "content": "a"}]}, "is a chat, and the tokenizer has no chat template"),
    ],
)
def test_rows_that_cannot_be_judged(columns, message):
    with pytest.raises(ValueError, match=message):
        row(**columns)


def rows_of(split, count):
    return [{"prompt": f"{split}{n}", "completion": "x", "split": split} for n in range(count)]


def test_training_rows_are_never_judged(tokenizer):
    read = read_task(Task("t", rows_of("train", 6) + rows_of("test", 4)), tokenizer, max_rows=2, selection_rows=3)
    assert [one.prompt for one in read.rows] == ["test0", "test2"]
    assert [one.prompt for one in read.selection] == ["train0", "train2", "train4"]
    given = read_task(Task("t", rows_of("test", 2), selection=rows_of("train", 1)), tokenizer)
    assert len(given.selection) == 1 and given.repeated == 0
    again = read_task(Task("t", rows_of("test", 3), selection=rows_of("test", 2)), tokenizer)
    assert again.repeated == 2
    with pytest.raises(ValueError, match="2 rows, all of them of the split 'train'"):
        read_task(Task("t", rows_of("train", 2)), tokenizer)
    with pytest.raises(ValueError, match="'t' has no rows"):
        read_task(Task("t", []), tokenizer)


def test_the_kind_of_a_task(tokenizer):
    choice = [{"prompt": "a", "options": ["b", "c"], "gold": 0}]
    assert read_task(Task("t", choice), tokenizer).kind == "choice"
    assert read_task(Task("t", choice, kind="generation"), tokenizer).kind == "generation"
    with pytest.raises(ValueError, match="task 't', row 1 has no options, and the task is a choice"):
        read_task(Task("t", [*choice, *rows_of("test", 1)]), tokenizer)
    with pytest.raises(ValueError, match="kind='quiz' is unknown"):
        read_task(Task("t", choice, kind="quiz"), tokenizer)


def test_the_fingerprint_follows_the_judged_rows(tokenizer):
    marks = {
        read_task(task, tokenizer).fingerprint
        for task in (
            Task("t", rows_of("test", 2)),
            Task("t", rows_of("test", 3)),
            Task("t", rows_of("test", 2), until=("\n",)),
            Task("t", rows_of("test", 2), delimiter=" "),
        )
    }
    assert len(marks) == 4
    same = read_task(Task("u", rows_of("test", 2) + rows_of("train", 2)), tokenizer).fingerprint
    assert same in marks


def test_tasks_from_files(tmp_path, tokenizer):
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows_of("test", 2))) + "\n\n")
    (tmp_path / "a.jsonl").write_text(json.dumps(rows_of("test", 1)[0]))
    assert [task.name for task in list_tasks(tmp_path)] == ["a", "b"]
    assert [task.name for task in list_tasks([tmp_path / "b.jsonl", Task("c", [])])] == ["b", "c"]
    assert list_tasks({"z": Task("c", [])})[0].name == "z"
    assert len(read_task(list_tasks(tmp_path)[1], tokenizer).rows) == 2
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": ')
    with pytest.raises(ValueError, match="task 'bad': line 2 of .* is not JSON"):
        read_task(Task("bad", tmp_path / "bad.jsonl"), tokenizer)
    (tmp_path / "bad.jsonl").write_text("[]")
    with pytest.raises(ValueError, match="is not a row"):
        read_task(Task("bad", str(tmp_path / "bad.jsonl")), tokenizer)
    with pytest.raises(ValueError, match="there is no file"):
        read_task(Task("none", tmp_path / "none.jsonl"), tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no .jsonl file"):
        list_tasks(tmp_path / "empty")
    with pytest.raises(ValueError, match="each name once"):
        list_tasks([tmp_path / "a.jsonl", tmp_path / "a.jsonl"])
    with pytest.raises(ValueError, match="holds a int"):
        list_tasks([3])


def test_own_experts(tokenizer):
    tasks = [read_task(Task(name, rows_of("test", 1)), tokenizer) for name in ("a", "b", "c")]
    assert own_experts(tasks, ["b", "x"], {"a": "x"}) == {"a": "x", "b": "b"}
    with pytest.raises(ValueError, match="own expert 'y' is not in the library"):
        own_experts(tasks, ["b"], {"a": "y"})
    assert own_experts(tasks, ["b"], {"a": "y"}, is_only=False) == {"b": "b"}
    with pytest.raises(ValueError, match="oracle names the task 'd'"):
        own_experts(tasks, ["b"], {"d": "b"})


def test_rows_are_taken_evenly():
    assert evenly(range(10), 3) == [0, 3, 6] and evenly(range(2), 3) == [0, 1] and evenly(range(2), None) == [0, 1]
    assert evenly(range(3), 0) == []
