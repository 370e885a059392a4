"""The requests that the test Hub answers: how they are told apart, and those about users and repositories."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from urllib.parse import quote, unquote, urlencode

from tests.hub_store import HubError, Repo, Store
from tests.hub_views import check_card, commit_entry, expanded, info_of, listed, object_id, refs_of


REPO_ID = r"(?P<id>[^/]+(?:/[^/]+)?)"
API = rf"/api/(?P<type>model|dataset|space)s/{REPO_ID}"
REVISION = r"(?P<revision>refs/(?:pr|heads|tags)/[^/]+|[^/]+)"


@dataclass
class Answer:
    """Status, body and the headers beyond Content-Length."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Call:
    """A request, who sends it, and what its path names."""

    store: Store
    endpoint: str
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
    body: bytes
    user: str | None = None
    writes: bool = False
    args: dict[str, str] = field(default_factory=dict)
    repo: Repo | None = None

    def json(self) -> dict:
        """The body."""
        return json.loads(self.body or b"{}")

    def first(self, name: str, default: str = "") -> str:
        """The first value of a query parameter."""
        return self.query.get(name, [default])[0]

    def flag(self, name: str) -> bool:
        """Whether a query parameter says yes."""
        return self.first(name).lower() in ("1", "true")

    def page(self) -> str:
        """The address of the repository's page."""
        return page_address(self.endpoint, self.repo.type, self.repo.id)


Route = Callable[[Call], Answer]
ROUTES: list[tuple[set[str], re.Pattern, str | None, Route]] = []


def route(methods: str, pattern: str, access: str | None = None) -> Callable[[Route], Route]:
    """Register a function for paths, matched as sent, that is quoted.

    `access` is what the user must be allowed to do with the repository: "read", "contribute" (any user) or "write".
    """

    def register(function: Route) -> Route:
        ROUTES.append((set(methods.split()), re.compile(pattern), access, function))
        return function

    return register


def as_json(value: object, status: int = 200, **headers: str) -> Answer:
    """An answer in JSON."""
    return Answer(status, json.dumps(value, default=str).encode(), {"Content-Type": "application/json", **headers})


def dispatch(call: Call) -> Answer:
    """Find who answers, check the rights, answer; an alias redirects to the new name."""
    token = call.headers.get("Authorization", "").removeprefix("Bearer ").strip()
    if token and token not in call.store.users:
        raise HubError(401, "Invalid credentials in Authorization header")
    call.user, call.writes = call.store.users.get(token), bool(token) and token not in call.store.read_only
    for methods, pattern, access, function in ROUTES:
        match = pattern.fullmatch(call.path)
        if not match or call.method.replace("HEAD", "GET") not in methods:
            continue
        call.args = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
        if access:
            key = call.args.get("type", "model"), call.args["id"]
            if new := call.store.aliases.get(key):
                place = call.path[: match.start("id")] + quote(new) + call.path[match.end("id") :]
                query = "?" + urlencode(call.query, doseq=True) if call.query else ""
                return as_json({"message": f"renamed to {new}"}, 307, Location=place + query)
            call.repo = call.store.find(*key, call.user)
            check_access(call, access)
        return function(call)
    raise HubError(404, f"the test Hub does not know {call.method} {call.path}")


def check_access(call: Call, access: str):
    """Refuse who may only read."""
    if access == "read":
        return
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    if not call.writes:
        raise HubError(403, "You must use a write token")
    if access == "write" and not call.store.owns(call.user, call.repo.namespace):
        raise HubError(403, f"You don't have write access to {call.repo.id}")


def paged(call: Call, items: list[dict]) -> Answer:
    """One page of a listing, with a link to the next; `limit` is the length of a page."""
    size = min(int(call.first("limit", "1000")), call.store.page_size)
    start = int(call.first("cursor", "0"))
    if start + size >= len(items):
        return as_json(items[start:])
    query = urlencode({**call.query, "cursor": [str(start + size)]}, doseq=True)
    return as_json(items[start : start + size], Link=f'<{call.endpoint}{call.path}?{query}>; rel="next"')


def is_private(body: dict) -> bool:
    """What a body says about who may see a repository: older clients send `private`, newer ones `visibility`."""
    return body.get("visibility") == "private" or bool(body.get("private"))


def page_address(endpoint: str, repo_type: str, repo_id: str) -> str:
    """The address of a repository's page."""
    return f"{endpoint}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"


@route("GET", r"/api/whoami-v2")
def whoami(call: Call) -> Answer:
    """Who the token belongs to."""
    if call.user is None:
        raise HubError(401, "Invalid user token.")
    orgs = [name for name, members in call.store.orgs.items() if call.user in members]
    access = {"displayName": "test", "role": "write" if call.writes else "read"}
    user = {"type": "user", "id": object_id(call.user), "name": call.user, "fullname": call.user}
    about_orgs = [{"type": "org", "id": object_id(name), "name": name, "fullname": name} for name in orgs]
    return as_json({**user, "orgs": about_orgs, "auth": {"type": "access_token", "accessToken": access}})


@route("POST", r"/api/validate-yaml")
def validate_yaml(call: Call) -> Answer:
    """What is wrong with the front matter of a card."""
    _, errors, warnings = check_card(call.json()["content"])
    messages = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
    return as_json(messages, 400 if errors else 200)


def named(call: Call) -> tuple[str, str]:
    """Type and id of the repository that a body of /api/repos names."""
    body = call.json()
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    return body.get("type") or "model", f"{body.get('organization') or call.user}/{body['name']}"


@route("POST", r"/api/repos/create")
def create_repo(call: Call) -> Answer:
    """A new repository in the user's namespace or in that of an organization."""
    repo_type, repo_id = named(call)
    url = page_address(call.endpoint, repo_type, repo_id)
    namespace = repo_id.split("/")[0]
    if not call.writes or not call.store.owns(call.user, namespace):
        raise HubError(403, f'You don\'t have the rights to create a {repo_type} under the namespace "{namespace}"')
    if (repo_type, repo_id) in call.store.repos:
        return as_json({"error": f"You already created this {repo_type} repo: {repo_id}", "url": url}, 409)
    repo = call.store.create(repo_type, repo_id, call.user)
    repo.private = is_private(call.json())
    return as_json({"url": url, "name": repo_id, "id": object_id(f"{repo_type}/{repo_id}")})


@route("DELETE", r"/api/repos/delete")
def delete_repo(call: Call) -> Answer:
    """Forget a repository."""
    key = named(call)
    call.repo = call.store.find(*key, call.user)
    check_access(call, "write")
    del call.store.repos[key]
    return as_json({})


@route("POST", r"/api/repos/move")
def move_repo(call: Call) -> Answer:
    """Give a repository another name."""
    body = call.json()
    call.repo = call.store.find(body["type"], body["fromRepo"], call.user)
    check_access(call, "write")
    if not call.store.owns(call.user, body["toRepo"].split("/")[0]):
        raise HubError(403, "You don't have the rights to move a repo to this namespace")
    if (body["type"], body["toRepo"]) in call.store.repos:
        raise HubError(409, f"{body['toRepo']} exists already")
    call.store.rename(body["type"], body["fromRepo"], body["toRepo"])
    return as_json({})


@route("GET", r"/api/(?P<type>model|dataset|space)s")
def list_repos(call: Call) -> Answer:
    """Search: every filter must be a tag; the best of `sort` first."""
    found = []
    for repo in call.store.repos.values():
        if repo.type == call.args["type"] and (not repo.private or call.store.may_read(call.user, repo)):
            info = info_of(repo, repo.at("main"))
            if is_wanted(call, info):
                found.append(info)
    if order := call.first("sort"):
        found.sort(key=lambda info: info.get(order) or 0, reverse=True)
    asked = call.flag("full"), call.flag("cardData"), call.query.get("expand", [])
    return paged(call, [listed(info, *asked) for info in found])


def is_wanted(call: Call, info: dict) -> bool:
    """Whether a repository is one that a search is about."""
    if "gated" in call.query and call.flag("gated") != bool(info["gated"]):
        return False
    return (
        all(tag in info["tags"] for tag in call.query.get("filter", []))
        and all(word.lower() in info["id"].lower() for word in call.query.get("search", []))
        and call.first("author", info["author"]) == info["author"]
        and call.first("pipeline_tag", info["pipeline_tag"]) == info["pipeline_tag"]
    )


@route("GET", API + r"/refs", "read")
def refs(call: Call) -> Answer:
    """Branches, tags, pull requests."""
    return as_json(refs_of(call.repo, call.flag("include_prs")))


@route("GET", API + rf"/commits/{REVISION}", "read")
def commits(call: Call) -> Answer:
    """The history of a revision."""
    return paged(call, [commit_entry(commit) for commit in call.repo.at(call.args["revision"]).history()])


@route("PUT", API + r"/settings", "write")
def settings(call: Call) -> Answer:
    """Who may see it and who may download."""
    body = call.json()
    if "visibility" in body or "private" in body:
        call.repo.private = is_private(body)
    call.repo.gated = body.get("gated", call.repo.gated)
    return as_json({})


@route("POST", API + r"/branch/(?P<name>.+)", "write")
def create_branch(call: Call) -> Answer:
    """A branch from another revision."""
    if call.args["name"] in call.repo.branches:
        raise HubError(409, f"Reference already exists: {call.args['name']}")
    call.repo.branches[call.args["name"]] = call.repo.at(call.json().get("startingPoint") or "main")
    return as_json({})


@route("POST", API + rf"/tag/{REVISION}", "write")
def create_tag(call: Call) -> Answer:
    """A tag on a revision."""
    name = call.json()["tag"]
    if name in call.repo.tags:
        raise HubError(409, f"Tag reference exists already: {name}")
    call.repo.tags[name] = call.repo.at(call.args["revision"])
    return as_json({})


@route("DELETE", API + r"/(?P<what>branch|tag)/(?P<name>.+)", "write")
def delete_ref(call: Call) -> Answer:
    """Forget a branch or a tag."""
    name, is_branch = call.args["name"], call.args["what"] == "branch"
    if is_branch and name == "main":
        raise HubError(400, "Cannot delete the main branch")
    if (call.repo.branches if is_branch else call.repo.tags).pop(name, None) is None:
        raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return as_json({})


@route("GET", API + rf"/revision/{REVISION}", "read")
@route("GET", API, "read")
def model_info(call: Call) -> Answer:
    """All about a repository at a revision."""
    info = info_of(call.repo, call.repo.at(call.args.get("revision", "main")), call.flag("blobs"))
    return as_json(expanded(info, call.query["expand"]) if "expand" in call.query else info)
