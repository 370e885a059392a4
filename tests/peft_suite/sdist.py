"""The tests of the installed PEFT. Its wheel has none: they come from the source distribution of the same version."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path


class SdistError(RuntimeError):
    """The source distribution could not be had, or is not that of the installed PEFT."""


def cache_folder() -> Path:
    """Where downloads are kept between runs: never inside the repository."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "peft-arrow" / "peft-suite"


def upstream_tests(unpack_to: Path) -> Path:
    """Unpack the tests of exactly the installed PEFT below `unpack_to` and return their folder.

    Raises SdistError when PyPI cannot be reached and nothing is cached, or when the source distribution's package
    differs from the installed one.
    """
    version = metadata.version("peft")
    archive = _cached(version) or _download(version)
    with tarfile.open(archive) as tar:
        tar.extractall(unpack_to, filter="data")
    folder = unpack_to / f"peft-{version}"
    _check_same_source(folder / "src", version)
    return folder / "tests"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _cached(version: str) -> Path | None:
    archive = cache_folder() / f"peft-{version}.tar.gz"
    record = archive.with_name(archive.name + ".sha256")
    if archive.is_file() and record.is_file() and record.read_text().strip() == _digest(archive):
        return archive
    return None


def _download(version: str) -> Path:
    """Have pip fetch the archive (it checks the index's hash), then keep it beside its own SHA-256."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    name = f"peft-{version}.tar.gz"
    print(f"peft-suite: downloading {name} from the package index", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", "peft", "--dest", scratch, f"peft=={version}"]
        result = subprocess.run(command, capture_output=True, text=True)
        archive = Path(scratch) / name
        if result.returncode != 0 or not archive.is_file():
            reason = (result.stderr or result.stdout).strip()[-2000:]
            raise SdistError(f"pip could not download the source distribution of peft=={version}: {reason}")
        (folder / f"{name}.sha256").write_text(_digest(archive) + "\n")
        return archive.replace(folder / name)


def _check_same_source(source: Path, version: str) -> None:
    """The tests belong to the installed code only when both are the same, file by file."""
    distribution = metadata.distribution("peft")
    differing = []
    for path in sorted((source / "peft").rglob("*.py")):
        relative = path.relative_to(source)
        installed = Path(str(distribution.locate_file(relative)))
        if not installed.is_file() or installed.read_bytes() != path.read_bytes():
            differing.append(str(relative))
    if differing:
        listed = ", ".join(differing[:5])
        raise SdistError(
            f"the installed peft {version} is not the released one: {len(differing)} of its files differ from the "
            f"source distribution ({listed})"
        )
