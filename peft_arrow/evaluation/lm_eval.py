"""The command line of lm-evaluation-harness with `--model peft-arrow`: `python -m peft_arrow.evaluation.lm_eval ...`.

lm_eval 0.4.13 looks up models in a list of its own; versions that read the entry points `lm_eval.models` of installed
packages find it without this module.
"""

from .lm_eval_model import PeftArrowLM  # isort: skip  # it says what to install where lm_eval is missing

from lm_eval.__main__ import cli_evaluate


__all__ = ["PeftArrowLM", "cli_evaluate"]


if __name__ == "__main__":
    cli_evaluate()
