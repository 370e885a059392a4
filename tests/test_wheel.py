"""The wheel holds what the package needs at run time: built, installed in an empty environment, used from there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PARTS = ["peft_arrow", "hub_cards", "pyproject.toml", "README.md", "LICENSE"]
USE = """
import pathlib, sys
from importlib import resources
import peft_arrow
from peft_arrow.cards import card_folder, card_template

assert pathlib.Path(sys.prefix) in pathlib.Path(peft_arrow.__file__).parents, peft_arrow.__file__
assert pathlib.Path(sys.prefix) in card_folder().parents, card_folder()
for name in ("library.md", "routed_model.md"):
    assert "{{ card_data }}" in card_template(name).read_text()
assert "{{data}}" in resources.files("peft_arrow.tuner").joinpath("trace_page.html").read_text()
assert peft_arrow.ArrowLoraConfig(num_experts=2, r=4).peft_type == "ARROW_LORA"
print(peft_arrow.__version__)
"""

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    answer = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd, timeout=540)
    assert answer.returncode == 0, f"{command}\n{answer.stdout[-4000:]}\n{answer.stderr[-4000:]}"
    return answer.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy so that nothing is written into the clone."""
    pytest.importorskip("hatchling", reason="the wheel is built without network: hatchling must be installed")
    source = tmp_path_factory.mktemp("source")
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
        copy(ROOT / part, source / part)
    out = tmp_path_factory.mktemp("dist")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    run(*pip, "--wheel-dir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment that holds the wheel and, through a path file, the packages it depends on."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=True)
    interpreter = folder / "bin" / "python"
    site_packages = Path(
        run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    # Path files inside the parent are not read this way, so its editable peft_arrow stays out of sight.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", interpreter]
    run(*pip, "install", "--no-deps", "--no-index", "--quiet", wheel, cwd=folder)
    return interpreter


def test_wheel_holds_package_and_templates(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    expected = [f"peft_arrow/{path.relative_to(ROOT)}" for path in sorted((ROOT / "hub_cards").rglob("*.md"))]
    modules = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "peft_arrow").rglob("*.py"))]
    assert expected and set(expected + modules) <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "hub_cards/", "docs/", "examples/"))]


def test_wheel_is_used_from_an_empty_environment(python, tmp_path):
    assert run(python, "-I", "-c", USE, cwd=tmp_path).strip()


def test_command_is_installed(python, tmp_path):
    assert "quickstart" in run(python.parent / "peft-arrow", "--help", cwd=tmp_path)
