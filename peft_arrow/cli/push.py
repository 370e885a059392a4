"""`peft-arrow push`."""

import argparse
import json

from ..modeling import push_saved


SUMMARY = "Upload a saved library or routed model to the Hub as one commit, with its card."
EXAMPLE = """examples:
  peft-arrow push library me/my-library --private
  peft-arrow push routed me/my-routed-model --revision v2
  peft-arrow push library someone/their-library --pr

An interrupted push changes nothing on the Hub; the same command sends what is missing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("folder", metavar="FOLDER", help="written by save_pretrained of a library or a routed model")
    parser.add_argument("repo", metavar="REPO", help="user/repo, or repo for your own; made if it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch, made if it does not exist (default: main)")
    parser.add_argument("--pr", action="store_true", help="open a pull request instead of writing to the branch")
    parser.add_argument("--message", help="first line of the commit message")
    parser.add_argument("--base", help="Hub id of the base model, where the library names a folder")
    parser.add_argument("--token", help="Hub token that may write (default: the one you are logged in with)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Push with parsed arguments."""
    commit = push_saved(
        arguments.folder,
        arguments.repo,
        base_model=arguments.base,
        private=arguments.private,
        token=arguments.token,
        revision=arguments.revision,
        commit_message=arguments.message,
        create_pr=arguments.pr,
    )
    if arguments.json:
        print(json.dumps({"url": commit.pr_url or commit.commit_url, "commit": commit.oid}))
    else:
        print(f"Pushed: {commit.pr_url or commit.commit_url}")
