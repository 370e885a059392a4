"""The cards: as in `hub_cards/rendered/`, accepted by the Hub's own reader, and inert whatever strangers wrote.

`python -m tests.test_cards --write` writes the rendered cards anew, after a change of a template.
"""

from __future__ import annotations

import html
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from peft_arrow.cards import card_folder, card_template
from peft_arrow.library.card import MARK, library_card, routed_card
from peft_arrow.library.licenses import CLASSES, is_allowed, normalise_license, strictest
from peft_arrow.library.links import hub_id, hub_link
from peft_arrow.library.manifest import Manifest, Notes
from peft_arrow.library.markdown import code, fenced, inline, paragraphs, plain
from tests.card_examples import ATTACKS, BASE, HOSTILE, HOSTILE_ROUTED, LIBRARY, ROUTED, rendered


TEMPLATES = ["library.md", "routed_model.md"]
RENDERED = Path(__file__).parent.parent / "hub_cards" / "rendered"
LINKS = re.compile(r"(https://(huggingface\.co|pypi\.org)/|experts/expert_\d+\.v1$)")
TEXT = {"paragraph_open", "inline", "paragraph_close", "text", "code_inline", "text_special"}
FRAGMENTS = [
    *ATTACKS,
    *"|`[]()<>*_#!~$&\\@{}\"'^-+=:.1 \n\r\t\x00\u200d\u202e\u2028\ufe0f\ufeff\U0001f600",
    *("a", "www.", "http://", "javascript:", "&amp;", "```", "$$", "---", "](", "![", "\\|", "<!--", "é", "\ud800"),
]


def parsed(text: str) -> list:
    """The tokens of GitHub's Markdown, those inside lines after the lines."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = parser.parse(text)
    return [*tokens, *(inner for token in tokens for inner in token.children or [])]


def kinds(text: str) -> set[str]:
    return {token.type for token in parsed(text)}


def shown(text: str) -> str:
    """What a reader sees of one line of Markdown."""
    return "".join(token.content for token in parsed(text) if token.type in ("text", "code_inline", "text_special"))


def front_matter(text: str) -> dict:
    start, block, _ = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(block)


@pytest.fixture(scope="module")
def hostile_strings() -> list[str]:
    source = random.Random(42)
    return ["".join(source.choices(FRAGMENTS, k=source.randint(1, 12))) for _ in range(2000)]


@pytest.mark.parametrize("name", ["library.md", "library_hostile.md", "routed_model.md"])
def test_rendered_cards(name):
    text = rendered()[name]
    assert text == (RENDERED / name).read_text(encoding="utf-8"), "python -m tests.test_cards --write"
    again = ModelCard(text)
    assert again.data.library_name == "peft" and "peft-arrow" in again.data.tags
    assert str(again) == text, "the Hub's reader changes it"
    assert again.text.strip().startswith(MARK)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_ascii(name):
    assert card_template(name).read_bytes().isascii(), "huggingface_hub 0.34 reads templates in the locale's encoding"


def test_routed_model_card():
    text = routed_card(**ROUTED)
    assert front_matter(text)["base_model"] == BASE and front_matter(text)["license"] == "unknown"
    assert "import peft_arrow" in text and 'PeftModel.from_pretrained(base, "me/my-routed-model")' in text
    assert "| `plurals` | 4 | 60 | `apache-2.0` | [`me/plurals@main`](https://huggingface.co/me/plurals/tree/" in text
    assert "| `dates` | 4-16 | 30 | `cc-by-4.0` | (not stated) |" in text
    assert "| `mine` | 4 | 30 | (not stated) | `mine` |" in text
    assert "| `top_k` | `2` |" in text and "- PEFT 0.21.2" in text
    assert "{{" not in text and "None" not in text and "/home/alice" not in text


def test_library_card():
    text = library_card(LIBRARY, repo_id="me/my_library")
    data = front_matter(text)
    assert data["base_model"] == BASE and data["base_model_relation"] == "adapter"
    assert data["license"] == "cc-by-nc-4.0" and data["datasets"] == ["me/plural-pairs", "squad"]
    assert data["tags"] == ["adapter-library", f"base_model:adapter:{BASE}", "lora", "peft-arrow", "transformers"]
    assert [len(result["metrics"]) for result in data["model-index"][0]["results"]] == [2, 1]
    assert f'ArrowLoraModel.from_pretrained("{BASE}", "me/my_library", base_model_kwargs=' in text
    assert f'AutoModelForCausalLM.from_pretrained("{BASE}", revision="v1.0")' in text
    assert 'PeftModel.from_pretrained(base, "me/my_library", subfolder="experts/plurals")' in text
    assert "Framework versions" not in text and "None" not in text


def test_library_card_without_a_repository_or_notes():
    text = library_card(Manifest("C:\\Users\\alice\\secret\\my_base", LIBRARY.experts[:1]))
    assert set(front_matter(text)) == {"datasets", "library_name", "license", "tags"}
    assert 'subfolder="experts/plurals"' in text and '("path/to/the/base/model", "path/to/this/folder")' in text
    assert "1 LoRA expert for `my_base`" in text and "alice" not in text
    for part in ("Evaluation", "Pictures", "How it was made", "Framework versions"):
        assert f"# {part}" in library_card(LIBRARY, versions=ROUTED["versions"]) and f"# {part}" not in text


def test_read_and_written_manifest_has_the_same_card():
    again = Manifest.from_json(LIBRARY.to_json(), "here")
    assert library_card(again, repo_id="me/my_library") == library_card(LIBRARY, repo_id="me/my_library")


@pytest.mark.parametrize("repo_id", ["just-a-name", "/home/me/x", 'me/x")\nimport os', "a/b/c", ""])
def test_repo_id_must_be_one(repo_id):
    with pytest.raises(ValueError, match="repo_id"):
        library_card(LIBRARY, repo_id=repo_id)


def test_names_go_into_code_only_checked():
    with pytest.raises(ValueError, match="expert name"):
        library_card(replace(LIBRARY, experts=(replace(LIBRARY.experts[0], name='x")\nimport os'),)))
    with pytest.raises(ValueError, match="auto_class"):
        routed_card(**{**ROUTED, "auto_class": "X; import os"})


def test_routed_model_card_of_an_unnamed_base():
    tags = ["unsloth", "license:mit", "base_model:adapter:x/y", "a\nb", "", "arrow"]
    text = routed_card(**{**ROUTED, "base_model": None, "repo_id": None, "tags": tags})
    assert front_matter(text)["tags"] == ["arrow", "lora", "peft-arrow", "transformers", "unsloth"]
    assert "base_model" not in front_matter(text) and "for a base model that is not stated," in text


def test_unknown_template_is_named():
    with pytest.raises(FileNotFoundError, match=r"'nothing.md'.*library.md.*routed_model.md"):
        card_template("nothing.md")
    assert card_folder().is_dir()


def test_hostile_metadata():
    text = library_card(HOSTILE, versions={text: text for text in ATTACKS})
    data = front_matter(text)
    assert list(data) == ["library_name", "license", "license_name", "tags", "model-index"]
    assert data["license"] == "other" and data["license_name"] == "several"
    assert data["tags"] == ["adapter-library", "lora", "peft-arrow", "transformers"]
    (index,) = data["model-index"]
    assert len(index["results"]) == len(ATTACKS) and set(index) == {"name", "results"}
    assert front_matter(routed_card(**HOSTILE_ROUTED))["license"] == "other"


@pytest.mark.parametrize(
    ("text", "headings", "tables", "pictures"),
    [
        (library_card(HOSTILE), 10, [(8, 11), (2, 11), (5, 11), (2, 12)], len(ATTACKS)),
        (routed_card(**HOSTILE_ROUTED), 7, [(5, 11), (2, 11), (2, 11)], 0),
    ],
)
def test_hostile_cards_are_inert(text, headings, tables, pictures):
    body = text.split("---\n", 2)[2]
    tokens = parsed(body)
    count = lambda kind: sum(token.type == kind for token in tokens)  # noqa: E731
    assert not kinds(body) & {"html_inline", "em_open", "strong_open", "s_open", "code_block"}
    assert [token.content.strip() for token in tokens if token.type == "html_block"] == [MARK]
    assert count("heading_open") == headings and count("hr") == 0 and count("ordered_list_open") == 0
    targets = [token.attrs["href"] for token in tokens if token.type == "link_open"]
    assert targets and all(LINKS.match(target) for target in targets)
    assert [token.attrs["src"] for token in tokens if token.type == "image"] == ["pictures/a.png"] * pictures
    cells = [token.type for token in tokens if token.type in ("table_open", "th_open", "tr_open", "td_open")]
    found = [part.split() for part in " ".join(cells).split("table_open")[1:]]
    assert [(part.count("th_open"), part.count("tr_open") - 1) for part in found] == tables
    assert all(part.count("td_open") == width * rows for part, (width, rows) in zip(found, tables))
    assert "/home/alice/secret/base" not in text and "49" not in text and "{{ 7" in text
    assert not set("\x00\x07\u202e\u202c\u200b\u2028") & set(text)


def test_strings_of_strangers_are_inert(hostile_strings):
    for text in hostile_strings:
        expected = plain(text)
        for written in (inline(text), code(text)):
            table = f"| a | b |\n| --- | --- |\n| {written} | x |\n"
            assert kinds(written) <= TEXT, repr(text)
            assert [token.type for token in parsed(table)].count("td_open") == 2, repr(text)
            assert shown(written).replace(" ", "") == expected.replace(" ", ""), repr(text)
            assert len(shown(written)) <= 120 and "\n" not in written
        linked = [part.content for part in parsed(inline(text)) if part.type == "text"]
        assert not re.search(r"://|www\.|@", "".join(linked), re.IGNORECASE), repr(text)


def test_blocks_of_strangers_are_inert(hostile_strings):
    for text in hostile_strings:
        written = paragraphs(text) + "\n\n" + fenced(text, "bash")
        assert kinds(written) <= TEXT | {"hardbreak", "fence"}, repr(text)
        assert sum(token.type == "fence" for token in parsed(written)) == 1, repr(text)


def test_inline_by_example():
    assert inline("two\nlines\x00 \u202eof\u200b text") == "two lines of text"
    assert inline("my_data v1.5, 50% & more") == "my\\_data v1.5, 50% &amp; more"
    assert inline("see https://x.example/a_b now") == "see `https://x.example/a_b` now"
    assert len(plain("x" * 300)) == 120 and plain("x" * 300).endswith("x\u2026")
    emoji = "\U0001f600 \U0001f469\U0001f3fd\u200d\U0001f4bb \u2764\ufe0f\u200d\U0001f525"
    assert inline(emoji) == emoji and html.unescape(code("a|b")) == "`a`|`b`"


def test_hub_links():
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert hub_link("me/x") == "[`me/x`](https://huggingface.co/me/x)"
    assert hub_link("me/x/sub@v1", commit) == f"[`me/x/sub@0123456`](https://huggingface.co/me/x/tree/{commit}/sub)"
    assert hub_link("me/x/sub@a b") == "[`me/x/sub`](https://huggingface.co/me/x/tree/main/sub)"
    for text in ("x", "./x", "../x", "~/x", "/a/b", "a/..", "me/x/../y", "a--b/c", "me/x.git", "a/b\n", "a/?"):
        assert hub_id(text) is None and "](" not in hub_link(text), text
    assert hub_link("squad", kind="datasets/") == "[`squad`](https://huggingface.co/datasets/squad)"


def test_licenses_are_read_in_many_spellings():
    for text in ("MIT", " mit ", "The MIT License", "mit-license"):
        assert normalise_license(text) == "mit"
    for text in (None, "", "license", "None", "Unknown", "TBD", "N/A", "[More Information Needed]", "---", "\n"):
        assert normalise_license(text) is None
    assert normalise_license("Apache License, Version 2.0") == "apache-2.0"
    assert normalise_license("GPL-3.0-or-later") == "gpl-3.0" and normalise_license("Llama 3.1") == "llama3.1"
    assert normalise_license("my own terms") == normalise_license("other") == "other"
    assert normalise_license("mit\nlicense: apache-2.0") == "other"
    for name in (name for _, names in CLASSES.values() for name in names):
        assert normalise_license(name) == name


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        ([], "unknown"),
        (["mit", None, "cc-by-nc-4.0"], "unknown"),
        (["apache-2.0", "MIT"], "apache-2.0"),
        (["cc-by-4.0", "apache-2.0"], "cc-by-4.0"),
        (["gpl-3.0", "mit"], "gpl-3.0"),
        (["gpl-3.0", "cc-by-sa-4.0"], "other"),
        (["llama3", "gpl-3.0"], "llama3"),
        (["llama3", "gemma"], "other"),
        (["cc-by-nc-4.0", "llama3", "mit"], "cc-by-nc-4.0"),
        (["cc-by-nc-4.0", "cc-by-nd-4.0"], "other"),
        (["cc-by-nc-4.0", "cc-by-nc-nd-4.0"], "cc-by-nc-nd-4.0"),
        (["mit", "my own terms"], "other"),
    ],
)
def test_strictest_license(licenses, expected):
    assert strictest(licenses) == strictest(reversed(licenses)) == expected


def test_allowed_licenses():
    assert is_allowed("Apache 2.0", ["mit", "apache-2.0"]) and is_allowed("my terms", ["My Terms"])
    assert not is_allowed("my terms", ["their terms", "other"])
    assert not is_allowed(None, ["mit"]) and not is_allowed("license", ["other"]) and is_allowed(None, ["unknown"])


def test_one_license_outside_the_list_is_named():
    expert = LIBRARY.experts[0]
    expert = replace(expert, origin=replace(expert.origin, license="My own: terms"))
    text = library_card(Manifest(BASE, (expert,), notes=Notes()), repo_id="me/x")
    data = front_matter(text)
    assert (data["license"], data["license_name"]) == ("other", "my-own-terms")
    assert data["license_link"] == "https://huggingface.co/me/x#licences" and "other: My own: terms" in text


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    for name, text in rendered().items():
        (RENDERED / name).write_text(text, encoding="utf-8")
