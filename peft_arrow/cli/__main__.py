"""`python -m peft_arrow.cli`, the same as `peft-arrow`."""

import sys

from . import main


if __name__ == "__main__":  # the training processes import this file again
    sys.exit(main())
