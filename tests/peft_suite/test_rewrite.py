"""The harness itself, on a module small enough to read."""

from __future__ import annotations

import ast

import pytest

from tests.peft_suite.adjustments import Patch
from tests.peft_suite.rewrite import UpstreamChanged, patched, rewrite
from tests.peft_suite.runner import read_report
from tests.peft_suite.specs import LORA, SPEC_VARIABLE, SPECS


MODULE = "test_token_classification_qa"
SOURCE = """import pytest
from peft import IA3Config, LoraConfig

MODELS = ["some-org/tiny-model"]
TOKEN_CLS_CONFIGS = [
    (LoraConfig, {"r": 2}),
    (IA3Config, {}),
]
QA_CONFIGS = TOKEN_CLS_CONFIGS


class Loader:
    model_id = "some-org/loaded-model"


class TestA:
    @pytest.mark.parametrize("model_id", MODELS)
    @pytest.mark.parametrize("config_cls,config_kwargs", TOKEN_CLS_CONFIGS)
    def test_listed(self, model_id, config_cls, config_kwargs):
        assert config_cls(**config_kwargs).r in (2, 8)

    @pytest.mark.parametrize(
        "config_cls",
        [
            IA3Config,
            LoraConfig,
        ],
    )
    def test_inline(self, config_cls):
        assert config_cls is LoraConfig

    @pytest.mark.parametrize("config_cls", [IA3Config, LoraConfig])
    def test_ignores_its_class(self, config_cls):
        assert LoraConfig(r=3).r == 3

    def test_takes_no_config(self):
        assert "dropped-org/model"


class TestB:
    def test_takes_no_config_either(self):
        assert LoraConfig
"""


def test_lists_are_replaced_and_other_tests_dropped():
    result = rewrite(MODULE, SOURCE, LORA)
    assert result.kept == ["TestA.test_listed", "TestA.test_inline"]
    assert result.dropped == [
        "TestA.test_ignores_its_class",
        "TestA.test_takes_no_config",
        "TestB.test_takes_no_config_either",
    ]
    assert result.hub_ids == {"some-org/tiny-model", "some-org/loaded-model"}
    assert "IA3Config" not in result.source.split("class TestA")[1]


def test_every_kept_line_stays_where_it_was():
    lines = rewrite(MODULE, SOURCE, LORA).source.splitlines()
    for number, line in enumerate(SOURCE.splitlines()):
        if line.strip().startswith(("def test_listed", "assert config_cls", "def test_inline")):
            assert lines[number] == line


def test_the_rewritten_module_has_the_cases_of_the_spec(monkeypatch):
    monkeypatch.setenv(SPEC_VARIABLE, "lora")
    namespace: dict = {}
    exec(compile(ast.parse(rewrite(MODULE, SOURCE, LORA).source), MODULE, "exec"), namespace)
    assert [kwargs["r"] for _, kwargs in namespace["TOKEN_CLS_CONFIGS"]] == [8, 8]
    assert {kwargs["task_type"] for _, kwargs in namespace["QA_CONFIGS"]} == {"QUESTION_ANS"}


def test_a_list_that_upstream_renamed_is_an_error():
    with pytest.raises(UpstreamChanged, match="no list QA_CONFIGS"):
        rewrite(MODULE, SOURCE.replace("QA_CONFIGS", "OTHER_CONFIGS"), LORA)


def test_a_patch_that_does_not_apply_is_an_error():
    class Spec:
        def patches_for(self, module):
            return [Patch(module, "not there", "anything", "to see that it is noticed")]

    with pytest.raises(UpstreamChanged, match="to see that it is noticed"):
        patched(MODULE, SOURCE, Spec())


@pytest.mark.parametrize("name", sorted(SPECS))
def test_every_adjustment_has_a_reason(name):
    spec = SPECS[name]
    reasons = [patch.reason for patch in spec.patches] + [*spec.xfail.values(), *spec.drop.values()]
    assert all(len(reason) > 20 for reason in reasons)


def test_reports_are_counted(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="passes"/>'
        '<testcase classname="a" name="skips"><skipped message="why"/></testcase>'
        '<testcase classname="a" name="fails"><failure/></testcase>'
        '<testcase classname="a" name="breaks"><error/></testcase></testsuite></testsuites>'
    )
    counts = read_report(report)
    assert (counts.collected, counts.passed, counts.skipped, counts.failed) == (4, 1, 1, 2)
    assert counts.failures == ["a::fails", "a::breaks"]
    assert counts.skip_reasons == {"why": 1}
