"""The commands pull, push and discover as a user types them; `test_hub_cli` runs this as a process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi
from safetensors.torch import save
from transformers import LlamaConfig, LlamaForCausalLM

from peft_arrow import AdapterLibrary, ArrowLoraModel
from peft_arrow.cli import main as peft_arrow
from tests.library.hub_runs import BASE, Hub, files_of, make_adapter, run_checks
from tests.pico import pico_adapter, pico_base


API = HfApi()
WEIGHTS = "adapter_model.safetensors"
OLD, MIRROR = "alice/pico-old", "unsloth/pico-bnb-4bit"


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command; progress bars are no errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = peft_arrow([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code
    lines = [line for line in err.getvalue().splitlines() if line.strip() and not re.search(r"\d+%\|", line)]
    return code, out.getvalue(), "\n".join(lines)


def check_push(hub: Hub, work: Path):
    """A saved library and a saved routed model; what is said, in words and as JSON."""
    library = work / "library"
    assert run("push", library, "alice/lib") == (
        0,
        f"Pushed: {hub.endpoint}/alice/lib/commit/{head('alice/lib')}\n",
        "",
    )
    code, out, _ = run("push", library, "shelf", "--private", "--message", "Mine", "--json")
    assert code == 0 and json.loads(out) == {
        "url": f"{hub.endpoint}/alice/shelf/commit/{head('alice/shelf')}",
        "commit": head("alice/shelf"),
    }
    assert API.model_info("alice/shelf").private and API.list_repo_commits("alice/shelf")[0].title == "Mine"
    code, out, _ = run("push", library, "alice/lib", "--revision", "v2")
    assert code == 0 and head("alice/lib", "v2") in out
    AdapterLibrary.from_pretrained(library).without("sql").save_pretrained(work / "fewer")
    code, out, _ = run("push", work / "fewer", "alice/lib", "--pr", "--json")
    assert json.loads(out)["url"].endswith("alice/lib/discussions/1")
    pico_base().save_pretrained(work / "base-copy")
    base = LlamaForCausalLM.from_pretrained(work / "base-copy")
    ArrowLoraModel.from_pretrained(base, library).save_pretrained(work / "routed")
    before = files_of(work / "routed")
    code, _, err = run("push", work / "routed", "alice/routed")
    assert code == 2 and "is a folder of this machine, which others cannot load" in err
    assert run("push", work / "routed", "alice/routed", "--base", BASE)[0] == 0
    config = json.loads(Path(API.hf_hub_download("alice/routed", "adapter_config.json")).read_text())
    assert config["base_model_name_or_path"] == BASE and files_of(work / "routed") == before


def check_push_refused(hub: Hub, work: Path):
    """2 for what the user can put right in the command, 1 for what the Hub says."""
    library = work / "library"
    (work / "nothing").mkdir()
    for arguments, code, message in (
        ((work / "nothing", "alice/x"), 2, "holds no library.json and no adapter_config.json; save a model first"),
        ((work / "adapters/sql", "alice/x"), 2, "holds a plain adapter, not a routed model; pull it into a library"),
        ((library, "alice/lib", "--private"), 2, "exists and is public; change it in its settings, or leave"),
        ((library, "bob/x"), 1, "403"),
        ((library, "alice/x", "--token", "hf_wrong"), 1, "401"),
        ((library,), 2, "the following arguments are required: REPO"),
    ):
        found, out, err = run("push", *arguments)
        assert (found, out) == (code, "") and re.search(message, err), (arguments, found, err)
        assert "Traceback" not in err


def head(repo_id: str, revision: str | None = None) -> str:
    """The newest commit of a revision."""
    return API.model_info(repo_id, revision=revision).sha


def check_pull(hub: Hub, work: Path):
    """A library, and single adapters with a name for the base; what is said, in words and as JSON."""
    target = work / "pulled"
    assert run("pull", "alice/lib", "--output", target) == (0, f"3 experts for {BASE} are in {target}.\n", "")
    assert files_of(target / "experts") == files_of(work / "library/experts")
    code, out, _ = run("pull", "alice/lib@v2", work / "adapters/sql", "--output", target, "--json")
    manifest = json.loads(out)
    assert code == 0 and manifest == json.loads((target / "library.json").read_text())
    assert [expert["name"] for expert in manifest["experts"]] == ["plurals", "dates", "sql", "sql-2"]
    assert run("pull", "alice/lib/experts/sql", "--output", work / "one", "--base", "me/other")[0] == 0
    assert AdapterLibrary.from_pretrained(work / "one").base_model_name_or_path == "me/other"
    assert run("pull", "alice/shelf", "--output", work / "shelf")[0] == 0


def check_pull_refused(hub: Hub, work: Path):
    """What is wrong is named, and no folder is made."""
    for arguments, code, message in (
        (("alice/none",), 2, "'alice/none': there is no such folder, and the Hub answered: 404"),
        (("./alice/lib",), 2, r"the path 'alice/lib' does not exist"),
        (("alice/shelf", "--token", "hf_bob"), 2, "'alice/shelf'.*404"),
        ((), 2, "the following arguments are required: REF"),
    ):
        found, out, err = run("pull", *arguments, "--output", work / "refused")
        assert (found, out) == (code, "") and re.search(message, err), (arguments, found, err)
        assert not (work / "refused").exists() and "Traceback" not in err
    code, _, err = run("pull", "alice/lib", "--output", work)
    assert code == 2 and "give a new or empty folder" in err
    hub.fail(f"*/{WEIGHTS}", status=410, times=None)
    code, _, err = run("pull", "alice/lib@refs/pr/1", "--output", work / "refused")
    assert code == 2 and "410" in err and not (work / "refused").exists()


def check_the_hub_is_gone(hub: Hub, work: Path):
    """A sentence, and exit code 1."""
    for arguments in (("push", work / "library", "alice/lost"), ("discover", BASE)):
        hub.drop("/api/models*", times=None)
        hub.drop("/api/repos*", times=None)
        code, out, err = run(*arguments)
        # the second is how version 0 of huggingface_hub says it
        assert code == 1 and out == "" and re.search("the Hub cannot be reached: |Connection aborted", err), err


def seed_adapters(hub: Hub, work: Path):
    """Adapters of the base under all its names, good and bad ones, with numbers of downloads."""
    hub.create(OLD, {})
    config = json.dumps(pico_base().config.to_dict())
    hub.commit(OLD, {"config.json": config})
    hub.rename(OLD, "alice/pico2")

    def add(name: str, downloads: int, license: str | None = "mit", base: str = BASE, change=None, **lora_config):
        options = {"r": 4, "target_modules": ["q_proj"], **lora_config}
        files = make_adapter(work / "found" / name, downloads, license, **options)
        files["README.md"] = files["README.md"].replace(BASE.encode(), base.encode())
        for path, data in (change or {}).items():
            files[path] = data
        # bytes as the server stores them, through the client
        folder = work / "found" / name
        for path, data in files.items():
            (folder / path).unlink(missing_ok=True)
            if data is not None:
                (folder / path).write_bytes(data)
        API.create_repo(f"lab/{name}")
        API.upload_folder(repo_id=f"lab/{name}", folder_path=folder)
        hub.set(f"lab/{name}", downloads=downloads)

    add("small", 90)
    add("large", 80, "apache-2.0", r=512, target_modules=["q_proj", "v_proj", "o_proj"])
    add("no-licence", 70, None)
    add("old-name", 60, base="alice/pico2")
    add("mirror", 50, base=MIRROR)
    add("no-json", 40, change={"adapter_config.json": b"{"})
    add("pickle", 30, change={WEIGHTS: None, "adapter_model.bin": b"pickle"})
    add("no-weights", 20, change={WEIGHTS: None})
    wide = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=9))
    pico_adapter(work / "wide", seed=1, base=wide, r=4, target_modules=["q_proj"])
    add("other-base", 10, change={WEIGHTS: (work / "wide" / WEIGHTS).read_bytes()})
    add("no-lora", 5, change={WEIGHTS: save({"classifier.weight": torch.ones(2, 2)})})
    add("elsewhere", 99, base="somebody/else")


def discover(*arguments: object) -> list[dict]:
    """The reports that the command prints as JSON."""
    code, out, err = run("discover", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)["adapters"]


def names_of(reports: list[dict], prefix: str = "lab/") -> list[str]:
    """Their sources."""
    return [report["source"].removeprefix(prefix) for report in reports]


ALL = ["small", "large", "no-licence", "no-json", "pickle", "no-weights", "other-base", "no-lora"]


def check_discover(hub: Hub, work: Path):
    """Found under all names of the base, the most downloaded of each first, and judged with reasons."""
    seed_adapters(hub, work)
    reports = discover(BASE, "--author", "lab")
    assert names_of(reports) == [*ALL, "mirror"]
    known = dict(zip(names_of(reports), reports))
    assert [name for name in known if known[name]["ok"]] == ["small", "large", "no-licence", "mirror"]
    assert known["large"]["rank"] == 512 and known["large"]["downloads"] == 80
    assert known["large"]["license"] == "apache-2.0" and known["small"]["commit"] == head("lab/small")
    reasons = {name: " ".join(problem["text"] for problem in known[name]["problems"]) for name in known}
    for name, reason in (
        ("no-json", "adapter_config.json"),
        ("pickle", "adapter_model.bin"),
        ("no-weights", WEIGHTS),
        ("other-base", "64"),
        ("no-lora", "classifier.weight"),
    ):
        assert re.search(reason, reasons[name]), (name, reasons[name])
    assert not any(report["weights_read"] for report in reports)
    assert "lab/old-name" in [report["source"] for report in discover("alice/pico2")]
    assert "old-name" in names_of(discover(OLD)), "an id that the base no longer has redirects to the one it has"
    found = names_of(discover(BASE, "--aliases", "alice/pico2", "--author", "lab"))
    assert sorted(found) == sorted([*ALL, "mirror", "old-name"])


def check_discover_filters(hub: Hub, work: Path):
    """By licence, rank, size, downloads, author and number."""
    lab = (BASE, "--author", "lab")
    assert names_of(discover(*lab, "--licenses", "apache-2.0")) == ["large"]
    assert names_of(discover(*lab, "--licenses", "apache-2.0", "mit"))[:2] == ["small", "large"]
    assert "no-licence" not in names_of(discover(*lab, "--licenses", "apache-2.0", "mit"))
    assert "large" not in names_of(discover(*lab, "--max-rank", 4))
    assert "large" not in names_of(discover(*lab, "--max-size", 100_000))
    assert names_of(discover(*lab, "--min-downloads", 70)) == ["small", "large", "no-licence"]
    assert names_of(discover(*lab, "--limit", 2)) == ["small", "large"]
    assert names_of(discover(*lab, "--limit", 2, "--max-rank", 4)) == ["small", "no-licence"]
    assert discover(BASE, "--author", "nobody") == discover("nobody/base") == []
    libraries = {report["source"] for report in discover(BASE, "--author", "alice")}
    assert {"alice/lib/experts/plurals", "alice/lib/experts/dates", "alice/lib/experts/sql"} <= libraries


def check_discover_downloads_little(hub: Hub, work: Path):
    """Nothing but listings, configs, cards and the first bytes of weights, and these not into the cache."""
    start = len(hub.log())
    code, out, err = run("discover", BASE, "--author", "lab")
    log = hub.log()[start:]
    assert code == 0 and "small" in out
    files = {line["path"].rpartition("/resolve/")[2].split("/", 1)[-1] for line in log if "/resolve/" in line["path"]}
    assert files <= {"adapter_config.json", "library.json", "README.md", "config.json", WEIGHTS, "adapter_model.bin"}
    weights = [line for line in log if line["path"].endswith((WEIGHTS, ".bin")) and line["method"] == "GET"]
    assert weights and all(line["sent"] <= 100_001 for line in weights)
    large = API.get_paths_info("lab/large", [WEIGHTS])[0].size
    assert large > 500_000 and max(line["sent"] for line in log) <= 100_001
    assert not [path for path in Path(os.environ["HF_HOME"]).rglob(WEIGHTS) if "models--lab--" in str(path)]


def check_discover_texts(hub: Hub, work: Path):
    """The table names every adapter and says what is wrong; bad arguments are refused."""
    code, out, err = run("discover", BASE, "--author", "lab")
    assert code == 0 and err == ""
    assert all(name in out for name in (*ALL, "mirror"))
    for arguments, message in (
        (("/home/me/pico",), "is a folder; adapters are searched by the base's Hub id"),
        ((BASE, "--limit", 0), "--limit"),
        ((), "the following arguments are required: BASE"),
    ):
        code, out, err = run("discover", *arguments)
        assert (code, out) == (2, "") and message in err, (arguments, err)
    start = len(hub.requests())
    hub.fail("/api/models", "GET", status=418, times=None)
    code, out, err = run("discover", BASE)
    assert code == 1 and "418" in err and "Traceback" not in err and len(hub.requests()) < start + 9


def main(work: str, only: str = ""):
    """Run all checks."""
    run_checks(globals(), Hub(os.environ["HF_ENDPOINT"]), Path(work), only=only)


if __name__ == "__main__":
    main(*sys.argv[1:])
