"""`python -m tests.peft_suite`: PEFT's own tests with this project's config class."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.peft_suite.rewrite import UpstreamChanged
from tests.peft_suite.runner import Counts, run
from tests.peft_suite.sdist import SdistError
from tests.peft_suite.specs import CASE_LISTS, SPECS, described


MINIMUM_PASSED = 1_100


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; 0 only when nothing failed and enough passed, 2 when it could not be run."""
    options = _parser().parse_args(arguments)
    spec = SPECS["mutant" if options.mutant else options.spec]
    partial = bool(options.keyword or options.module)
    modules = options.module or (["test_custom_models"] if options.mutant else None)
    began = time.monotonic()
    try:
        counts = run(
            spec,
            modules,
            jobs=options.jobs,
            keyword=options.keyword,
            keep=options.keep,
            verbose=options.verbose,
        )
    except (SdistError, UpstreamChanged) as problem:
        print(f"peft-suite: {problem}", file=sys.stderr)
        return 2
    _report(counts, time.monotonic() - began)
    if options.adjustments:
        print("\n".join(described(spec)))
    if options.mutant:
        return _judge_mutant(counts)
    minimum = 1 if partial else MINIMUM_PASSED
    if counts.passed < minimum:
        print(f"peft-suite: only {counts.passed} tests passed, {minimum} are the least")
    return int(counts.failed > 0 or counts.passed < minimum)


def _report(counts: Counts, seconds: float) -> None:
    for reason, number in counts.skip_reasons.most_common():
        print(f"  skipped {number:4d}: {reason}")
    for failure in counts.failures:
        print(f"  failed: {failure}")
    print(
        f"peft-suite: collected {counts.collected}, passed {counts.passed}, skipped {counts.skipped}, "
        f"failed {counts.failed} in {seconds:.0f} s"
    )


def _judge_mutant(counts: Counts) -> int:
    caught = counts.failed > 0 and counts.passed > 0
    print(f"peft-suite: the mutant was {'caught' if caught else 'NOT caught'}")
    return int(not caught)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.peft_suite", description=__doc__)
    parser.add_argument("--spec", choices=[name for name in SPECS if name != "mutant"], default="arrow")
    parser.add_argument("--mutant", action="store_true", help="run broken code; 0 when the suite notices")
    parser.add_argument("--module", action="append", choices=list(CASE_LISTS), help="only this upstream module")
    parser.add_argument("-k", dest="keyword", help="only tests that match, as pytest's -k")
    parser.add_argument("-n", dest="jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--keep", type=Path, help="keep the rewritten tests in this new folder")
    parser.add_argument("--verbose", action="store_true", help="long tracebacks")
    parser.add_argument("--adjustments", action="store_true", help="list every change made to upstream's tests")
    return parser


if __name__ == "__main__":
    sys.exit(main())
