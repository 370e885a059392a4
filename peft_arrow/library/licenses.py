"""Licences as cards state them: one spelling, an order, and which is the strictest. A report, no legal advice."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable


UNKNOWN = "unknown"
OTHER = "other"

# The Hub's identifiers (https://huggingface.co/docs/hub/repositories-licenses), the classes from the fewest conditions
# to the most. Where a class begins with True its identifiers are ordered in the same way, so that two of them compare.
CLASSES: dict[str, tuple[bool, tuple[str, ...]]] = {
    "permissive": (
        True,
        (
            *("cc0-1.0", "pddl", "unlicense", "wtfpl", "zlib", "bsl-1.0", "isc", "mit", "postgresql", "ncsa"),
            *("bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "openmdw-1.0", "openmdw-1.1", "afl-3.0"),
            *("ecl-2.0", "apache-2.0"),
        ),
    ),
    "attribution": (
        True,
        (
            *("cdla-permissive-2.0", "cdla-permissive-1.0", "etalab-2.0", "odc-by"),
            *("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0"),
        ),
    ),
    "copyleft": (
        False,
        (
            *("artistic-2.0", "ms-pl", "mpl-2.0", "epl-1.0", "epl-2.0", "lppl-1.3c", "ofl-1.1", "cdla-sharing-1.0"),
            *("odbl", "gfdl", "eupl-1.1", "eupl-1.2", "osl-3.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
            *("lgpl", "lgpl-lr", "lgpl-2.1", "lgpl-3.0", "gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0"),
        ),
    ),
    "use restrictions": (
        False,
        (
            *("openrail", "openrail++", "bigscience-openrail-m", "creativeml-openrail-m", "bigcode-openrail-m"),
            *("bigscience-bloom-rail-1.0", "c-uda", "apple-ascl", "gemma", "grok2-community"),
            *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4"),
        ),
    ),
    "non-commercial": (
        False,
        (
            *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
            *("apple-amlr", "deepfloyd-if-license", "fair-noncommercial-research-license", "h-research"),
            "intel-research",
        ),
    ),
    "no derivatives": (False, ("cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0")),
    "not told": (False, ("cc", OTHER)),
}
_CLASS = {name: position for position, (_, names) in enumerate(CLASSES.values()) for name in names}
_ALIASES = {
    **dict.fromkeys(("apache", "apache-2", "apache2", "apache2.0", "apache-v2", "apache-v2.0"), "apache-2.0"),
    **dict.fromkeys(("apache-license-2.0", "apache-license-version-2.0"), "apache-2.0"),
    **dict.fromkeys(("mit-license", "the-mit-license"), "mit"),
    **{"cc0": "cc0-1.0", "gpl-3": "gpl-3.0", "gplv3": "gpl-3.0", "gpl-v3": "gpl-3.0"},
    **{"bsd-2": "bsd-2-clause", "bsd-3": "bsd-3-clause"},
}
# What stands where a licence should: TRL writes the word "license", the Hub's card template asks for more information.
_MISSING = {
    *("", "license", "licence", "license-name", "none", "null", "nan", "n/a", "na", "unknown", "unspecified", "tbd"),
    *("todo", "pending", "undefined", "not-specified", "not-stated", "not-available", "no-license", "unlicensed"),
    *("more-information-needed", "needs-more-information", "your-license", "your-license-here"),
}


def license_key(text: str | None) -> str | None:
    """A stated licence in one spelling: lower case, hyphens, the Hub's identifier where it is another name of one.

    None where nothing is stated, or a word that only fills the place.
    """
    key = re.sub(r"[^\w.+/]+|_+", "-", (text or "").lower()).strip("-./")
    key = re.sub(r"-(only|or-later)$", "", key)
    key = re.sub(r"^llama-(\d)", r"llama\1", key)
    return None if key in _MISSING else _ALIASES.get(key, key)


def normalise_license(text: str | None) -> str | None:
    """The Hub's identifier of a stated licence; `"other"` for one not in the Hub's list, None for a missing one."""
    key = license_key(text)
    return key if key is None or key in _CLASS else OTHER


def strictest(licenses: Iterable[str | None]) -> str:
    """The one licence that stands for several: that of the class with the most conditions.

    `"unknown"` where one is missing or there are none. `"other"` where the strictest two are of a class without an
    order (two copyleft licences, say), and where one forbids derivatives and another forbids commercial use.
    """
    found = list(dict.fromkeys(normalise_license(text) for text in licenses))
    if not found or None in found:
        return UNKNOWN
    top = max(_CLASS[name] for name in found)
    compares, order = list(CLASSES.values())[top]
    highest = sorted((name for name in found if _CLASS[name] == top), key=order.index)
    if not compares and len(highest) > 1:
        return OTHER
    hides_non_commercial = any(is_non_commercial(name) for name in found) and not is_non_commercial(highest[-1])
    return OTHER if hides_non_commercial else highest[-1]


def is_non_commercial(name: str) -> bool:
    """Whether an identifier of the Hub's list is of a licence that forbids commercial use."""
    return name in CLASSES["non-commercial"][1] or name.startswith("cc-by-nc-")


def is_allowed(license: str | None, allowed: Collection[str]) -> bool:
    """Whether a stated licence is one of those allowed, however each is spelled.

    Licences that the Hub does not list are compared by their own names. A missing one is allowed only by `"unknown"`.
    """
    return license_key(license) in {license_key(name) for name in allowed}
