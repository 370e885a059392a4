"""The cards of `hub_cards/rendered/`: an ordinary library, one whose every text is an attack, and a routed model."""

from __future__ import annotations

from dataclasses import replace

from peft_arrow.library.card import library_card, routed_card
from peft_arrow.library.manifest import Evaluation, ExpertRecord, Manifest, Notes, Origin, Picture


BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
VERSIONS = {"peft-arrow": "0.2.0", "PEFT": "0.21.2", "transformers": "5.23.0"}
EXPERTS = (
    ExpertRecord(
        name="plurals",
        rank=4,
        alpha=8.0,
        target_modules=("down_proj", "q_proj", "v_proj"),
        size=1_234_567,
        sha256="a" * 64,
        origin=Origin("me/plurals", COMMIT, "apache-2.0", "English plurals", ("me/plural-pairs", "squad")),
    ),
    ExpertRecord(
        name="german_date.v2",
        rank=16,
        alpha=16.0,
        target_modules=("q_proj",),
        size=987,
        sha256="b" * 64,
        origin=Origin("me/dates/checkpoints/last_one", None, "CC BY-NC 4.0", "Dates in German", ("squad", "json")),
    ),
    ExpertRecord("local", 4, 4.5, ("q_proj",), 45_600, "c" * 64, Origin("local", license="mit")),
)
NOTES = Notes(
    description="Three small experts,\none of them for fun \U0001f600.\n\nThey were trained on 2 CPU cores.",
    made={
        "command": "peft-arrow train \\\n    --base HuggingFaceTB/SmolLM2-135M-Instruct \\\n    --seed 42",
        "versions": {"peft": "0.21.2", "trl": "1.16.0"},
        "seeds": [42, 43],
        "minutes": 7.5,
    },
    evaluation=(
        Evaluation("Plural pairs", "exact_match", 0.8125, "me/plural-pairs", "test", "arrow"),
        Evaluation("Plural pairs", "exact_match", 0.5, "me/plural-pairs", "test", "uniform"),
        Evaluation("own dates", "loss", 1.25),
    ),
    pictures=(Picture("routing.png", "Which expert each token went to"),),
)
LIBRARY = Manifest(BASE, EXPERTS, base_model_revision="v1.0", notes=NOTES)

ATTACKS = (
    "mit\nlicense: apache-2.0",
    "x\n---\nlicense: mit\n---\n# Taken over",
    "[click](javascript:alert(1)) ![img](https://evil.example/x.png) <https://evil.example>",
    "a | b\n| --- | --- |\n| c | d |",
    "<script>alert(1)</script> <img src=x onerror=alert(1)> <!-- &lt;b&gt; -->",
    "```\nout of the block\n``` `tick` ``two`` ~~~ **bold** _it_ ~~gone~~ $x$ \\(y\\) \\",
    "{{ 7*7 }} {% for i in range(9) %}{{ card_data }}{% endfor %} {# gone #}",
    "L" * 320,
    "\U0001f600 \U0001f469\u200d\U0001f4bb \u202egnp.exe\u202c zero\u200bwidth nul\x00 bell\x07 \u2028line \x85next",
    "https://evil.example www.evil.example me@evil.example @someone #1 :-: === - + 1. > [^1]: x",
    "/home/alice/secret/\n- name: x",
)


def attacked(number: int) -> str:
    """One of the attacks, by number."""
    return ATTACKS[number % len(ATTACKS)]


HOSTILE_NOTES = Notes(
    description="\n\n".join(ATTACKS),
    made={"command": "\n".join(ATTACKS), **{text: list(ATTACKS[:3]) for text in ATTACKS}, "seeds": {"a|b": "c`d"}},
    evaluation=tuple(Evaluation(text, text, 0.5, text, text, text) for text in ATTACKS),
    pictures=tuple(Picture("a.png", text) for text in ATTACKS),
)
HOSTILE = Manifest(
    "/home/alice/secret/base<b>|`x`\n---",
    tuple(
        replace(
            EXPERTS[0],
            name=f"expert_{number}.v1",
            target_modules=(attacked(number), "q_proj"),
            origin=Origin(*(attacked(number + step) for step in range(4)), datasets=(attacked(number), "json")),
        )
        for number in range(len(ATTACKS))
    ),
    base_model_revision=ATTACKS[2],
    notes=HOSTILE_NOTES,
)
ROUTED = {
    "base_model": BASE,
    "experts": [
        {"name": "plurals", "rank": "4", "modules": 60, "source": "me/plurals@main", "license": "apache-2.0"},
        {"name": "dates", "rank": "4-16", "modules": 30, "source": None, "license": "cc-by-4.0"},
        {"name": "mine", "rank": 4, "modules": 30, "source": "/home/alice/adapters/mine"},
    ],
    "routing": {"router": "arrow", "top_k": 2, "router_temperature": 1.0, "aggregation": "output"},
    "auto_class": "AutoModelForCausalLM",
    "repo_id": "me/my-routed-model",
    "versions": VERSIONS,
}
HOSTILE_ROUTED = {
    **ROUTED,
    "base_model": HOSTILE.base_model,
    "experts": [
        {"name": f"e{n}", "rank": text, "modules": text, "source": text, "license": text}
        for n, text in enumerate(ATTACKS)
    ],
    "routing": {text: text for text in ATTACKS},
    "repo_id": None,
    "versions": {text: text for text in ATTACKS},
    "description": "\n\n".join(ATTACKS),
}


def rendered() -> dict[str, str]:
    """The text of every file in `hub_cards/rendered/`, by name."""
    return {
        "library.md": library_card(LIBRARY, repo_id="me/my_library", versions=VERSIONS),
        "library_hostile.md": library_card(HOSTILE, versions={text: text for text in ATTACKS}),
        "routed_model.md": routed_card(**ROUTED),
    }
