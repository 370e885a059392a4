"""Judge a pico library into a folder: the process that `test_judge.py` kills.

python -m tests.evaluation.kill_runner ADAPTERS OUTPUT
"""

import sys
from pathlib import Path

from peft_arrow import evaluate_library
from tests.evaluation.made import random_library, two_tasks
from tests.pico import pico_base, pico_tokenizer


def main() -> None:
    adapters, output = map(Path, sys.argv[1:])
    library = random_library(adapters)
    evaluate_library(
        pico_base(), library, two_tasks(20), methods=["arrow"], tokenizer=pico_tokenizer(), output_dir=output
    )


if __name__ == "__main__":
    main()
