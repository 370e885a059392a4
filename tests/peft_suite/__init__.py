"""PEFT's own tests, run with the configs of this project. See docs/peft-suite.md."""
