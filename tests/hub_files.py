"""The requests of the test Hub about files: trees, uploads, commits and downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from urllib.parse import parse_qs

from tests.hub_routes import API, REPO_ID, REVISION, Answer, Call, as_json, check_access, paged, route
from tests.hub_store import Blob, Commit, HubError
from tests.hub_views import check_card, file_entry, folder_entry, folders_of, tree_of


@route("GET", API + rf"/tree/{REVISION}(?:/(?P<folder>.+))?", "read")
def tree(call: Call) -> Answer:
    """The entries of a folder."""
    commit, folder = call.repo.at(call.args["revision"]), call.args.get("folder", "").strip("/")
    if folder and folder not in folders_of(commit):
        raise HubError(404, f'{folder} does not exist on "{call.args["revision"]}"', "EntryNotFound")
    return paged(call, tree_of(commit, folder, call.flag("recursive")))


@route("POST", API + rf"/paths-info/{REVISION}", "read")
def paths_info(call: Call) -> Answer:
    """The entries of some paths; what does not exist is left out."""
    commit = call.repo.at(call.args["revision"])
    is_json = "json" in call.headers.get("Content-Type", "")
    asked = call.json() if is_json else parse_qs(call.body.decode())
    paths = [path.strip("/") for path in asked.get("paths", [])]
    folders = folders_of(commit)
    files = [file_entry(path, commit.files[path]) for path in paths if path in commit.files]
    return as_json(files + [folder_entry(path, commit) for path in paths if path in folders])


def check_push(call: Call):
    """Refuse a commit to who may only propose changes; a pull request is open to who opened it."""
    pull = call.repo.pull(call.args["revision"])
    if not call.flag("create_pr") and not (pull and pull.author == call.user):
        check_access(call, "write")


@route("POST", API + rf"/preupload/{REVISION}", "contribute")
def preupload(call: Call) -> Answer:
    """How to upload each file, and what is there now."""
    check_push(call)
    there = call.repo.at(call.args["revision"]).files
    answers = []
    for file in call.json()["files"]:
        path = file["path"]
        mode = call.store.upload_mode(path, file["size"])
        oid = there[path].etag if path in there else None
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return as_json({"files": answers})


@route("POST", rf"/(?:(?P<type>dataset|space)s/)?{REPO_ID}\.git/info/lfs/objects/batch", "contribute")
def lfs_batch(call: Call) -> Answer:
    """Where to upload the large files that are not there yet."""
    objects = []
    for wanted in call.json()["objects"]:
        upload = {"href": f"{call.endpoint}/_lfs/{wanted['oid']}", "header": {}}
        actions = {} if wanted["oid"] in call.store.objects else {"actions": {"upload": upload}}
        objects.append({"oid": wanted["oid"], "size": wanted["size"], **actions})
    return as_json({"transfer": "basic", "objects": objects})


@route("PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})")
def lfs_upload(call: Call) -> Answer:
    """A large file."""
    if hashlib.sha256(call.body).hexdigest() != call.args["oid"]:
        raise HubError(400, "the content is not that of the announced sha256")
    call.store.objects[call.args["oid"]] = call.body
    return as_json({})


def apply(call: Call, parent: Commit, key: str, value: dict, files: dict[str, Blob]):
    """One operation of a commit."""
    path = value["path"]
    if key == "file":
        files[path] = Blob(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        known = {blob.sha256: blob.data for commit in parent.history() for blob in commit.files.values() if blob.lfs}
        data = call.store.objects.get(value["oid"], known.get(value["oid"]))
        if data is None:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {value['oid']}")
        files[path] = Blob(data, lfs=True)
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    elif key == "deletedFolder":
        inside = [name for name in files if name.startswith(path.rstrip("/") + "/")]
        if not inside:
            raise HubError(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
        for name in inside:
            del files[name]
    else:
        raise HubError(400, f"the test Hub does not know the operation {key}")


def check_readme(before: dict[str, Blob], after: dict[str, Blob]):
    """Refuse a new README with a front matter that cannot be read."""
    readme = after.get("README.md")
    errors = (
        check_card(readme.data.decode(errors="replace"))[1] if readme and readme != before.get("README.md") else []
    )
    if errors:
        raise HubError(400, "Invalid metadata in README.md.\n" + "\n".join(f"- {error}" for error in errors))


@route("POST", API + rf"/commit/{REVISION}", "contribute")
def commit(call: Call) -> Answer:
    """A commit to a branch or a pull request, or with `create_pr` a new pull request for a branch."""
    check_push(call)
    operations = [json.loads(line) for line in call.body.splitlines() if line.strip()]
    header = next(entry["value"] for entry in operations if entry["key"] == "header")
    revision, opens = call.args["revision"], call.flag("create_pr")
    parent, wanted = call.repo.at(revision), header.get("parentCommit")
    if wanted and opens:
        parent = call.repo.at(wanted)
    elif wanted and not parent.oid.startswith(wanted):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(parent.files)
    for entry in operations:
        if entry["key"] != "header":
            apply(call, parent, entry["key"], entry["value"], files)
    check_readme(parent.files, files)
    made = call.repo.record(files, parent, header["summary"], call.user, header.get("description", ""))
    answer = {"success": True, "commitOid": made.oid, "hookOutput": ""}
    if opens:
        pull = call.repo.open_pull(revision, parent, made)
        answer["pullRequestUrl"] = f"{call.page()}/discussions/{pull.number}"
    else:
        call.repo.move(revision, made)
    return as_json({**answer, "commitUrl": f"{call.page()}/commit/{made.oid}"})


@route("GET", API + r"/auth-check", "read")
def auth_check(call: Call) -> Answer:
    """Whether the files may be read."""
    check_gate(call)
    return as_json({})


def check_gate(call: Call):
    """Refuse the files of a gated repository to who has not been let in."""
    if call.repo.gated and not call.store.may_read(call.user, call.repo):
        message = f"Access to {call.repo.type} {call.repo.id} is restricted"
        rest = ". You must have access to it and be authenticated." if call.user is None else ", ask for access."
        raise HubError(401 if call.user is None else 403, message + rest, "GatedRepo")


@route("GET", rf"/(?:(?P<type>dataset|space)s/)?{REPO_ID}/(?P<how>resolve|raw)/{REVISION}/(?P<path>.+)", "read")
def download(call: Call) -> Answer:
    """A file, or the part of it that Range asks for; `raw` gives the pointer of an LFS file."""
    check_gate(call)
    commit = call.repo.at(call.args["revision"])
    blob = commit.files.get(call.args["path"])
    headers = {"X-Repo-Commit": commit.oid}
    if blob is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if blob.lfs and call.args["how"] == "raw":
        return Answer(200, blob.pointer, headers)
    if blob.lfs:
        headers |= {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
    asked = call.headers.get("Range") if call.method == "GET" else None
    return part_of(blob.data, asked, headers) if asked else Answer(200, blob.data, headers)


def part_of(data: bytes, asked: str, headers: dict[str, str]) -> Answer:
    """The bytes that a Range header asks for: `bytes=a-b`, `bytes=a-` or `bytes=-n`."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked.strip())
    if not match or match.groups() == ("", ""):
        return Answer(200, data, headers)
    if match[1]:
        start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
    else:
        start, end = max(len(data) - int(match[2]), 0), len(data) - 1
    if start > end:
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
    return Answer(206, data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})
