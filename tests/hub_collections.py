"""The requests of the test Hub about collections."""

from __future__ import annotations

import re

from tests.hub_routes import Answer, Call, as_json, paged, route
from tests.hub_store import HubError
from tests.hub_views import object_id


COLLECTION = r"/api/collections/(?P<slug>[^/]+/[^/]+)"
ITEM = COLLECTION + r"/items/(?P<item>[^/]+)"


def shown(collection: dict) -> dict:
    """A collection as it is answered, with its items numbered."""
    items = [{**item, "position": position} for position, item in enumerate(collection["items"])]
    return {**collection, "items": items, "position": 0}


def own(call: Call) -> dict:
    """The collection of the path, for its owner to change."""
    collection = seen(call)
    if not call.writes or not call.store.owns(call.user, collection["owner"]):
        raise HubError(401 if call.user is None else 403, "You don't have write access to this collection")
    return collection


def seen(call: Call) -> dict:
    """The collection of the path, if the user may see it."""
    collection = call.store.collections.get(call.args["slug"])
    if collection is None or (collection["private"] and not call.store.owns(call.user, collection["owner"])):
        raise HubError(404, "Collection not found")
    return collection


def note_of(text: str | None) -> dict:
    """The note of an item, nothing for none."""
    return {"note": {"html": text, "text": text}} if text else {}


@route("GET", r"/api/collections")
def list_collections(call: Call) -> Answer:
    """Collections, of `owner` and with `item` if asked for."""
    found = []
    for collection in call.store.collections.values():
        names = {f"{item['type']}s/{item['id']}" for item in collection["items"]}
        if collection["private"] and not call.store.owns(call.user, collection["owner"]):
            continue
        if set(call.query.get("owner", [collection["owner"]])) & {collection["owner"]}:
            if all(item in names for item in call.query.get("item", [])):
                # The client numbers them, and refuses a number of ours.
                found.append({key: value for key, value in shown(collection).items() if key != "position"})
    return paged(call, found)


@route("POST", r"/api/collections")
def create_collection(call: Call) -> Answer:
    """A new one, empty."""
    body = call.json()
    owner, title = body["namespace"], body["title"]
    if not call.writes or not call.store.owns(call.user, owner):
        raise HubError(401 if call.user is None else 403, f"You don't have write access to {owner}")
    slug = f"{owner}/{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}-{object_id(owner + title)}"
    if slug in call.store.collections:
        return as_json({"error": "This collection exists already", "slug": slug}, 409)
    fixed = {"theme": "green", "upvotes": 0, "lastUpdated": "2026-01-01T00:00:00.000Z", "items": []}
    told = {"description": body.get("description"), "private": bool(body.get("private"))}
    call.store.collections[slug] = {"slug": slug, "title": title, "owner": owner, **told, **fixed}
    return as_json(shown(call.store.collections[slug]))


@route("POST", COLLECTION + r"/items?")
def add_item(call: Call) -> Answer:
    """Add a repository."""
    collection, body = own(call), call.json()
    item = {"id": body["item"]["id"], "type": body["item"]["type"]}
    if any(item.items() <= other.items() for other in collection["items"]):
        raise HubError(409, "This item is in the collection already")
    identity = {"_id": object_id(collection["slug"] + item["type"] + item["id"])}
    collection["items"].append({**identity, **item, **note_of(body.get("note"))})
    return as_json(shown(collection))


@route("PATCH DELETE", ITEM)
def change_item(call: Call) -> Answer:
    """Change the note or the place of an item, or remove it."""
    items = own(call)["items"]
    item = next((item for item in items if item["_id"] == call.args["item"]), None)
    if item is None:
        raise HubError(404, "Item not found in the collection")
    place = items.index(item)
    items.remove(item)
    if call.method == "PATCH":
        items.insert(call.json().get("position", place), {**item, **note_of(call.json().get("note"))})
    return as_json({"success": True})


@route("GET", COLLECTION)
def get_collection(call: Call) -> Answer:
    """One, with its items."""
    return as_json(shown(seen(call)))


@route("PATCH", COLLECTION)
def update_collection(call: Call) -> Answer:
    """Change the title and the like."""
    collection, body = own(call), call.json()
    collection |= {key: body[key] for key in ("title", "description", "private", "theme") if key in body}
    return as_json({"success": True, "data": shown(collection)})


@route("DELETE", COLLECTION)
def delete_collection(call: Call) -> Answer:
    """Forget one."""
    del call.store.collections[own(call)["slug"]]
    return as_json({"success": True})
