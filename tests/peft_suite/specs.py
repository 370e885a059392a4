"""What the upstream tests are run with: a config class, two variants of it, and every adjustment with its reason."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass, replace
from functools import cache
from typing import Any

import pytest

from tests.peft_suite.adjustments import ADOPTED, ARROW_PATCHES, HARNESS_PATCHES, Patch
from tests.peft_suite.mutant import zero_loaded_prototypes


SPEC_VARIABLE = "PEFT_SUITE_SPEC"
# The case lists of the upstream modules that are replaced, and the task type that the configs of each module name.
CASE_LISTS: dict[str, tuple[str, ...]] = {
    "test_config": ("ALL_CONFIG_CLASSES",),
    "test_custom_models": ("TEST_CASES", "ALL_PEFT_CONFIG_CLASSES", "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES"),
    "test_decoder_models": ("ALL_CONFIGS",),
    "test_encoder_decoder_models": ("ALL_CONFIGS",),
    "test_feature_extraction_models": ("ALL_CONFIGS",),
    "test_low_level_api": (),
    "test_seq_classifier": ("ALL_CONFIGS",),
    "test_token_classification_qa": ("TOKEN_CLS_CONFIGS", "QA_CONFIGS"),
    "test_quantization": ("TEST_CASES",),
}
TASK_TYPES = {
    ("test_decoder_models", "ALL_CONFIGS"): "CAUSAL_LM",
    ("test_encoder_decoder_models", "ALL_CONFIGS"): "SEQ_2_SEQ_LM",
    ("test_feature_extraction_models", "ALL_CONFIGS"): "FEATURE_EXTRACTION",
    ("test_seq_classifier", "ALL_CONFIGS"): "SEQ_CLS",
    ("test_token_classification_qa", "TOKEN_CLS_CONFIGS"): "TOKEN_CLS",
    ("test_token_classification_qa", "QA_CONFIGS"): "QUESTION_ANS",
}
# What upstream runs every method on that takes nn.Linear and Conv1D: the model of the case, and what it targets.
CUSTOM_CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Vanilla MLP 1", "MLP", {"target_modules": "lin0"}),
    ("Vanilla MLP 2", "MLP", {"target_modules": ["lin0"]}),
    ("Vanilla MLP 3", "MLP", {"target_modules": ["lin1"]}),
    ("Vanilla MLP 4", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("Vanilla MLP 5", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("Vanilla MLP 6", "MLP", {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"]}),
    ("Embedding + Conv1D 1", "EmbConv1D", {"target_modules": ["conv1d"]}),
    (
        "Embedding + Conv1D 2 trainable tokens",
        "EmbConv1D",
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}},
    ),
)
# Two adapters of one model, active together: what each of them targets.
PAIRS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("Same", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    ("Different", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    (
        "trainable tokens Same",
        {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [0, 1, 2]}},
        {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [3, 4, 5, 6]}},
    ),
    (
        "trainable tokens Different",
        {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [0, 1, 2]}},
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [3, 4, 5, 6]}},
    ),
)


@dataclass(frozen=True)
class Spec:
    """One run of the suite.

    `variants` are keyword arguments of the config class without targets; every case is run with each. `defaults` are
    those without which the class makes no adapter: they become the defaults of the class in tests that pass only
    targets. `patches` change lines of upstream tests, `xfail` and `drop` name tests (`module::test`), each with the
    reason. `sabotage` breaks the code under test on purpose.
    """

    name: str
    config: str
    prefix: str
    variants: tuple[dict[str, Any], dict[str, Any]]
    defaults: dict[str, Any] = field(default_factory=dict)
    init_argument: str = "init_weights"
    supports_merge: bool = False
    patches: tuple[Patch, ...] = ()
    xfail: dict[str, str] = field(default_factory=dict)
    drop: dict[str, str] = field(default_factory=dict)
    sabotage: Callable[[], None] | None = None

    @property
    def config_cls(self) -> type:
        """The class, imported on use: the runner itself does not load torch."""
        module, name = self.config.split(":")
        return getattr(importlib.import_module(module), name)

    @property
    def bare_cls(self) -> type:
        """The class for tests that pass it nothing but targets."""
        return _with_defaults(self.config_cls, tuple(self.defaults.items())) if self.defaults else self.config_cls

    def fresh(self, **arguments: Any) -> Any:
        """A config from the arguments that upstream gives `LoraConfig`."""
        if "init_lora_weights" in arguments:
            arguments[self.init_argument] = arguments.pop("init_lora_weights")
        return self.bare_cls(**arguments)

    def patches_for(self, module: str) -> list[Patch]:
        """The patches of one upstream module, the harness's and this spec's."""
        return [patch for patch in (*HARNESS_PATCHES, *self.patches) if patch.module == module]

    def skip_merging(self) -> bool:
        """Skip the test that asks when the method cannot merge."""
        if not self.supports_merge:
            pytest.skip(f"{self.config_cls.__name__}: routing per token cannot be merged")
        return False

    def is_copy(self, held: Any, given: Any) -> bool:
        """Whether the config that a model holds is not the one it was given, but has all that this one sets."""
        values = held.to_dict()
        return held is not given and all(values[name] == v for name, v in given.to_dict().items() if v is not None)

    def configs(self, lora: Any) -> list[Any]:
        """One config a variant, with what upstream's LoRA config of the same list sets."""
        extra: dict[str, Any] = {}
        if lora.target_modules is not None:
            extra["target_modules"] = sorted(lora.target_modules)
        if lora.init_lora_weights is False:
            extra[self.init_argument] = False
        return [self.config_cls(**variant, **extra) for variant in self.variants]

    def cases(self, module: str, name: str) -> list[tuple[Any, ...]]:
        """The content of the upstream list `name`, in its own shape."""
        if name == "ALL_PEFT_CONFIG_CLASSES":
            return [self.bare_cls]
        if name == "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES":
            return self._pairs()
        if (module, name) == ("test_custom_models", "TEST_CASES"):
            return [
                (f"{title} variant {number}", model, self.config_cls, {**variant, **targets})
                for number, variant in enumerate(self.variants, start=1)
                for title, model, targets in CUSTOM_CASES
            ]
        if module == "test_quantization":
            # A small alpha: the stand-in's twelve random layers are compared with themselves in four bits, and a large
            # random update would have the rounding decide which expert is chosen.
            extra: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 4}
        elif module == "test_config":
            extra = {}
        else:
            extra = {"task_type": TASK_TYPES[module, name], "target_modules": None}
        return [(self.config_cls, {**variant, **extra}) for variant in self.variants]

    def _pairs(self) -> list[tuple[Any, ...]]:
        rows = []
        for number, variant in enumerate(self.variants, start=1):
            for title, first, second in PAIRS:
                method = self.prefix.removesuffix("_")
                if "tokens" in title:
                    method = "lora+trainable_tokens"  # upstream's name of the model that has an embedding
                # Without dropout, as upstream's: these tests compare outputs of a model in training mode.
                base = {key: value for key, value in variant.items() if not key.endswith("dropout")}
                base[self.init_argument] = False
                rows.append((f"{title} variant {number}", method, self.config_cls, base | first, base | second))
        return rows


LORA = Spec(
    name="lora",
    config="peft:LoraConfig",
    prefix="lora_",
    # r=8 and no rslora: upstream's tests of weighted adapters are written for them.
    variants=({"r": 8, "lora_alpha": 32, "lora_dropout": 0.05}, {"r": 8, "lora_alpha": 16}),
    init_argument="init_lora_weights",
    supports_merge=True,
)
ARROW = Spec(
    name="arrow",
    config="peft_arrow:ArrowLoraConfig",
    prefix="arrow_lora_",
    defaults={"num_experts": 2},
    patches=ARROW_PATCHES,
    drop={"test_quantization::test_merge_unmerge_unload": "routing per token cannot be merged"},
    variants=(
        {"num_experts": 2, "top_k": 1, "r": 8, "lora_alpha": 32, "lora_dropout": 0.05},
        {"num_experts": 3, "top_k": 2, "r": 4, "lora_alpha": 16, "use_rslora": True, "aggregation": "parameter"},
    ),
)
MUTANT = replace(ARROW, name="mutant", sabotage=zero_loaded_prototypes)
SPECS = {spec.name: spec for spec in (ARROW, LORA, MUTANT)}


@cache
def _with_defaults(config_cls: type, defaults: tuple[tuple[str, Any], ...]) -> type:
    """A subclass of the config, a dataclass like it, with other defaults; importable, so that it can be pickled."""
    members = [(name, type(value), field(default=value)) for name, value in defaults]
    made = make_dataclass(f"Default{config_cls.__name__}", members, bases=(config_cls,))
    made.__module__ = __name__
    globals()[made.__name__] = made
    return made


def active() -> Spec:
    """The spec of this run, which the runner hands down to pytest and its workers."""
    return SPECS[os.environ[SPEC_VARIABLE]]


def described(spec: Spec) -> list[str]:
    """Every adjustment of a run, one a line."""
    lines = [f"patch {patch.module}: {patch.reason}" for patch in (*HARNESS_PATCHES, *spec.patches)]
    lines += [f"xfail {test}: {reason}" for test, reason in spec.xfail.items()]
    lines += [f"drop {test}: {reason}" for test, reason in spec.drop.items()]
    return lines + [f"adopt {module}::{test}" for module, tests in ADOPTED.items() for test in tests]
