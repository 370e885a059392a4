"""The configuration of a routed model."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any

from peft import PeftConfig

from ..library.adapter import check_name, config_of, list_locations
from ..ops import AGGREGATIONS
from .layouts import LayoutIndex, fresh_layout
from .peft_type import ARROW_LORA
from .router_settings import RouterSettings, plain


FORMAT_VERSION = 2
PROTOTYPE_UPDATES = ("step", "frozen")


@dataclass
class ArrowLoraConfig(RouterSettings, PeftConfig):
    """
    This is the configuration class to store the configuration of a [`ArrowLoraModel`].

    Args:
        adapters (list or dict of references, *optional*):
            The LoRA adapters to route between: folders, Hub ids, `AdapterRef`s or `Adapter`s, in a list or as a dict
            name -> reference. Not saved: a saved model holds the weights. Without it, fresh experts are made.
        expert_names (`list[str]`, *optional*):
            Names of the experts in routing order. Derived from the references, or `expert_0`, `expert_1`, ...
        router (`str`): A key of `ROUTERS`.
        top_k (`int`): Experts per token; more than a module has means all it has.
        router_temperature (`float`): Divides the kept scores before the softmax.
        top_p (`float`, *optional*): Of the kept experts, the fewest whose weights sum to at least this.
        granularity (`str`): `"token"`, or `"sequence"`: one choice a request, made from its prompt.
        tied (`bool`): Modules that share an input (q, k, v; gate, up) decide together, by their mean logits.
        null_expert (`float`, *optional*): Router logit of one more candidate, the bare base.
        masked_experts (`list[str]`, *optional*): Experts that are never chosen.
        calibrated (`bool`): Logits are standardised by what `calibrate_router` measured.
        router_options (`dict`, *optional*): The router's own options, see its class.
        aggregation (`str`):
            `"output"`: sum of the weighted expert outputs. `"parameter"`: weighted sums of the A's and of the B's, as
            in arXiv 2405.11157; needs one rank per module, each expert's scaling goes to its B.
        trainable_experts (`"all"` or `list[str]`, *optional*):
            Experts that train when the model is trainable. None means all, `[]` none.
        prototype_update (`str`):
            `"step"`: prototypes of trained experts follow the weights once per optimizer step. `"frozen"`: they stay.
        num_experts (`int`, *optional*): Fresh experts to make.
        r (`int`): Rank of a fresh expert.
        lora_alpha (`float`): Alpha of a fresh expert.
        lora_dropout (`float`): Input dropout of a fresh expert in training. Loaded experts keep their own.
        use_rslora (`bool`): Scale fresh experts by alpha / sqrt(r).
        init_weights (`bool`): True: lora_B of fresh experts is zero. False: random, for tests.
        target_modules, exclude_modules, layers_to_transform, layers_pattern:
            As in `LoraConfig`. With `adapters`, None means the union of the experts' modules.
        modules_to_save (`list[str]`, *optional*): Modules trained in full, such as a classification head.
        modules_to_save_from (`str`, *optional*):
            The expert whose trained modules (heads) are used where experts bring different ones.
        trainable_token_indices (*optional*): As in `LoraConfig`; TRL sets it when a chat template adds tokens.
        layer_replication (`list[tuple[int, int]]`, *optional*): As in `LoraConfig`; taken from the adapters.
        layouts, expert_layouts, expert_sources, expert_licenses:
            Written by the model: what it needs to be rebuilt, and what its card says of the experts.
        fitted, calibration (`dict`):
            Written by `fit_router` and `calibrate_router`: for which experts what is stored with the weights.
        format_version (`int`): Version of the saved format.
    """

    adapters: Any = field(default=None, repr=False, metadata={"help": "The LoRA adapters to route between."})
    expert_names: list[str] | None = field(default=None, metadata={"help": "Expert names in routing order."})
    router: str = field(default="arrow", metadata={"help": "The router's name."})
    top_k: int = field(default=4, metadata={"help": "Experts per token."})
    router_temperature: float = field(default=1.0, metadata={"help": "Softmax temperature over the kept scores."})
    top_p: float | None = field(default=None, metadata={"help": "Sum of the weights that is enough."})
    granularity: str = field(default="token", metadata={"help": "'token' or 'sequence'."})
    tied: bool = field(default=False, metadata={"help": "Modules that share an input decide together."})
    null_expert: float | None = field(default=None, metadata={"help": "Router logit of the bare base."})
    masked_experts: list[str] | None = field(default=None, metadata={"help": "Experts that are never chosen."})
    calibrated: bool = field(default=False, metadata={"help": "Whether logits are standardised."})
    router_options: dict | None = field(default=None, metadata={"help": "The router's own options."})
    aggregation: str = field(default="output", metadata={"help": "'output' or 'parameter'."})
    trainable_experts: str | list[str] | None = field(
        default=None, metadata={"help": "None or 'all', or a list of expert names, [] for none."}
    )
    prototype_update: str = field(default="step", metadata={"help": "'step' or 'frozen'."})
    num_experts: int | None = field(default=None, metadata={"help": "Number of fresh experts."})
    r: int = field(default=8, metadata={"help": "Rank of a fresh expert."})
    lora_alpha: float = field(default=8, metadata={"help": "Alpha of a fresh expert."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Input dropout of a fresh expert."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale fresh experts by alpha / sqrt(r)."})
    init_weights: bool = field(default=True, metadata={"help": "True: zero lora_B; False: random lora_B."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of the modules to adapt."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of the modules to leave alone."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "The layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "The name of the layer list, used with layers_to_transform."}
    )
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained in full."})
    modules_to_save_from: str | None = field(default=None, metadata={"help": "The expert whose heads are used."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token embeddings to train."}
    )
    layer_replication: list | None = field(default=None, metadata={"help": "Ranges of layers to stack."})
    layouts: list[dict] | None = field(default=None, repr=False, metadata={"help": "Shapes of the experts."})
    expert_layouts: list[int] | None = field(default=None, repr=False, metadata={"help": "Layout of each expert."})
    expert_sources: list | None = field(default=None, repr=False, metadata={"help": "Source of each expert."})
    expert_licenses: list | None = field(default=None, repr=False, metadata={"help": "Licence of each expert."})
    fitted: dict | None = field(default=None, repr=False, metadata={"help": "What routers were fitted for."})
    calibration: dict | None = field(default=None, repr=False, metadata={"help": "What calibration is for."})
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the saved format."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = ARROW_LORA
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform cannot be used when target_modules is a regular expression (a str).")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("layers_pattern cannot be used when target_modules is a regular expression (a str).")
        self.top_k, self.router_temperature = plain(self.top_k), plain(self.router_temperature)
        self.make_router()
        _check_choice("aggregation", self.aggregation, AGGREGATIONS)
        _check_choice("prototype_update", self.prototype_update, PROTOTYPE_UPDATES)
        self._check_format()
        self._check_fresh()
        self._check_names()
        if self.expert_layouts is not None and self.expert_licenses is None:  # saved before licences were kept
            self.expert_licenses = [None] * len(self.expert_layouts)
        if self.adapters is not None:
            self._read_adapter_configs()

    def _check_format(self) -> None:
        if isinstance(self.format_version, bool) or not isinstance(self.format_version, int):
            raise ValueError(f"format_version={self.format_version!r} is not allowed; it must be a whole number.")
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"format_version={self.format_version} is newer than {FORMAT_VERSION}, the newest that this "
                "peft-arrow reads; upgrade it with: pip install -U peft-arrow."
            )

    def _check_fresh(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, Integral) or self.r < 1:
            raise ValueError(f"r={self.r!r} is not allowed; it must be a whole number of at least 1.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout={self.lora_dropout!r} is not allowed; it must be at least 0 and below 1.")
        count = self.num_experts
        if count is not None and (isinstance(count, bool) or not isinstance(count, Integral) or count < 1):
            raise ValueError(f"num_experts={count!r} is not allowed; it must be a whole number of at least 1.")
        if count is not None and self.adapters is not None:
            raise ValueError("num_experts and adapters exclude each other; pass one of them.")

    def _check_names(self) -> None:
        names = self.expert_names
        if names is not None:
            self.expert_names = names = [check_name(name) for name in names]
            repeated = [name for name, count in Counter(names).items() if count > 1]
            if repeated:
                raise ValueError(f"expert_names holds {repeated[0]!r} more than once; names must differ.")
            if self.num_experts is not None and len(names) != self.num_experts:
                raise ValueError(f"expert_names has {len(names)} names for num_experts={self.num_experts}.")
        if isinstance(self.trainable_experts, str) and self.trainable_experts != "all":
            raise ValueError(
                f"trainable_experts={self.trainable_experts!r} is not allowed; it is None, 'all' or a list of names."
            )

    def _read_adapter_configs(self) -> None:
        """Fill in what PEFT must know before it sees the weights: the task type."""
        located = list_locations(self.adapters)
        if self.expert_names is not None:
            if len(self.expert_names) != len(located):
                raise ValueError(f"expert_names has {len(self.expert_names)} names for {len(located)} adapters.")
        if self.task_type is None:
            types = {name: config_of(place).get("task_type") for name, place in located.items()}
            found = sorted({str(getattr(t, "value", t)) for t in types.values() if t is not None})
            if len(found) > 1:
                raise ValueError(f"adapters have different task types, {found}; pass task_type to choose one.")
            self.task_type = found[0] if found else None

    def expert_is_trainable(self, name: str) -> bool:
        """Whether `trainable_experts` lets this expert train."""
        return self.trainable_experts in (None, "all") or name in self.trainable_experts

    def keeps_frozen(self) -> bool:
        """Whether nothing may train: loaded for inference, experts that must not train lie beside those that may."""
        return self.inference_mode and self.trainable_experts not in (None, "all")

    def check_trainable_experts(self) -> None:
        """Raise a `ValueError` if `trainable_experts` names an expert that is not there."""
        if isinstance(self.trainable_experts, (list, tuple, set)):
            unknown = [name for name in self.trainable_experts if name not in self.expert_names]
            if unknown:
                raise ValueError(
                    f"trainable_experts holds {unknown[0]!r}, which is not an expert; experts are {self.expert_names}."
                )

    def fresh(self) -> ArrowLoraConfig:
        """A copy with layouts for `num_experts` fresh experts."""
        config = copy.copy(self)
        names = self.expert_names or [f"expert_{e}" for e in range(self.num_experts or 0)]
        scaling = self.lora_alpha / math.sqrt(self.r) if self.use_rslora else self.lora_alpha / self.r
        config.expert_names = list(names)
        config.num_experts = len(names)
        config.layouts = [fresh_layout(int(self.r), float(scaling), float(self.lora_dropout))]
        config.expert_layouts = [0] * len(names)
        config.expert_sources = [None] * len(names)
        config.expert_licenses = [None] * len(names)
        return config

    def layout_index(self) -> LayoutIndex:
        """Look-up of the experts of each module."""
        is_split = not self.inference_mode
        trainable = [not is_split or self.expert_is_trainable(name) for name in self.expert_names]
        return LayoutIndex(self.layouts, self.expert_layouts, trainable)

    def to_dict(self) -> dict[str, Any]:
        """The config as a dictionary, without `adapters` (which may hold weights), sets as sorted lists."""
        values = {f.name: copy.deepcopy(getattr(self, f.name)) for f in fields(self) if f.name != "adapters"}
        return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def _check_choice(argument: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{argument}={value!r} is unknown; allowed are {', '.join(map(repr, allowed))}.")
