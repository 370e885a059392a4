"""The paper (arXiv 2405.11157) on a model anyone can run: libraries, routers, adaptation, analyses.

    python examples/replication/replicate.py --data DATA --output replication      # hours; the same command goes on
    python examples/replication/replicate.py --data DATA --output replication --minutes 30
    python examples/replication/replicate.py --data DATA --output replication --seed 1     # all of it once more
    python examples/replication/replicate.py --data DATA --output replication --report     # tables of what is there
    python examples/replication/replicate.py --smoke                               # four made-up tasks, minutes

docs/replication.md has the results. The work is in pieces of a few minutes. A piece that was killed goes on where it
can, and gives what it would have given. Several processes share the work: --workers, or the same command again in
another terminal.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from report.page import write_docs, write_report
from steps.hub import fetch
from steps.made_up import write_made_up
from steps.pieces import is_done, list_pieces, work
from steps.setting import Setting, read_setting


HERE = Path(__file__).parent


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml", help="(default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder of train_suite, heldout_sni, heldout_benchmarks; or hub")
    parser.add_argument("--output", type=Path, help="folder of libraries and results; it may exist already")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is trained (default: 0)")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each if several (default: 1)")
    parser.add_argument("--minutes", type=float, help="begin no piece after so many minutes")
    parser.add_argument("--only", nargs="+", help="pieces whose name begins with one of these, where * is anything")
    parser.add_argument("--list", action="store_true", help="list the pieces and stop")
    parser.add_argument("--report", action="store_true", help="write results.json, tables and figures, and stop")
    parser.add_argument("--docs", type=Path, metavar="DOCS", help="with --report: also fill the tables of this folder")
    parser.add_argument("--smoke", action="store_true", help="the whole chain on made-up tasks")
    return parser.parse_args()


def main() -> None:
    """Do what is left, then write the report."""
    arguments = read_arguments()
    if arguments.smoke:
        return smoke(arguments)
    if arguments.output is None or arguments.data is None:
        raise SystemExit("--output and --data are needed; see --help.")
    setting = read_setting(arguments.config, arguments.output, arguments.data, arguments.seed)
    if str(arguments.data) == "hub":
        setting = replace(setting, data=fetch(arguments.output / "data", setting.base[1]))
    if not arguments.report:
        run(setting, arguments)
    write_report(setting)
    print(f"The tables are in {setting.root / 'report.md'}, the pictures in {setting.root / 'figures'}.")
    if arguments.docs is not None:
        write_docs(setting, arguments.docs)


def smoke(arguments: argparse.Namespace) -> None:
    """Everything on four made-up tasks, in a folder that is removed unless one is given."""
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.output or Path(temporary) / "replication"
        data = arguments.data or write_made_up(Path(temporary) / "data")
        setting = read_setting(HERE / "smoke.yaml", root, data, arguments.seed)
        run(setting, arguments)
        print(write_report(setting))


def run(setting: Setting, arguments: argparse.Namespace) -> None:
    """Work on the pieces, with other processes where asked."""
    pieces = [
        piece
        for piece in list_pieces(setting)
        if not arguments.only or any(fnmatchcase(piece.name, f"{part}*") for part in arguments.only)
    ]
    if arguments.list:
        for piece in pieces:
            print("done" if is_done(setting, piece.name) else "left", piece.name)
        raise SystemExit
    if arguments.workers > 1 or "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(1)
    others = [start_worker() for _ in range(arguments.workers - 1)]
    until = None if arguments.minutes is None else time.time() + 60 * arguments.minutes
    try:
        work(setting, pieces, lambda line: print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True), until)
    finally:
        for other in others:
            if sys.exc_info()[0] is not None:
                other.terminate()
            other.wait()


def start_worker() -> subprocess.Popen:
    """The same command as one worker of one thread."""
    words = [sys.executable, *sys.argv, "--workers", "1"]  # the last of two counts
    return subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
