"""Programs that a model wrote, run where they can reach nothing: in bubblewrap, or not at all."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path


PASSED = 77  # the exit code of a program that ran to its end; Python itself never ends with it
SECONDS = 10
MIB = 512
SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")
# Limits first, then the program, then the code that says that it ran to its end.
RUNNER = f"""
import os, resource, sys
for name, most in (("AS", {MIB << 20}), ("CPU", {SECONDS}), ("FSIZE", 1 << 20), ("NOFILE", 32), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
exec(compile(sys.stdin.read(), "program", "exec"), {{"__name__": "__main__"}})
os._exit({PASSED})
"""


class Sandbox:
    """Runs Python programs without a network, without the machine's files and processes, and with limits.

    A program sees the interpreter and its libraries, read-only, and an empty `/tmp` of its own. It has `SECONDS` and
    `MIB` of address space. The walls are those of Linux namespaces, set up by bubblewrap (the package `bubblewrap`).

    Raises:
        RuntimeError: bubblewrap is missing or cannot make a sandbox here; nothing was run.
    """

    def __init__(self) -> None:
        found = shutil.which("bwrap")
        if found is None:
            raise RuntimeError(
                "code that a model wrote is run in a sandbox only, and bubblewrap's 'bwrap' is not installed "
                "(Debian: apt-get install bubblewrap); without it leave 'code' out of judging.groups."
            )
        self._words = [found, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
        python = Path(sys.executable).resolve()
        for folder in dict.fromkeys([*SYSTEM, sys.base_prefix, sysconfig.get_config_var("LIBDIR") or "/usr"]):
            self._words += ["--ro-bind-try", folder, folder]
        self._words += ["--proc", "/proc", "--dev", "/dev", "--size", str(16 << 20), "--tmpfs", "/tmp"]
        self._words += ["--chdir", "/tmp", str(python), "-I", "-B", "-c", RUNNER]
        tried = self._run("pass")
        if tried is None or tried.returncode != PASSED:
            reason = "it took too long" if tried is None else tried.stderr.decode(errors="replace").strip()
            raise RuntimeError(f"bubblewrap cannot make a sandbox here, so no code is run: {reason}")

    def passes(self, program: str) -> bool:
        """Whether a program runs to its end: no error, no exit of its own, no limit reached."""
        done = self._run(program, is_told=False)
        return done is not None and done.returncode == PASSED

    def _run(self, program: str, is_told: bool = True) -> subprocess.CompletedProcess[bytes] | None:
        errors = subprocess.PIPE if is_told else subprocess.DEVNULL
        source = program.encode("utf-8", errors="replace")
        try:
            return subprocess.run(
                self._words, input=source, stdout=subprocess.DEVNULL, stderr=errors, timeout=2 * SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return None
