"""What PEFT calls. Importing this package registers the PEFT type `ARROW_LORA`."""

from .config import ArrowLoraConfig
from .layer import ArrowLoraLayer, ArrowLoraLinear
from .model import ArrowLoraModel
from .peft_type import ARROW_LORA, register
from .reloading import follow_config_on_load
from .trace import ModuleTrace, RoutingTrace


register(ArrowLoraConfig, ArrowLoraModel)
follow_config_on_load()

__all__ = [
    "ARROW_LORA",
    "ArrowLoraConfig",
    "ArrowLoraLayer",
    "ArrowLoraLinear",
    "ArrowLoraModel",
    "ModuleTrace",
    "RoutingTrace",
]
