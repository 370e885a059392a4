"""When prototypes belong to the weights beside them, and when they are stale.

A prototype row that is NaN has not been built. Besides, a layer remembers a fingerprint of each bank's weights (object
and autograd version counter, which every in-place change raises, be it an optimizer step, `load_state_dict` or
`copy_`); a different fingerprint at the next use makes the bank's experts stale. Edits through `.data` raise no
counter and cannot be seen: `refresh_prototypes()` is for those.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


BUILD_LOCK = threading.RLock()
_suspended = threading.local()
_optimizer_steps = 0
# layers whose prototypes were built in this process; those that a compiled graph uses are rebuilt after a step
built_layers: weakref.WeakSet = weakref.WeakSet()


def _count_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1
    for layer in list(built_layers):
        compiled = [name for name, state in layer.prototype_states.items() if state.is_compiled]
        if compiled:
            layer.build_prototypes(compiled)


# Fused optimizers raise no version counter, and FSDP keeps those of gathered parameters constant: there only the
# optimizer itself tells of a step.
register_optimizer_step_post_hook(_count_step)


def is_distributed() -> bool:
    """Whether a process group exists: then parameters may be sharded, and writes to gathered ones are thrown away."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def fingerprint(weights: list[torch.Tensor]) -> tuple:
    """A value that changes with the weights, except through `.data`; optimizer steps count where something trains."""
    steps = _optimizer_steps if any(w.requires_grad for w in weights) else None
    return (steps, *((id(w), 0 if w.is_inference() else w._version) for w in weights))


def optimizer_steps() -> int:
    """How many steps all optimizers of this process have made."""
    return _optimizer_steps


def is_sharded(weight: torch.Tensor) -> bool:
    """Whether the weight is a DTensor, as FSDP2 keeps parameters outside the forward of the module it wrapped."""
    return hasattr(weight, "full_tensor")


def whole(weight: torch.Tensor) -> torch.Tensor:
    """The weight with all its shards; every process must call it at the same point, as they do in a forward."""
    return weight.full_tensor() if is_sharded(weight) else weight


@contextlib.contextmanager
def building_suspended() -> Iterator[None]:
    """While weights are loaded, reading a state dict must not build prototypes of what is about to be replaced."""
    before = getattr(_suspended, "on", False)
    _suspended.on = True
    try:
        yield
    finally:
        _suspended.on = before


def is_building_suspended() -> bool:
    """Whether this thread is inside `building_suspended`."""
    return getattr(_suspended, "on", False)


class PrototypeState:
    """What one layer knows about the prototypes of one PEFT adapter.

    Attributes:
        fingerprints (`dict[bool, tuple]`): of the weights that the prototypes were built from, by bank.
        local (`torch.Tensor`, *optional*): this process's own copy, where parameters may be sharded.
        is_built (`bool`):
            whether there are fingerprints. Compiled graphs guard on this, because those are new after every step.
        is_compiled (`bool`): whether a compiled graph uses them, which cannot check for itself.
    """

    def __init__(self) -> None:
        self.fingerprints: dict[bool, tuple | None] = {}
        self.is_built = False
        self.local: torch.Tensor | None = None
        self.is_compiled = False

    def remember(self, fingerprints: dict[bool, tuple]) -> None:
        """The prototypes belong to the weights with these fingerprints."""
        self.fingerprints = fingerprints
        self.is_built = True

    def forget(self) -> None:
        """Trust the stored rows as they are (NaN: not built) and remember the weights anew at the next use."""
        self.fingerprints = {}
        self.is_built = False
        self.local = None

    def __deepcopy__(self, memo: dict) -> PrototypeState:
        copied = PrototypeState()
        copied.local = self.local
        return copied

    def __getstate__(self) -> dict:
        return {}

    def __setstate__(self, state: dict) -> None:
        self.__init__()
