"""10,500 damaged and hostile files: every one is read, or refused by a clear error of ours; nothing crashes, hangs or
leaves its folder."""

from __future__ import annotations

import copy
import json
import random
import struct
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import peft_arrow
from peft_arrow import AdapterLibrary, ArrowLoraModel, vet_adapter
from peft_arrow.library.base_shapes import BaseShapes
from peft_arrow.library.lora import read_lora
from peft_arrow.library.manifest import Evaluation
from tests.pico import pico_adapter, pico_base


PACKAGE = str(Path(peft_arrow.__file__).parent)
ROUNDS, INPUTS = 10, 350
HOSTILE_TEXTS = [
    *("", " ", "\x00", "a" * 300, "../../../etc/passwd", "/etc/passwd", "~/x", "C:\\x", "a/b", "..", ".", "-", "con"),
    *(
        "x\n---\nlicense: mit\n---\n",
        "<script>alert(1)</script>",
        "[x](javascript:alert(1))",
        "{{ 7 * 7 }}",
        "😀" * 99,
    ),
    *(
        "\u202egnp.exe",
        "\ud800",
        "| a | b |",
        "`" * 50,
        "\u0000\x1b[31m",
        "NaN",
        "null",
        "(a+)+$",
        "(" * 500,
        "*",
        "[z-a]",
    ),
    *("(.*)*(.*)*!", ".*" * 40 + "!", "q_proj", "all-linear", "LORA", "gaussian", "eva", "pissa_niter_4", "license"),
]
HOSTILE_NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    10**6,
    2**31,
    2**63,
    10**30,
    -(10**30),
    0.5,
    1e308,
    -1e308,
    1e-320,
    float("nan"),
    float("inf"),
]


def deep(depth: int, rng: random.Random):
    value = None
    for _ in range(depth):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def hostile(rng: random.Random):
    """A value of any kind that has no business where it is put."""
    kinds: list[Callable] = [
        lambda: rng.choice(HOSTILE_TEXTS),
        lambda: rng.choice(HOSTILE_NUMBERS),
        lambda: rng.choice([None, True, False, [], {}, [[]], [None], {"": None}]),
        lambda: [rng.choice(HOSTILE_TEXTS) for _ in range(rng.randint(1, 4))],
        lambda: {rng.choice(HOSTILE_TEXTS): rng.choice(HOSTILE_NUMBERS) for _ in range(rng.randint(1, 4))},
        lambda: deep(rng.choice([3, 50, 400]), rng),
        lambda: [{"name": rng.choice(HOSTILE_TEXTS)}],
    ]
    return rng.choice(kinds)()


def places(value, path=()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key in value:
            found += places(value[key], (*path, key))
    elif isinstance(value, list):
        for position in range(len(value)):
            found += places(value[position], (*path, position))
    return found


def changed(content: dict, rng: random.Random) -> dict:
    """The content with one to three values replaced, removed, doubled or renamed."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(places(content) or [()])
        if not path:
            return content
        owner = content
        for step in path[:-1]:
            owner = owner[step]
        action = rng.random()
        if action < 0.7:
            owner[path[-1]] = hostile(rng)
        elif action < 0.85:
            del owner[path[-1]]
        elif isinstance(owner, dict):
            owner[rng.choice(HOSTILE_TEXTS)] = owner[path[-1]]
        else:
            owner.append(owner[path[-1]])
    return content


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes cut off, flipped, doubled, or replaced by noise."""
    action = rng.random()
    if action < 0.35:
        return data[: rng.randrange(len(data) + 1)]
    if action < 0.75:
        changed = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if action < 0.85:
        return data + data
    if action < 0.9:
        return b"\xef\xbb\xbf" + data
    return rng.choice(
        [b"", b"[" * 200_000, b'{"a":' * 50_000, rng.randbytes(500), b"null", b"1" * 10_000, b"\xff\xfe{\x00}"]
    )


def as_json(content: dict) -> bytes:
    return json.dumps(content).encode()


def fuzzed_json(content: dict, rng: random.Random) -> bytes:
    return as_json(changed(content, rng)) if rng.random() < 0.75 else damaged(as_json(content), rng)


def fuzzed_weights(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a damaged header: its JSON, its length, or any byte."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    action = rng.random()
    if action < 0.25:
        return damaged(data, rng)
    if action < 0.35:
        return struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, 2**32, 2**63, 2**64 - 1])) + data[8:]
    if action < 0.6:
        return packed(changed(header, rng), body)
    entry = rng.choice([key for key in header if key != "__metadata__"])
    if action < 0.75:
        renamed = {(rng.choice(HOSTILE_TEXTS) if key == entry else key): value for key, value in header.items()}
        return packed(renamed, body)
    dtypes = ["F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "X", "", None, 3]
    shapes = [[], [0], [0, 8], [-1, 8], [2**40, 2**40], [1] * 70, [[8]], "8", None, [8, 2, 2], [2.5, 8], [10**30]]
    header[entry] = {**header[entry], **rng.choice([{"dtype": rng.choice(dtypes)}, {"shape": rng.choice(shapes)}])}
    return packed(header, body)


def packed(header: dict, body: bytes) -> bytes:
    text = as_json(header)
    return struct.pack("<Q", len(text)) + text + body


def is_ours(error: ValueError) -> bool:
    """Whether the error was raised by a line of this package."""
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE)


def attempt(function: Callable, *arguments, **options):
    """The function's result, or None where it raised a clear error of ours that names the file's owner."""
    try:
        return function(*arguments, **options)
    except ValueError as error:
        assert is_ours(error), "".join(traceback.format_exception(error))
        assert "subject" in str(error) and len(str(error)) < 5000, str(error)
        return None


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> dict:
    """One adapter and one library, as they should be, and the pico base's shapes."""
    root = tmp_path_factory.mktemp("valid")
    adapter = Path(pico_adapter(root / "adapter", seed=1, r=2, target_modules=["q_proj"]))
    library = AdapterLibrary.from_pretrained([adapter], base_model="me/pico").describe(
        "Text.", made={"command": "x", "seeds": [0]}, evaluation=[Evaluation("d", "m", 0.5)]
    )
    library.save_pretrained(root / "library")
    return {"adapter": adapter, "library": root / "library", "shapes": BaseShapes.of(pico_base())}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def use(folder: Path, valid: dict) -> None:
    """All that reads an adapter: a library, its factors, a report; a report never raises."""
    library = attempt(AdapterLibrary.from_pretrained, [folder], base_model="me/pico")
    if library is not None:
        attempt(read_lora, library["subject"])
    report = vet_adapter(str(folder), valid["shapes"])
    report.table(), json.loads(report.to_json())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters(valid, tmp_path, file, seed):
    rng = random.Random(f"{file}{seed}")
    files = {path.name: path.read_bytes() for path in valid["adapter"].iterdir()}
    content = json.loads(files["adapter_config.json"])
    folder = tmp_path / "inside" / "subject"
    folder.mkdir(parents=True)
    base = pico_base()
    kept = {name: value.clone() for name, value in base.state_dict().items()}
    for number in range(INPUTS):
        is_config = file == "adapter_config.json"
        data = fuzzed_json(content, rng) if is_config else fuzzed_weights(files[file], rng)
        for name, original in files.items():
            (folder / name).write_bytes(data if name == file else original)
        use(folder, valid)
        if number % 10 == 0:
            routed = attempt(ArrowLoraModel.from_pretrained, base, [folder])
            base = pico_base() if routed is not None else base
            assert base.state_dict().keys() == kept.keys()
    assert sorted(snapshot(tmp_path)) == sorted(f"inside/subject/{name}" for name in files)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_libraries(valid, tmp_path, seed):
    rng = random.Random(seed)
    content = json.loads((valid["library"] / "library.json").read_text())
    before = snapshot(valid["library"])
    folder, out = tmp_path / "subject", tmp_path / "out"
    (folder / "experts").mkdir(parents=True)
    (folder / "experts" / "adapter").symlink_to(valid["library"] / "experts/adapter")
    for _ in range(INPUTS):
        (folder / "library.json").write_bytes(fuzzed_json(content, rng))
        library = attempt(AdapterLibrary.from_pretrained, folder)
        if library is not None:
            attempt(library.save_pretrained, out)
        assert sorted(path.name for path in tmp_path.iterdir()) in (["subject"], ["out", "subject"])
    assert snapshot(valid["library"]) == before
