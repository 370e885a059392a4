"""`peft-arrow route`."""

import argparse
import json

from ..library.base_ids import is_same_base
from ..quickstart.base import BASE_ID, load_base, silence_known_warnings
from ..tracing import RoutedSource, read_fit_data, read_texts, route_texts
from .quickstart import at_least_1, with_newlines
from .router_options import pair_of, router_of


SUMMARY = "Send texts through a routed model and show which experts each token got: a table, a picture, a page."
EXAMPLE = """examples:
  peft-arrow route me/my-library --text "Translate to French: cat" --max-new-tokens 20
  peft-arrow route ./lora-a user/lora-b --base my/base --file letter.txt --router spectr:top_k=2,tied=true
  peft-arrow route me/my-library --prompts heldout.jsonl --oracle plural=nouns --output heldout-routing --json

A row of --prompts has "prompt", "messages", "instruction" and "input", or "text", and "task" where it is known. A
task's own expert is the one of its name, or the one that was trained for it; --oracle says it where that is not so.
--output gets routing.html (the experts behind each token), routing.png, routing.json and, with tasks,
routing_by_task.png. Where the base is SmolLM2-135M-Instruct and --base is not given, it is taken from PyPI."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("refs", nargs="+", metavar="REF", help="adapters, a library, or a saved routed model")
    parser.add_argument("--base", help="folder or Hub id of the base model (default: what the adapters name)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", type=with_newlines, help="texts; \\n is a new line")
    source.add_argument("--file", help="a file with one text")
    source.add_argument("--prompts", metavar="FILE", help="a file with a JSON object a line")
    parser.add_argument("--max-new-tokens", type=at_least_1, default=0, metavar="N", help="generate (default: no)")
    parser.add_argument(
        "--router",
        type=router_of,
        default={},
        metavar="ROUTER",
        help="a router, with options as arrow:top_k=2,tied=true (default: what was saved, or arrow)",
    )
    parser.add_argument("--top-k", type=at_least_1, metavar="K", help="experts a token")
    parser.add_argument(
        "--fit-data", nargs="+", metavar="FILE", help="<expert>.jsonl, for a router that needs data; rows as in train"
    )
    parser.add_argument("--oracle", nargs="+", type=pair_of, metavar="TASK=EXPERT", help="a task's own expert")
    parser.add_argument("--output", default="routing", help="folder for the results (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the base")
    parser.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit of the adapters; @revision in a REF wins")
    parser.add_argument("--token", help="Hub token for the adapters")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Route with parsed arguments."""
    silence_known_warnings()
    texts = read_texts(arguments.text, arguments.file, arguments.prompts)
    source = RoutedSource(arguments.refs, arguments.base, token=arguments.token, revision=arguments.revision)
    is_smollm2 = arguments.base is None and is_same_base(source.base, BASE_ID)
    base, tokenizer = load_base(None if is_smollm2 else source.base, arguments.dtype)
    options = arguments.router | ({"top_k": arguments.top_k} if arguments.top_k else {})
    model = source.on(base.to(arguments.device), tokenizer, options, read_fit_data(arguments.fit_data or ()))
    own = source.own_experts((text.task for text in texts if text.task), model.expert_names)
    own |= dict(arguments.oracle or ())
    result = route_texts(model, tokenizer, texts, max_new_tokens=arguments.max_new_tokens, own_experts=own)
    files = [str(path) for path in result.save(arguments.output)]
    if arguments.json:
        print(json.dumps({"base": source.base, **result.record(), "files": files}, ensure_ascii=False))
    else:
        print("\n".join([result.table(), "", *(f"{file} is written." for file in files)]))
