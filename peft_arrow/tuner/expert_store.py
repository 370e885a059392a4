"""Where the factors of paged experts rest: in CPU memory, or in one memory-mapped safetensors file.

The file is made at its final size, filled through the map, and takes its name when it is complete. It belongs to the
model that made it and is never read by another one: it goes with that model, and what a killed process left is removed
by the next one that pages into the folder.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import secrets
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from .store_options import Paging


try:
    import fcntl
except ImportError:  # Windows: files of killed processes are left for the user to delete
    fcntl = None

PREFIX = "peft-arrow-experts"
_OURS = re.compile(rf"{PREFIX}-[\w-]*-[0-9a-f]{{16}}\.safetensors(\.draft)?")
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# The data begins on a page; a multiple of what vector units and grouped products ask for comes before other sizes.
_PAGE, _ALIGNED = 4096, 64
_MARK = {"format": "pt", "peft_arrow": "paged experts"}


class BankShape(NamedTuple):
    """A bank's sum of ranks, in features, out features and dtype."""

    rank: int
    in_features: int
    out_features: int
    dtype: torch.dtype


def check_any_frozen(adapter_name: str, shapes: Mapping[tuple[str, bool], BankShape]) -> None:
    """Raise a `ValueError` if there is no bank to be paged."""
    if not shapes:
        raise ValueError(
            f"all experts of {adapter_name!r} are trainable, and only frozen experts are paged; load them with "
            "is_trainable=False, or name in trainable_experts those that are to train."
        )


class ExpertStore:
    """The resting factors of one PEFT adapter.

    Args:
        paging (`Paging`): where, and how many are hot.
        adapter_name (`str`): the PEFT adapter, for the file's name.
        shapes (`Mapping[tuple[str, bool], BankShape]`): of each paged bank, by (module, whether it is the main one).
    """

    def __init__(self, paging: Paging, adapter_name: str, shapes: Mapping[tuple[str, bool], BankShape]) -> None:
        self.hot_experts = paging.hot_experts
        self.shapes = dict(shapes)
        self.file = None if paging.place is None else StoreFile(paging.place, adapter_name, _tensors(self.shapes))
        self._place = paging.place

    def paging(self) -> Paging:
        """What a store for other experts of the same adapter is made with."""
        return Paging(self._place, self.hot_experts)

    def holds(self, module: str, is_main: bool) -> bool:
        """Whether a bank rests here."""
        return (module, is_main) in self.shapes

    def bank(self, module: str, is_main: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for a bank: A (R, I) and B (O, R), both laid out so that an expert is one piece."""
        rank, in_features, out_features, dtype = self.shapes[module, is_main]
        if self.file is not None:
            halves = [self.file.tensor(f"{_name(module, is_main)}.{half}") for half in ("lora_A", "lora_B_t")]
        else:
            options = {"dtype": dtype, "pin_memory": torch.cuda.is_available()}
            halves = [torch.empty(rank, width, **options) for width in (in_features, out_features)]
        return halves[0], halves[1].t()

    def finish(self) -> None:
        """All factors are in their places."""
        if self.file is not None:
            self.file.finish()

    def discard(self) -> None:
        """Remove the file; factors that are still in use stay readable until they are dropped."""
        if self.file is not None:
            self.file.discard()

    def __getstate__(self) -> dict:
        """A copy of a model has its factors in CPU memory of its own."""
        return {"hot_experts": self.hot_experts, "shapes": self.shapes, "file": None, "_place": None}


def _name(module: str, is_main: bool) -> str:
    return f"{module}.{'main' if is_main else 'frozen'}"


def _tensors(shapes: Mapping[tuple[str, bool], BankShape]) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
    tensors = {}
    for (module, is_main), shape in shapes.items():
        tensors[f"{_name(module, is_main)}.lora_A"] = shape.dtype, (shape.rank, shape.in_features)
        tensors[f"{_name(module, is_main)}.lora_B_t"] = shape.dtype, (shape.rank, shape.out_features)
    return tensors


@contextlib.contextmanager
def discarded_on_failure(store: ExpertStore | None) -> Iterator[None]:
    """Remove the store's file if the block ends by an error."""
    is_done = False
    try:
        yield
        is_done = True
    finally:
        if store is not None and not is_done:
            store.discard()


class StoreFile:
    """A safetensors file whose tensors are written and read through a shared memory map.

    Its blocks are reserved at once, so that a full disk is an error here and not a signal at some later write.

    Args:
        folder (`Path`): made if it is not there.
        label (`str`): part of the name.
        tensors (`Mapping[str, tuple[torch.dtype, tuple[int, int]]]`): dtype and shape by name.

    Raises:
        ValueError: a dtype that cannot be stored.
        OSError: there is no room.
    """

    def __init__(self, folder: Path, label: str, tensors: Mapping[str, tuple[torch.dtype, tuple[int, int]]]) -> None:
        header, self._offsets, size = _layout(tensors)
        self._tensors = dict(tensors)
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        descriptor, draft = _locked_draft(folder, re.sub(r"[^\w-]", "_", label, flags=re.ASCII)[:40])
        self._state = {"path": draft}
        self._remove = weakref.finalize(self, _remove_file, self._state, descriptor, os.getpid())
        try:
            os.write(descriptor, header)
            _reserve(descriptor, size)
            self._map = mmap.mmap(descriptor, size, access=mmap.ACCESS_WRITE)
        except OSError:
            self.discard()
            raise

    @property
    def path(self) -> Path:
        """Where the file is now."""
        return self._state["path"]

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the map, with a storage of its own that begins and ends with the tensor."""
        dtype, shape = self._tensors[name]
        options = {"dtype": dtype, "count": shape[0] * shape[1], "offset": self._offsets[name]}
        return torch.frombuffer(self._map, **options).view(shape)

    def finish(self) -> None:
        """Give the complete file its name."""
        final = self.path.with_suffix("")
        if final.exists():
            raise FileExistsError(f"{str(final)!r} is there already; experts are paged into a file of their own.")
        self.path.rename(final)
        self._state["path"] = final

    def discard(self) -> None:
        """Remove the file; the map stays as long as a tensor uses it."""
        self._remove()


def _layout(tensors: Mapping[str, tuple[torch.dtype, tuple[int, int]]]) -> tuple[bytes, dict[str, int], int]:
    """The header of the file, where in the file each tensor begins, and how long the file is."""
    sizes = {name: dtype.itemsize * shape[0] * shape[1] for name, (dtype, shape) in tensors.items()}
    entries, begin = {"__metadata__": _MARK}, 0
    for name in sorted(tensors, key=lambda name: (sizes[name] % _ALIGNED != 0, -tensors[name][0].itemsize, name)):
        dtype, shape = tensors[name]
        if dtype not in _DTYPES:
            raise ValueError(f"experts of dtype {dtype} cannot be paged into a file; allowed are {list(_DTYPES)}.")
        end = begin + sizes[name]
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % _PAGE)
    start = 8 + len(text)
    offsets = {name: start + entries[name]["data_offsets"][0] for name in tensors}
    return len(text).to_bytes(8, "little") + text, offsets, start + begin


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


def _locked_draft(folder: Path, label: str) -> tuple[int, Path]:
    """A new file and a descriptor that keeps it locked until this process ends, however it ends."""
    while True:
        draft = folder / f"{PREFIX}-{label}-{secrets.token_hex(8)}.safetensors.draft"
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks: nobody removes files there
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        if draft.exists():  # another process may have taken it for abandoned before it was locked
            return descriptor, draft
        os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    """Remove drafts and files of ours that no process holds."""
    for path in folder.glob(f"{PREFIX}-*") if fcntl is not None else ():
        if not _OURS.fullmatch(path.name):
            continue
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            head = os.pread(descriptor, 200, 0)
            if not head or json.dumps(_MARK).encode() in head:
                path.unlink(missing_ok=True)
        except OSError:
            continue  # in use
        finally:
            os.close(descriptor)


def _remove_file(state: dict, descriptor: int, process: int) -> None:
    os.close(descriptor)
    if os.getpid() == process:  # a forked process ends without taking the file from its parent
        state["path"].unlink(missing_ok=True)
