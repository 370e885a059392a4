"""Every change made to upstream's tests, with its reason. docs/peft-suite.md lists them for the reader."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Patch:
    """A text of an upstream module and what stands there instead; it must be there, or the run is refused."""

    module: str
    old: str
    new: str
    reason: str


MIXED = "upstream writes out which methods take mixed batches (adapter_names): the tests are run instead of skipped"
# What the harness itself needs, whatever the config class.
HARNESS_PATCHES: tuple[Patch, ...] = (
    *(
        Patch(
            module,
            "from diffusers import StableDiffusionPipeline",
            "class StableDiffusionPipeline: pass",
            "diffusers is not installed, and the tests that are kept ask for the name only in isinstance",
        )
        for module in ("testing_common", "test_low_level_api")
    ),
    Patch(
        "testing_common",
        "if issubclass(config_cls, PromptLearningConfig):\n"
        '        pytest.skip("Prompt learning does not support merging',
        "if _spec.skip_merging() or issubclass(config_cls, PromptLearningConfig):\n"
        '        pytest.skip("Prompt learning does not support merging',
        "upstream writes out which methods cannot merge",
    ),
    Patch(
        "testing_utils",
        'is_offline = override.get("HF_HUB_OFFLINE", False) == "1"',
        "is_offline = True",
        "hub_online_once asks the Hub at the first use of a model id: a test that does is to fail, and at once",
    ),
    Patch(
        "testing_common",
        "if config_cls not in (IA3Config, LoHaConfig, LoKrConfig, LoraConfig):",
        "if config_cls not in (_spec.config_cls, IA3Config, LoHaConfig, LoKrConfig, LoraConfig):",
        "upstream writes out which methods take Conv1D layers: the tests are run instead of skipped",
    ),
    Patch(
        "testing_common",
        "if config_cls not in (LoraConfig, RoadConfig):",
        "if config_cls not in (_spec.config_cls, LoraConfig, RoadConfig):",
        MIXED,
    ),
    Patch(
        "testing_common",
        "if config_cls not in (LoraConfig,):",
        "if config_cls not in (_spec.config_cls, LoraConfig):",
        MIXED,
    ),
    Patch(
        "test_decoder_models",
        "if config_cls != LoraConfig:",
        "if config_cls not in (_spec.config_cls, LoraConfig):",
        MIXED,
    ),
    Patch(
        "test_low_level_api",
        'prefix = {LoraConfig: "lora_", LoKrConfig: "lokr_"}[config_cls]',
        "prefix = _spec.prefix",
        "the table of prefixes has only the two methods that the test is written for",
    ),
)

FROZEN = "prototypes are frozen parameters: they have no gradient and are never trainable"
FLOAT32 = "prototypes are float32 whatever the base's dtype, because routing is"
ARROW_PATCHES: tuple[Patch, ...] = (
    Patch(
        "testing_common",
        '"trainable_tokens" in n):\n                    assert param.grad is not None',
        '"trainable_tokens" in n):\n                    assert (param.grad is not None) == param.requires_grad',
        f"_test_training_layer_indexing: {FROZEN}",
    ),
    Patch(
        "testing_common",
        "                        continue\n                    assert param.grad is not None",
        "                        continue\n                    assert (param.grad is not None) == param.requires_grad",
        f"_test_training_gradient_checkpointing: {FROZEN}",
    ),
    Patch(
        "test_custom_models",
        'if ".default" in name:\n',
        'if ".default" in name and "arrow_lora_router" not in name:\n',
        f"test_loading_model_*requires_grad_set_correctly: {FROZEN}",
    ),
    Patch(
        "test_custom_models",
        'if any(f".{adapter_name}" in name for adapter_name in expected_trainable_adapters):',
        'if "arrow_lora_router" not in name and any(f".{a}" in name for a in expected_trainable_adapters):',
        f"test_loading_model_*requires_grad_set_correctly: {FROZEN}",
    ),
    Patch(
        "test_custom_models",
        "                if not param_after.requires_grad:\n",
        '                if not param_after.requires_grad and "arrow_lora_router" not in name:\n',
        "test_only_params_are_updated: prototypes are not trained, but they follow the trained experts",
    ),
    Patch(
        "testing_common",
        'assert model_from_pretrained.peft_config["default"] is config',
        'assert _spec.is_copy(model_from_pretrained.peft_config["default"], config)',
        "_test_from_pretrained_config_construction: the model holds a copy, so that the user's config stays as it is",
    ),
    Patch(
        "testing_common",
        "(adapter_name in name) and param.is_floating_point():",
        '(adapter_name in name) and param.is_floating_point() and "arrow_lora_router" not in name:',
        f"_test_add_adapter_no_autocast_adapter_dtype: {FLOAT32}",
    ),
    Patch(
        "test_custom_models",
        "peft_params = [p for n, p in model.named_parameters() if model.prefix in n]",
        'peft_params = [p for n, p in model.named_parameters() if model.prefix in n and "arrow_lora_router" not in n]',
        f"test_adapter_dtype_autocast: {FLOAT32}",
    ),
)

# Tests of behaviour common to all methods that upstream writes with a LoRA config in the body. They are run with
# `_spec.fresh` in place of `LoraConfig` and the spec's prefix in place of LoRA's, and otherwise as they are.
ADOPTED: dict[str, tuple[str, ...]] = {
    "test_low_level_api": (
        "test_get_peft_model_state_dict_removes_adapter_name",
        "test_get_peft_model_state_dict_removes_non_defaul_adapter_name",
        "test_get_peft_model_state_dict_removes_adapter_name_when_same_as_module_name",
        "test_get_and_set_peft_model_state_dict_normal_names",
        "test_get_and_set_peft_model_state_dict_peft_prefix_in_module_name",
        "test_get_and_set_peft_model_state_dict_weight_in_module_name",
        "test_get_and_set_peft_model_state_dict_adapter_name_same_as_module_name",
        "test_trained_modules_to_save_module_named_like_peft_prefix_round_trip",
        "test_set_peft_model_state_dict_preserves_input",
        "test_strict_missing_keys",
        "test_strict_unexpected_keys",
        "test_multiple_adapters",
        "test_save_pretrained_succeeds_for_normal_lora",
    ),
    "test_custom_models": (
        "test_set_adapter_non_overlapping_trainable_token_indices",
        "test_multiple_active_adapters_with_same_trainable_token_indices_raises",
        "test_multiple_active_adapters_with_different_trainable_token_indices_works",
        "test_delete_adapter_with_multiple_adapters_works",
        "test_delete_adapter_multiple_adapters_with_modules_to_save",
        "test_delete_adapter_multiple_adapters_with_trainable_token_indices",
        "test_set_requires_grad_trainable_tokens",
        "test_weight_bias_attributes",
        "test_multiple_adapters_no_needless_copy_modules_to_save",
        "test_existing_model_card",
        "test_non_existing_model_card",
        "test_requires_grad_modules_to_save_default",
        "test_requires_grad_modules_to_save_disabling",
        "test_requires_grad_modules_to_save_multiple_adapters",
        "test_requires_grad_follows_inference_mode_modules_to_save",
        "test_requires_grad_follows_inference_mode_trainable_token_indices",
        "test_loading_model_with_trainble_tokens_requires_grad_set_correctly",
    ),
    "test_encoder_decoder_models": ("test_load_model_low_cpu_mem_usage",),
    "test_feature_extraction_models": ("test_load_model_low_cpu_mem_usage",),
}
