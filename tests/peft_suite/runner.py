"""One run: a folder with the rewritten tests and the stand-ins, pytest in it, and what came of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.peft_suite import standins
from tests.peft_suite.rewrite import HEADER, UpstreamChanged, patched, rewrite
from tests.peft_suite.sdist import upstream_tests
from tests.peft_suite.specs import CASE_LISTS, SPEC_VARIABLE, Spec


REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "peft_upstream"
HELPERS = ("testing_common", "testing_utils")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")


@dataclass(frozen=True)
class Counts:
    """What pytest reported."""

    collected: int
    passed: int
    skipped: int
    failed: int
    failures: list[str]
    skip_reasons: Counter[str]


def prepare(spec: Spec, modules: list[str], folder: Path) -> None:
    """Write the rewritten upstream tests and the models that they name into `folder`."""
    upstream = upstream_tests(folder / "sdist")
    package = folder / PACKAGE
    package.mkdir()
    (package / "__init__.py").touch()
    for helper in HELPERS:
        source = patched(helper, (upstream / f"{helper}.py").read_text(), spec)
        (package / f"{helper}.py").write_text(_with_header(source))
    hub_ids: set[str] = set()
    for module in modules:
        result = rewrite(module, (upstream / f"{module}.py").read_text(), spec)
        (package / f"{module}.py").write_text(result.source)
        print(f"peft-suite: {module}: {len(result.kept)} tests take a config, {len(result.dropped)} do not")
        hub_ids |= result.hub_ids
    unknown = hub_ids - standins.KNOWN_IDS
    if unknown:
        raise UpstreamChanged(f"no stand-in for the Hub ids {', '.join(sorted(unknown))}: add them to standins.py")
    standins.build(folder, hub_ids)
    (folder / "pytest.ini").write_text(
        f"[pytest]\nmarkers =\n    bitsandbytes: upstream's own\ntestpaths = {PACKAGE}\n"
    )


def _with_header(source: str) -> str:
    """The spec's name in a helper module, on the line of its first import."""
    return source.replace("\nimport ", f"\n{HEADER}import ", 1)


def run_pytest(spec: Spec, folder: Path, jobs: int, keyword: str | None, verbose: bool) -> Counts:
    """Run the prepared folder's tests and read the result."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "tests.peft_suite.plugin", "-p", "no:cacheprovider"]
    command += ["-c", str(folder / "pytest.ini"), "--basetemp", str(folder / "tmp"), "--junitxml", str(report)]
    command += ["-q", "--no-header", "--disable-warnings", "--tb", "long" if verbose else "short"]
    command += ["-n", str(jobs), "--dist", "worksteal"] if jobs > 1 else []
    command += ["-k", keyword] if keyword else []
    environment = os.environ | dict.fromkeys(OFFLINE, "1") | {SPEC_VARIABLE: spec.name, "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "HF_HOME": str(folder / "hub"), "TOKENIZERS_PARALLELISM": "false"}
    finished = subprocess.run(command, cwd=folder, env=environment)
    if not report.is_file():
        raise RuntimeError(f"pytest ended with {finished.returncode} and without a report")
    return read_report(report)


def read_report(report: Path) -> Counts:
    """Count the cases of a JUnit report."""
    outcomes: Counter[str] = Counter()
    skip_reasons: Counter[str] = Counter()
    failures = []
    for case in ET.parse(report).getroot().iter("testcase"):
        kinds = {child.tag: child for child in case}
        if "failure" in kinds or "error" in kinds:
            outcomes["failed"] += 1
            failures.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in kinds:
            outcomes["skipped"] += 1
            skip_reasons[kinds["skipped"].get("message", "")] += 1
        else:
            outcomes["passed"] += 1
    return Counts(
        collected=outcomes.total(),
        passed=outcomes["passed"],
        skipped=outcomes["skipped"],
        failed=outcomes["failed"],
        failures=failures,
        skip_reasons=skip_reasons,
    )


def run(
    spec: Spec,
    modules: list[str] | None = None,
    *,
    jobs: int = 2,
    keyword: str | None = None,
    keep: Path | None = None,
    verbose: bool = False,
) -> Counts:
    """Prepare and run; the folder is removed afterwards unless `keep` names it."""
    modules = modules or [module for module in CASE_LISTS if module != "test_quantization"]
    with tempfile.TemporaryDirectory(prefix="peft-suite-") as scratch:
        folder = keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(spec, modules, folder)
        return run_pytest(spec, folder, jobs, keyword, verbose)
