"""Vetting: a bad adapter for every finding, good ones without any; and the tuner must agree."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from peft_arrow import Adapter, AdapterRef, ArrowLoraModel
from peft_arrow.library.base_shapes import BaseShapes
from peft_arrow.library.library import AdapterLibrary
from peft_arrow.library.report import AdapterReport, AdapterReports, Finding
from peft_arrow.library.serving import vllm_notes
from peft_arrow.library.vetting import vet_adapter, vet_adapters
from tests.pico import pico_adapter, pico_base


Q = "base_model.model.model.layers.0.self_attn.q_proj"
CARD = "---\nlicense: apache-2.0\ndatasets: [ann/words]\n---\n# An adapter\n"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """One good adapter and the folder of a base."""
    root = tmp_path_factory.mktemp("shelf")
    pico_adapter(root / "good", seed=1, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    (root / "good" / "README.md").write_text(CARD)
    edit_config(root / "good", base_model_name_or_path="ann/base")
    pico_base().save_pretrained(root / "base")
    return root


@pytest.fixture(scope="module")
def shapes(shelf) -> BaseShapes:
    """The base by its config, under the name that the adapters give."""
    found = BaseShapes.of(shelf / "base")
    found.name = "ann/base"
    return found


def edit_config(folder: Path, **changes) -> None:
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict], None]) -> None:
    path = Path(folder) / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.fixture
def bad(shelf, tmp_path) -> Callable[..., Path]:
    """Make a copy of the good adapter with something wrong in it."""

    def make(weights: Callable[[dict], None] | None = None, **config) -> Path:
        folder = Path(shutil.copytree(shelf / "good", tmp_path / "bad"))
        edit_config(folder, **config)
        if weights:
            edit_weights(folder, weights)
        return folder

    return make


def codes(findings) -> list[str]:
    return [finding.code for finding in findings]


def test_a_good_adapter(shelf, shapes):
    """Nothing is found, and everything told."""
    report = vet_adapter(str(shelf / "good"), shapes, licenses=["Apache 2.0"])
    assert report.ok and not report.warnings and not report.notes
    assert (report.name, report.source, report.rank, report.ranks, report.alpha) == (
        "good",
        str(shelf / "good"),
        4,
        (4,),
        8.0,
    )
    assert report.target_modules == ("q_proj", "v_proj") and report.task_type == "CAUSAL_LM"
    assert report.license == "apache-2.0" and report.datasets == ("ann/words",) and report.base_model == "ann/base"
    assert report.size == (shelf / "good/adapter_model.safetensors").stat().st_size
    assert report.parameters == 2 * (4 * (32 + 32) + 4 * (32 + 16))
    assert report.weights_read and report.statistics["norm"] > 0
    assert report.commit is None and report.downloads is None


@pytest.mark.filterwarnings("ignore:Could not find a config file in ann/base")
@pytest.mark.parametrize("form", ["path", "ref", "adapter", "peft"])
def test_forms_of_a_reference(shelf, form):
    """A Path, an AdapterRef, an Adapter; in memory there is no licence and no file."""
    reference = {
        "path": lambda: shelf / "good",
        "ref": lambda: AdapterRef(shelf, subfolder="good"),
        "adapter": lambda: Adapter("good", {}, {}),
        "peft": lambda: Adapter.from_peft_model(
            PeftModel.from_pretrained(pico_base(), str(shelf / "good")), name="good"
        ),
    }[form]()
    report = vet_adapter(reference, pico_base())
    assert report.name == "good" and report.ok is (form != "adapter")
    if form == "peft":
        assert (
            report.rank == 4 and report.size == report.parameters * 4 and codes(report.warnings) == ["license_missing"]
        )


def test_arguments(shelf, tmp_path):
    """Wrong arguments are errors, bad adapters are not."""
    with pytest.raises(TypeError, match="pass a model, a Hub id, a folder or None"):
        vet_adapter(str(shelf / "good"), 7)
    with pytest.raises(TypeError, match="holds 7 of type int"):
        vet_adapter(7, None)
    with pytest.raises(TypeError, match="pass a list of references"):
        vet_adapters(7)
    with pytest.raises(TypeError, match="licenses='mit' is a string"):
        vet_adapter(str(shelf / "good"), None, licenses="mit")
    with pytest.raises(ValueError, match="is not allowed; a name is"):
        vet_adapters({"a/b": shelf / "good"})
    for name in "ab":
        shutil.copytree(shelf / "good", tmp_path / "many" / name)
    with pytest.raises(ValueError, match="is a library of 2 adapters; vet_adapters takes those"):
        vet_adapter(tmp_path / "many", None)


def poke(key: str, value: float) -> Callable[[dict], None]:
    def change(tensors: dict) -> None:
        tensors[key][0, 0] = value

    return change


def all_zero(tensors: dict) -> None:
    for key, tensor in tensors.items():
        if "lora_B" in key:
            tensor.zero_()


def wider(tensors: dict) -> None:
    tensors[f"{Q}.lora_A.weight"] = torch.ones(4, 40)


def one_more_layer(tensors: dict) -> None:
    for half in "AB":
        tensors[f"{Q.replace('.0.', '.7.')}.lora_{half}.weight"] = tensors[f"{Q}.lora_{half}.weight"].clone()


PROBLEMS = {
    "dora": ("unsupported_kind", "use_dora=True is not supported", None, {"use_dora": True}),
    "ia3": ("unsupported_kind", "peft_type is 'IA3'", None, {"peft_type": "IA3"}),
    "loftq": ("unsupported_kind", "changed the base weights in training", None, {"init_lora_weights": "loftq"}),
    "embedding": (
        "unsupported_kind",
        "adapts an embedding",
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 9)}),
        {},
    ),
    "types": ("malformed", "allowed types are", None, {"rank_pattern": 7}),
    "rank": ("malformed", "but its config says rank 16", None, {"r": 16}),
    "rank type": ("malformed", "it must be a whole number", None, {"r": "four"}),
    "half": ("malformed", "lora_B.weight is missing", lambda t: t.pop(f"{Q}.lora_B.weight"), {}),
    "more": ("malformed", "neither LoRA factors nor listed", lambda t: t.update({"x.y": torch.ones(2)}), {}),
    "integers": (
        "malformed",
        "no floating-point numbers",
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}),
        {},
    ),
    "empty": ("malformed", "holds no lora_A", lambda t: t.clear(), {}),
    "targets": ("malformed", "Its config targets model.layers.0.mlp.up_proj", None, {"target_modules": ["up_proj"]}),
    "no targets": ("malformed", "layers_to_transform", None, {"target_modules": "q_proj", "layers_to_transform": [0]}),
    "replication": ("malformed", "must be a list of pairs of layers", None, {"layer_replication": [["a", 1]]}),
    "width": ("wrong_base", "maps 40 to 32 features in the adapter and 32 to 32 in the base (1 of 4", wider, {}),
    "modules": ("wrong_base", "has no module 'model.layers.7.self_attn.q_proj' (1 of 5", one_more_layer, {}),
    "kind of module": (
        "unsupported_kind",
        "model.embed_tokens is a Embedding",
        lambda t: t.update(
            {
                "base_model.model.model.embed_tokens.lora_A.weight": torch.ones(4, 104),
                "base_model.model.model.embed_tokens.lora_B.weight": torch.ones(32, 4),
            }
        ),
        {},
    ),
    "nan": ("not_finite", "q_proj.lora_A holds NaN or Inf (1 tensor", poke(f"{Q}.lora_A.weight", math.nan), {}),
    "inf": ("not_finite", "q_proj.lora_B holds NaN or Inf", poke(f"{Q}.lora_B.weight", -math.inf), {}),
    "zero": ("zero_update", "Its whole update is zero", all_zero, {}),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems(bad, shapes, case):
    """Each has its code and says what to do; and what is refused here is refused by the tuner."""
    code, text, weights, config = PROBLEMS[case]
    folder = bad(weights, **config)
    report = vet_adapter(folder, shapes)
    assert not report.ok and code in codes(report.problems), report.problems
    finding = next(finding for finding in report.problems if finding.code == code)
    assert text in finding and str(folder) not in finding and len(report.problems) == 1
    with pytest.raises((ValueError, TypeError)):
        ArrowLoraModel.from_pretrained(pico_base(), [folder])


def test_the_tuner_takes_what_is_ok(shelf, bad, shapes):
    """Patterns, rslora, PiSSA, half precision: no problem here, no error there."""
    folder = bad(lambda t: t.update({key: tensor.half() for key, tensor in t.items()}), use_rslora=True)
    assert vet_adapter(folder, shapes).ok
    edit_config(folder, init_lora_weights="pissa", alpha_pattern={"q_proj": 2})
    report = vet_adapter(folder, shapes)
    assert report.ok and codes(report.warnings) == ["base_changing_init"] and report.statistics is None
    assert ArrowLoraModel.from_pretrained(pico_base(), [folder, shelf / "good"]).expert_names == ["bad", "good"]


def test_files_that_are_not_there(bad, shapes, tmp_path):
    """A pickle, no weights, a cut file, a damaged config, an empty folder, no folder, nobody's repository."""
    folder = bad()
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:200])
    assert codes(vet_adapter(folder, shapes).problems) == ["unreadable_weights"]
    weights.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    assert codes(vet_adapter(folder, shapes).problems) == ["unreadable_weights"]
    weights.rename(folder / "adapter_model.bin")
    report = vet_adapter(folder, shapes)
    assert codes(report.problems) == ["pickle_only"] and report.target_modules == ("q_proj", "v_proj")
    (folder / "adapter_model.bin").unlink()
    assert codes(vet_adapter(folder, shapes).problems) == ["unreadable_weights"]
    (folder / "adapter_config.json").write_text("{")
    assert codes(vet_adapter(folder, shapes).problems) == ["damaged_config"]
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", tmp_path / "missing", "nobody/nothing", "nobody"):
        report = vet_adapter(nothing, shapes)
        assert codes(report.problems) == ["not_found"] and report.name == str(nothing).split("/")[-1]


def test_sizes_that_no_adapter_has(shelf, shapes):
    """A header may state anything; nothing of that size is made."""
    good = vet_adapter(shelf / "good", shapes)
    tensor = torch.empty(2**40, 2, device="meta")
    report = vet_adapter(Adapter("huge", {"peft_type": "LORA", "r": 2}, {f"{Q}.lora_A.weight": tensor}), shapes)
    assert codes(report.problems) == ["malformed"] and good.ok


@pytest.mark.parametrize(
    "named, name, known, found",
    [
        ("ann/base", "ann/base", True, []),
        ("/home/ann/base", "ann/base", True, []),
        ("unsloth/base-bnb-4bit", "ann/base", True, []),
        ("bob/other", "ann/base", True, ["base_name"]),
        (None, "ann/base", True, ["base_unnamed"]),
        ("bob/other", None, True, []),
        ("ann/base", "ann/base", False, ["base_unseen"]),
        (None, "ann/base", False, ["base_unnamed"]),
        ("bob/other", "ann/base", False, ["wrong_base"]),
    ],
)
def test_names_are_a_hint_and_shapes_judge(bad, named, name, known, found):
    """Fitting shapes with another name are a warning; another name without shapes is a problem."""
    shapes = BaseShapes(name, pico_base()) if known else BaseShapes(name, reason="there is no config")
    report = vet_adapter(bad(base_model_name_or_path=named), shapes)
    assert codes([*report.problems, *report.warnings]) == found
    assert report.ok is (found != ["wrong_base"])


def test_without_a_base(shelf, bad):
    """Nothing is said about fitting; a config without a name is worth a word."""
    assert not vet_adapter(shelf / "good", None).warnings
    assert codes(vet_adapter(bad(base_model_name_or_path=None), None).warnings) == ["base_unnamed"]


@pytest.mark.parametrize(
    "stated, allowed, problem, warning",
    [
        ("apache-2.0", None, [], []),
        ("license", None, [], ["license_missing"]),
        (None, None, [], ["license_missing"]),
        ("my-own-terms", None, [], ["license_unknown"]),
        ("apache-2.0", ["mit", "apache-2.0"], [], []),
        ("mit", ["apache-2.0"], ["license_not_allowed"], []),
        ("license", ["apache-2.0"], ["license_not_allowed"], []),
        (None, ["apache-2.0", "unknown"], [], ["license_missing"]),
        ("mit", [], ["license_not_allowed"], []),
    ],
)
def test_licences(bad, shapes, stated, allowed, problem, warning):
    """Missing and unknown ones are a warning, what is not in the list a problem; TRL's word counts as missing."""
    folder = bad()
    (folder / "README.md").write_text(f"---\nlicense: {stated}\n---\n" if stated else "# no metadata")
    report = vet_adapter(folder, shapes, licenses=allowed)
    assert codes(report.problems) == problem and codes(report.warnings) == warning


def test_trained_modules(tmp_path, shapes):
    """A trained head is taken along, with a word; one that does not fit the loaded base is a problem."""
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "r": 2}
    head = Path(pico_adapter(tmp_path / "head", seed=1, **options))
    report = vet_adapter(head, pico_base())
    assert report.ok and "trained_modules" in codes(report.warnings)
    key = next(key for key in load_file(head / "adapter_model.safetensors") if "lm_head" in key)
    edit_weights(head, lambda t: t.update({key: torch.ones(5, 32)}))
    assert codes(vet_adapter(head, pico_base()).problems) == ["wrong_head"]
    report = vet_adapter(head, shapes)
    assert report.ok and "wrong_head" in codes(report.warnings)
    edit_weights(head, lambda t: t.update({key: torch.full((5, 32), math.nan)}))
    assert "not_finite" in codes(vet_adapter(head, shapes).problems)


def test_copies_of_the_base(tmp_path, shapes):
    """An embedding in the file must be the base's own; without the base's weights that cannot be told."""
    base = pico_base()
    folder = Path(pico_adapter(tmp_path / "a", seed=1, r=2, target_modules=["q_proj"]))
    key = "base_model.model.model.embed_tokens.weight"
    same = base.model.embed_tokens.weight.detach().clone()
    edit_weights(folder, lambda t: t.update({key: same}))
    assert vet_adapter(folder, base).ok and "trained_copies" not in codes(vet_adapter(folder, base).warnings)
    for unsure in (vet_adapter(folder, shapes), vet_adapter(folder, base, weights=False), vet_adapter(folder, None)):
        assert unsure.ok and "trained_copies" in codes(unsure.warnings)
    for other in (same + 1, torch.ones(9, 32)):
        edit_weights(folder, lambda t, other=other: t.update({key: other}))
        assert codes(vet_adapter(folder, base).problems) == ["trained_copies"]
        with pytest.raises(ValueError, match="with other values than the base model"):
            ArrowLoraModel.from_pretrained(pico_base(), [folder])
    assert codes(vet_adapter(folder, shapes).problems) == ["trained_copies"]


def test_weights_are_read_when_asked_for(bad, shapes):
    """weights=False leaves NaN unseen, says so, and compares nothing."""
    folder = bad(poke(f"{Q}.lora_A.weight", math.nan))
    report = vet_adapter(folder, shapes, weights=False)
    assert report.ok and not report.weights_read and report.statistics is None
    assert "only config and header were read" in report_remark([folder], shapes, weights=False)
    assert not vet_adapter(folder, shapes, weights=True).ok


def report_remark(refs, shapes, **options) -> str:
    return " ".join(vet_adapters(refs, shapes, **options).remarks)


def test_many(shelf, bad, shapes, tmp_path):
    """A bad reference stops no other; names are unique; a parent folder is its subfolders; the order is kept."""
    broken = bad(use_dora=True)
    refs = [shelf / "good", "nobody/nothing", str(broken), shelf / "good"]
    reports = vet_adapters(refs, shapes)
    assert [report.name for report in reports] == ["good", "nothing", "bad", "good-2"]
    assert [report.ok for report in reports] == [True, False, False, True]
    assert isinstance(reports[0], AdapterReport) and len(reports[1:3]) == 2
    assert [(pair.first, pair.second) for pair in reports.duplicates] == [("good", "good-2")]
    assert reports.duplicates[0].cosine == pytest.approx(1)
    assert [report.name for report in vet_adapters({"x": shelf / "good", "y": "nobody/nothing"}, shapes)] == ["x", "y"]
    inside = vet_adapters(shelf, shapes)
    assert [report.name for report in inside] == ["good"]
    (tmp_path / "parent/b").mkdir(parents=True)
    shutil.copytree(shelf / "good", tmp_path / "parent/a")
    shutil.copy(shelf / "good/adapter_model.safetensors", tmp_path / "parent/b")
    assert [(r.name, r.ok) for r in vet_adapters([tmp_path / "parent"], shapes)] == [("a", True), ("b", False)]
    assert len(vet_adapters([], shapes)) == 0


def test_a_library(shelf, bad, shapes, tmp_path):
    """In memory and as a folder it is its experts; a file that library.json does not state is a problem."""
    library = AdapterLibrary.from_pretrained({"one": shelf / "good", "two": bad(lora_alpha=2)})
    library.save_pretrained(tmp_path / "library")
    for form in (library, tmp_path / "library", [str(tmp_path / "library")]):
        reports = vet_adapters(form, shapes)
        assert [(report.name, report.ok, report.license) for report in reports] == [
            ("one", True, "apache-2.0"),
            ("two", True, "apache-2.0"),
        ]
    edit_weights(tmp_path / "library/experts/two", all_zero)
    reports = vet_adapters(tmp_path / "library", shapes)
    assert (
        reports[0].ok and codes(reports[1].problems) == ["unreadable_weights"] and "sha256" in reports[1].problems[0]
    )


def test_outliers_of_a_library(tmp_path, shapes):
    """Eight adapters of which one is loud: it is named, and it stays usable."""
    for seed in range(8):
        folder = Path(pico_adapter(tmp_path / f"a{seed}", seed=seed, r=2, target_modules=["q_proj", "v_proj"]))
        (folder / "README.md").write_text(CARD)
        edit_config(folder, base_model_name_or_path="ann/base", **({"lora_alpha": 800} if seed == 5 else {}))
    reports = vet_adapters(tmp_path, shapes)
    assert {outlier.name for outlier in reports.outliers} == {"a5"} and all(report.ok for report in reports)
    assert "Unusual weights" in reports.table() and "no verdict" in reports.table()
    assert "needs the weights of at least 8" in report_remark([tmp_path / "a1", tmp_path / "a2"], shapes)


def test_the_named_base(shelf, bad):
    """By default the base that most adapters name, if it can be read."""
    folder = bad(base_model_name_or_path=str(shelf / "base"))
    reports = vet_adapters([folder, str(folder), shelf / "good"])
    assert reports.base == "base" and [report.ok for report in reports] == [True, True, True]
    assert codes(reports[2].warnings) == []  # "ann/base" and the folder "base" can be the same
    unread = vet_adapters([shelf / "good"])
    assert unread.base == "ann/base" and codes(unread[0].warnings) == ["base_unseen"]
    assert vet_adapters([shelf / "good"], None).base is None


def test_reports_as_data(shelf, bad, shapes, tmp_path):
    """A finding is its text and has a code; JSON holds everything, in ASCII, and no NaN."""
    finding = Finding("wrong_base", "It is not for this base.")
    assert finding == "It is not for this base." and finding.code == "wrong_base"
    folder = bad(base_model_name_or_path="evil\x1b[31m\u202e\nname", lora_alpha=8)
    reports = vet_adapters([shelf / "good", folder], shapes)
    text = reports.to_json(tmp_path / "reports.json")
    assert text.isascii() and (tmp_path / "reports.json").read_text().strip() == text
    content = json.loads(text)
    assert content["base"] == "ann/base" and [a["ok"] for a in content["adapters"]] == [True, True]
    assert content["adapters"][1]["warnings"][0]["code"] == "base_name"
    assert content["duplicates"][0]["first"] == "good"
    one = replace(reports[0], statistics={"norm": math.nan})
    assert json.loads(one.to_json())["statistics"]["norm"] is None
    assert one.to_dict()["ranks"] == [4]


def test_strangers_do_not_steer_the_terminal(bad, shapes):
    """Control characters, direction marks and new lines of metadata; names and texts of any length."""
    folder = bad(base_model_name_or_path="evil\x1b[2J\u202e\r\nname" + "x" * 5000, target_modules=["\x1b[31mq_proj"])
    (folder / "README.md").write_text('---\nlicense: "own\\n\\e[2Jterms"\n---\n')
    reports = vet_adapters([folder], shapes, licenses=["mit"])
    for width in (40, 100, 300):
        text = reports.table(width)
        lines = text.split("\n")
        assert all(mark.isprintable() or mark == "\n" for mark in text) and "\u202e" not in text
        assert max(map(len, lines)) <= max(width, 66) and len(lines) < 80


def test_the_width(shelf, shapes, monkeypatch):
    """Given, or 100 where there is no terminal, whatever COLUMNS says."""
    reports = vet_adapters([shelf / "good", "nobody/nothing"], shapes)
    monkeypatch.setenv("COLUMNS", "50")
    assert reports.table() == reports.table(100) == str(reports) != reports.table(70)
    assert max(map(len, reports.table(70).split("\n"))) <= 70
    assert AdapterReports(()).table().startswith("0 adapters: nothing to show.")


@pytest.mark.parametrize(
    "config, shapes, expected",
    [
        ({}, {}, []),
        ({"r": 64}, {}, ["--max-lora-rank 64"]),
        ({"r": 20}, {}, ["--max-lora-rank 32"]),
        ({"r": 1000}, {}, ["at most 512"]),
        ({"bias": "all"}, {}, ["only bias='none'"]),
        ({"modules_to_save": ["lm_head"]}, {}, ["modules_to_save"]),
        ({"use_dora": True}, {}, ["DoRA"]),
        ({"init_lora_weights": "pissa"}, {}, ["init_lora_weights='pissa'"]),
        ({"init_lora_weights": "gaussian"}, {}, []),
        ({"rank_pattern": {"q_proj": 8}}, {}, ["one rank"]),
        ({"alpha_pattern": {"q_proj": 8}}, {}, ["one rank"]),
        ({}, {"a.lora_A.weight": (8, 32), "b.lora_A.weight": (4, 32)}, ["one rank"]),
        ({"lora_alpha": None}, {}, ["vLLM needs lora_alpha"]),
    ],
)
def test_vllm(config, shapes, expected):
    """Its rules, one by one."""
    notes = vllm_notes({"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none", **config}, shapes)
    assert len(notes) == len(expected) and all(text in note for text, note in zip(expected, notes))
