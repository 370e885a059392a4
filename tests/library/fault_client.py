"""What a user sees when the Hub refuses, stumbles or damages; `test_hub_faults` runs this as a process."""

from __future__ import annotations

import itertools
import os
import re
import sys
import time
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from peft_arrow import AdapterLibrary, AdapterRef, ArrowLoraModel
from tests.library.hub_runs import Hub, make_adapter, run_checks
from tests.pico import pico_base


API = HfApi()
WEIGHTS = "adapter_model.safetensors"
WAITS: list[float] = []
CACHES = itertools.count()
# Version 0 of the client gives up when a connection ends too early, and does not wait as long as it is asked to.
RESUMES = not huggingface_hub.__version__.startswith("0.")
ASKED = 7 if RESUMES else 1


def sleep_less(seconds: float, sleep=time.sleep):
    """Note how long a client wants to wait, and wait hardly at all."""
    WAITS.append(seconds)
    sleep(min(seconds, 0.01))


def pull(work: Path, *references, **options) -> AdapterLibrary:
    """Look up with an empty cache and save to `work/<number>`."""
    number = next(CACHES)
    library = AdapterLibrary.from_pretrained(
        references[0] if len(references) == 1 else references,
        **{"cache_dir": str(work / f"cache{number}"), **options},
    )
    library.save_pretrained(work / f"out{number}")
    return AdapterLibrary.from_pretrained(work / f"out{number}")


def check_refusals(hub: Hub, work: Path):
    """Every error names the reference, and says that a folder was looked for and what the Hub answered."""
    hub.set("alice/gated", gated="manual")
    hub.set("alice/gone", private=True)
    cases = [
        ("alice/one", {"token": "hf_wrong"}, "401"),
        ("alice/gone", {"token": False}, "401"),
        ("alice/gone/inner@v1", {"token": "hf_bob"}, "404"),
        ("alice/gated", {"token": "hf_bob"}, "403"),
        ("alice/gated", {"token": False}, "401"),
        ("alice/nothing", {}, "404"),
        ("alice/one@v9", {}, "Revision"),
        ("alice/one", {"revision": "v9"}, "Revision"),
        ("alice/one/not/here", {}, "holds no not/here/adapter_config.json and no not/here/library.json"),
        ("alice/empty", {}, "holds no adapter_config.json and no library.json"),
        ("alice/lib/experts/nobody", {}, "holds no experts/nobody/adapter_config.json"),
    ]
    for reference, options, expected in cases:
        with pytest.raises(ValueError, match=rf"(?s)'{reference}'.*no such folder.*Hub.*{expected}"):
            pull(work, [reference], **options)
        with pytest.raises(ValueError, match=rf"(?s)'{reference}'.*no such folder.*Hub.*{expected}"):
            ArrowLoraModel.from_pretrained(pico_base(), [reference], cache_dir=str(work / "none"), **options)
    assert list(pull(work, [AdapterRef("alice/gated", token="hf_alice")], token="hf_bob")) == ["gated"]


def check_no_weights(hub: Hub, work: Path):
    """A config without weights, with a pickle, and with weights that cannot be read."""
    with pytest.raises(ValueError, match=rf"(?s)'alice/bare'.*{WEIGHTS} cannot be read.*404"):
        pull(work, ["alice/bare"])
    with pytest.raises(ValueError, match=r"'alice/pickle'.*there is only adapter_model.bin, a pickle"):
        pull(work, ["alice/pickle"])
    header = AdapterLibrary.from_pretrained(["alice/damaged"])["damaged"].tensors.header
    for read in (lambda: pull(work, ["alice/damaged"]), header):
        with pytest.raises(ValueError, match=rf"'alice/damaged'.*{WEIGHTS} is damaged"):
            read()


# Every request that a pull makes, that a look at a header makes, and that a push makes.
READS = [
    ("HEAD", "*/resolve/*/library.json"),
    ("GET", "*/resolve/*/library.json"),
    ("HEAD", "*/adapter_config.json"),
    ("GET", "*/adapter_config.json"),
    ("HEAD", f"*/sql/{WEIGHTS}"),
    ("GET", f"*/sql/{WEIGHTS}"),
]
PUSHES = [
    ("POST", "/api/repos/create"),
    ("GET", "/api/models/alice/busy*"),
    ("POST", "/api/models/*/branch/*"),
    ("POST", "/api/validate-yaml"),
    ("POST", "*/preupload/*"),
    ("POST", "*/objects/batch"),
    ("PUT", "/_lfs/*"),
    ("POST", "*/commit/*"),
]


def check_busy_while_reading(hub: Hub, work: Path):
    """A Hub that is busy for a moment is asked again; what it says of the time to wait is kept."""
    problems = []
    for status, (method, pattern) in itertools.product((429, 503), READS):
        # the client asks for a file's head twice in a row before it waits
        times = 2 if method == "HEAD" else 1
        hub.fail(pattern, method, status=status, headers={"Retry-After": "7"}, times=times)
        WAITS.clear()
        try:
            assert len(pull(work, "alice/lib")) == 3
            assert max(WAITS, default=0) >= ASKED
        except (ValueError, AssertionError) as error:
            problems.append((status, method, pattern, str(error)[:200]))
        assert hub.faults_ordered()[-1]["hits"] == times, pattern
        hub.clear_faults()
    for status in (429, 503):
        hub.fail(f"*/{WEIGHTS}", "GET", status=status, headers={"Retry-After": "7"})
        tensors = AdapterLibrary.from_pretrained("alice/lib", cache_dir=str(work / "headers"))["sql"].tensors
        assert len(tensors.header()) == 8 and max(WAITS) >= 7
    assert not problems, "\n".join(map(str, problems))


def check_busy_while_pushing(hub: Hub, work: Path):
    """The same for each request of a push, which ends in one commit."""
    problems = []
    library = AdapterLibrary.from_pretrained(work / "library")
    for status, (method, pattern) in itertools.product((429, 503), PUSHES):
        if (status, method) == (429, "PUT") and not RESUMES:
            continue  # a RuntimeError, whatever the Hub answered
        number = next(CACHES)
        hub.fail(pattern, method, status=status, headers={"Retry-After": "7"})
        WAITS.clear()
        small = library.select(["sql"]).describe(f"Number {number}")
        # weights that the server does not hold yet, or they are not sent
        factors = {key: value + number for key, value in library["sql"].tensors.items()}
        small = AdapterLibrary({"sql": replace(small["sql"], tensors=factors)}, notes=small.notes)
        try:
            small.push_to_hub(f"alice/busy{number}", revision="v2")
            assert max(WAITS, default=0) >= ASKED
            commits = API.list_repo_commits(f"alice/busy{number}", revision="v2")
            assert len(commits) == 2 and "experts/sql/" + WEIGHTS in hub.files(f"alice/busy{number}", "v2")
        except (HfHubHTTPError, ValueError, AssertionError) as error:
            problems.append((status, method, pattern, str(error)[:200]))
        assert hub.faults_ordered()[-1]["hits"] == 1, pattern
        hub.clear_faults()
    assert not problems, "\n".join(map(str, problems))


def check_busy_for_long(hub: Hub, work: Path):
    """It gives up at some time, and says what the Hub said."""
    for method, pattern in READS[:1] + READS[-1:]:
        hub.fail(pattern, method, status=503, times=None, message="closed for repairs")
        with pytest.raises(ValueError, match=r"(?s)'alice/lib.*503.*closed for repairs"):
            pull(work, "alice/lib")
        assert hub.faults_ordered()[-1]["hits"] < 40
        hub.clear_faults()
    hub.fail("/api/repos/create", status=429, times=None)
    with pytest.raises(HfHubHTTPError, match="429"):
        AdapterLibrary.from_pretrained(work / "library").push_to_hub("alice/closed")
    assert 2 < hub.faults_ordered()[-1]["hits"] < 40
    hub.clear_faults()


def check_cut(hub: Hub, work: Path):
    """A connection that ends in the middle of a file: the client goes on from there, or else our error says so."""
    huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000
    size = len(content := (work / f"library/experts/dates/{WEIGHTS}").read_bytes())
    for pattern, after in (
        (f"*/dates/{WEIGHTS}", size // 2),
        ("*/library.json", 20),
        ("*/sql/adapter_config.json", 20),
    ):
        hub.cut(pattern, after, "GET")
        before = len(hub.log())
        if not RESUMES:
            with pytest.raises(ValueError, match="alice/lib"):
                pull(work, "alice/lib")
            continue
        library = pull(work, "alice/lib")
        assert Path(library["dates"].tensors.path()).read_bytes() == content
        if WEIGHTS in pattern:
            asked = [line for line in hub.log()[before:] if fnmatch(line["path"], pattern) and line["method"] == "GET"]
            assert asked[0]["sent"] == size // 2
            assert asked[1]["status"] == 206 and asked[1]["sent"] < size * 0.6
    assert all(fault["hits"] == 1 for fault in hub.faults_ordered())


def check_connections_that_are_lost_for_long(hub: Hub, work: Path):
    """A Hub that cannot be talked to is an error of ours, and the next run takes what is there already."""
    cache = str(work / "lost")
    hub.cut(f"*/dates/{WEIGHTS}", 100, "GET", times=None)
    hub.drop(f"*/dates/{WEIGHTS}", "GET", times=None)
    library = AdapterLibrary.from_pretrained("alice/lib", cache_dir=cache)
    with pytest.raises(ValueError, match=rf"(?s)'alice/lib/experts/dates': {WEIGHTS} cannot be read"):
        library.save_pretrained(work / "lost-out")
    assert not (work / "lost-out").exists() and not list(work.glob(".lost-out*"))
    hub.clear_faults()
    library, asked = hub.asked_by(lambda: AdapterLibrary.from_pretrained("alice/lib", cache_dir=cache))
    _, more = hub.asked_by(library.save_pretrained, work / "lost-out")
    fetched = [line.split("/")[-2] for line in asked + more if line.startswith("GET") and line.endswith(WEIGHTS)]
    assert "dates" in fetched and "plurals" not in fetched
    library = AdapterLibrary.from_pretrained("alice/lib", cache_dir=cache)
    hub.drop("*/resolve/*", times=None)
    hub.drop("/api/*", times=None)
    with pytest.raises(ValueError, match=r"(?s)'alice/nobody'.*no such folder.*Hub"):
        AdapterLibrary.from_pretrained(["alice/nobody"])
    with pytest.raises(ValueError, match=r"(?s)'alice/lib/experts/sql'.*cannot be read"):
        library["sql"].tensors.header()


def check_corrupt_weights(hub: Hub, work: Path):
    """Damaged weights are noticed by their sum and fetched once more; if they stay damaged, the error says so."""
    hub.corrupt(f"*/sql/{WEIGHTS}", 3000, "GET")
    assert len(pull(work, "alice/lib")["sql"].tensors) == 8
    assert hub.faults_ordered()[-1]["hits"] == 1
    hub.corrupt(f"*/sql/{WEIGHTS}", 3000, "GET")
    model = ArrowLoraModel.from_pretrained(pico_base(), "alice/lib", cache_dir=str(work / "routed"))
    assert model.expert_names == ["plurals", "dates", "sql"]
    hub.clear_faults()
    cache = str(work / "bad")
    hub.corrupt(f"*/sql/{WEIGHTS}", 3000, "GET", times=None)
    message = rf"'alice/lib/experts/sql': {WEIGHTS} has the sha256 [0-9a-f]{{64}}, and library.json says"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            AdapterLibrary.from_pretrained("alice/lib", cache_dir=cache).save_pretrained(work / "bad-out")
        with pytest.raises(ValueError, match=message):
            ArrowLoraModel.from_pretrained(pico_base(), "alice/lib", cache_dir=cache)
    assert not (work / "bad-out").exists()
    with pytest.raises(ValueError, match=message):
        AdapterLibrary.from_pretrained("alice/lib", cache_dir=cache, local_files_only=True)["sql"].tensors.path()
    hub.clear_faults()
    AdapterLibrary.from_pretrained("alice/lib", cache_dir=cache).save_pretrained(work / "bad-out")
    assert ArrowLoraModel.from_pretrained(pico_base(), "alice/lib", cache_dir=cache)


def check_corrupt_configs(hub: Hub, work: Path):
    """Damaged JSON too: once is mended, and what stays damaged does not stay in the way."""
    for path, at in (("library.json", 0), ("library.json", 40), ("sql/adapter_config.json", 0)):
        cache = str(work / path / str(at))
        hub.corrupt(f"*/{path}", at, "GET", times=None)
        with pytest.raises(ValueError, match=rf"'alice/lib.*{path.split('/')[-1]}"):
            AdapterLibrary.from_pretrained("alice/lib", cache_dir=cache)
        hub.clear_faults()
        assert len(AdapterLibrary.from_pretrained("alice/lib", cache_dir=cache)) == 3


def check_late_answers(hub: Hub, work: Path):
    """An answer that is late is asked for again; version 0 of the client does not."""
    hub.delay("*/library.json", 1.4, "HEAD")
    hub.delay(f"*/sql/{WEIGHTS}", 1.4, "GET")
    for _ in () if RESUMES else range(2):
        with pytest.raises(ValueError, match="(?s)alice/lib.*timed out"):
            pull(work, "alice/lib")
    assert len(pull(work, "alice/lib")) == 3
    assert all(fault["hits"] == 1 for fault in hub.faults_ordered())


def check_names(hub: Hub, work: Path):
    """Names that are given twice: by references, by a library on the Hub that is wrong."""
    library = pull(work, ["alice/one", "alice/one", "alice/lib/experts/sql", "alice/lib"])
    assert list(library) == ["one", "one-2", "sql", "plurals", "dates", "sql-2"]
    with pytest.raises(ValueError, match=r"adapters\['a'\]='alice/lib' is a library of 3 adapters"):
        AdapterLibrary.from_pretrained({"a": "alice/lib"})
    text = (work / "library/library.json").read_text()
    hub.create("alice/twice", {"library.json": re.sub(r'"name": "(dates|sql)"', '"name": "plurals"', text)})
    with pytest.raises(ValueError, match=r"'alice/twice'.*plurals"):
        AdapterLibrary.from_pretrained("alice/twice")


def seed(hub: Hub, work: Path):
    """The repositories of the checks, and the library on the Hub that is the one in `work/library`."""
    files = make_adapter(work / "one", 5, "mit", r=2, target_modules=["v_proj"])
    texts = {path: files[path].decode() for path in ("README.md", "adapter_config.json")}
    for name in ("one", "gated", "gone"):
        API.create_repo(f"alice/{name}")
        API.upload_folder(repo_id=f"alice/{name}", folder_path=work / "one")
    hub.create("alice/empty", {"x": "x"})
    hub.create("alice/bare", texts)
    hub.create("alice/pickle", {**texts, "adapter_model.bin": "pickle"})
    hub.create("alice/damaged", {**texts, WEIGHTS: "\x08" + "\x00" * 7 + "no json!"})
    AdapterLibrary.from_pretrained(work / "library").push_to_hub("alice/lib")


def main(work: str, only: str = ""):
    """Run all checks."""
    hub = Hub(os.environ["HF_ENDPOINT"])
    seed(hub, Path(work))
    time.sleep = sleep_less
    run_checks(globals(), hub, Path(work), only=only)


if __name__ == "__main__":
    main(*sys.argv[1:])
