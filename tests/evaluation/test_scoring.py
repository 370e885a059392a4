"""Log-likelihoods against one row at a time; where a continuation begins; nothing depends on the batches."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_arrow import ArrowLoraModel
from peft_arrow.evaluation.batches import batches_by_length
from peft_arrow.evaluation.encoding import TooLong, encode, encode_prompt
from peft_arrow.evaluation.generating import cut_at, generate_answers
from peft_arrow.evaluation.measures import choice_values
from peft_arrow.evaluation.rows import Row
from peft_arrow.evaluation.scoring import OptionScore, score_options


ITEMS = [
    {"prompt": "one:", "options": ["uno", "dos", "t"]},
    {"prompt": "twenty-two is \n", "options": [" veintidos", "x"]},
    {"prompt": "", "options": ["nothing before", "it"]},
]


@torch.no_grad()
def nats_of(model, ids):
    """-log p of each token after the first, one row, without any of the code that is tested."""
    logits = model(torch.tensor([ids])).logits[0].double()
    return [-torch.log_softmax(logits[place - 1], -1)[ids[place]].item() for place in range(1, len(ids))]


def test_scores_are_those_of_each_row_alone(base, tokenizer):
    scores = score_options(base, tokenizer, ITEMS)
    for item, options in zip(ITEMS, scores, strict=True):
        for option, score in zip(item["options"], options, strict=True):
            characters = [tokenizer.convert_tokens_to_ids(c) for c in item["prompt"] + option]
            start = [] if item["prompt"] else [tokenizer.bos_token_id]
            nats = nats_of(base, [*start, *characters, tokenizer.eos_token_id])
            moved = len(item["prompt"]) - len(item["prompt"].rstrip())
            assert score.tokens == len(option) + moved and score.answer_tokens == len(option)
            assert score.loglik == pytest.approx(-sum(nats[-len(option) - moved - 1 : -1]), abs=1e-4)
            assert score.answer_loglik == pytest.approx(-sum(nats[-len(option) - 1 : -1]), abs=1e-4)
            assert score.end_loglik == pytest.approx(-nats[-1], abs=1e-4)
            assert score.mean_nll == pytest.approx(sum(nats[-len(option) - 1 :]) / (len(option) + 1), abs=1e-4)


def flat(scores):
    return [[option.loglik, option.answer_loglik, option.end_loglik] for options in scores for option in options]


def test_batches_change_nothing(base, tokenizer, adapter_folders):
    for model in (base, ArrowLoraModel.from_pretrained(base, adapter_folders, top_k=2)):
        alone = flat(score_options(model, tokenizer, ITEMS, batch_size=1))
        for options in ({}, {"batch_size": 2}, {"token_budget": 30}):
            assert torch.allclose(
                torch.tensor(flat(score_options(model, tokenizer, ITEMS, **options))), torch.tensor(alone), atol=1e-4
            )


def test_is_greedy(base, tokenizer):
    ids = tokenizer("abc", return_tensors="pt").input_ids
    best = tokenizer.decode([base(ids).logits[0, -1].argmax().item()])
    other = "x" if best != "x" else "y"
    scores = score_options(base, tokenizer, [{"prompt": "abc", "options": [best, other]}])[0]
    assert [score.is_greedy for score in scores] == [True, False]


def test_around_is_open_for_each_batch(base, tokenizer, adapter_folders):
    model = ArrowLoraModel.from_pretrained(base, adapter_folders)
    with model.disable_adapter():
        expected = flat(score_options(model, tokenizer, ITEMS))
    sizes = []

    def around(rows):
        sizes.append(rows)
        return model.pin_experts([None] * rows)

    found = flat(score_options(model, tokenizer, ITEMS, around=around, batch_size=3))
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-4) and sorted(sizes) == [1, 3, 3]


@torch.no_grad()
def test_options_have_no_say_where_the_prompt_decides(base, tokenizer, adapter_folders):
    """With one choice a request, the first token after the prompt is what the prompt alone makes it."""
    model = ArrowLoraModel.from_pretrained(base, adapter_folders, top_k=1, granularity="sequence")
    prompt = "one of many:"
    logits = model(tokenizer(prompt, return_tensors="pt").input_ids).logits[0, -1]
    expected = torch.log_softmax(logits, -1)[tokenizer.convert_tokens_to_ids("u")].item()
    for others in ([], ["zzzzzzzzzzzzzzzz", "Q"]):
        score = score_options(model, tokenizer, [{"prompt": prompt, "options": ["u", *others]}])[0][0]
        assert score.answer_loglik == pytest.approx(expected, abs=1e-4)


def bpe_tokenizer():
    """Merges ' a' and '\\na' into one token."""
    characters = ["<eos>", "x", ":", " ", "\n", "a", "b"]
    vocabulary = {token: place for place, token in enumerate([*characters, " a", "\na"])}
    inner = Tokenizer(models.BPE(vocabulary, [(" ", "a"), ("\n", "a")]))
    inner.pre_tokenizer = pre_tokenizers.Sequence([])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def test_where_a_continuation_begins():
    tokenizer = bpe_tokenizer()
    plain = encode(tokenizer, "x:", " a")
    assert (plain.ids, plain.context, plain.prompt) == ([1, 2, 7, 0], 2, 2)
    merged = encode(tokenizer, "x: ", "a")  # the space is in the first token of the answer
    assert (merged.ids, merged.context, merged.prompt) == ([1, 2, 7, 0], 2, 2)
    moved = encode(tokenizer, "x:\n", "b")
    assert (moved.ids, moved.context, moved.prompt) == ([1, 2, 4, 6, 0], 2, 3)
    empty = encode(tokenizer, "", "ab")
    assert (empty.ids, empty.context, empty.prompt) == ([0, 5, 6, 0], 1, 1)


def test_a_start_token_is_there_once(tokenizer):
    ids = encode(tokenizer, "<bos>a", "b", is_templated=True).ids
    assert ids.count(tokenizer.bos_token_id) == 1


def test_what_does_not_fit(base, tokenizer):
    item = {"prompt": "p" * 300, "options": ["yes", "no"]}
    with pytest.raises(TooLong, match="item 0 has 304 tokens with its answer, and the model's context has 256; trunc"):
        score_options(base, tokenizer, [item])
    cut = score_options(base, tokenizer, [item], truncate=True)[0]
    short = score_options(base, tokenizer, [{"prompt": "p" * 252, "options": ["yes"]}])[0]
    assert cut[0].cut == 48 and cut[0].mean_nll == pytest.approx(short[0].mean_nll, abs=1e-4)
    with pytest.raises(TooLong, match="has an answer of 301 tokens"):
        score_options(base, tokenizer, [{"prompt": "p", "options": ["y" * 300]}], truncate=True)
    assert encode_prompt(tokenizer, "abcd", room=3, truncate=True) == (tokenizer("bcd").input_ids, 1)
    with pytest.raises(TooLong, match="has 4 tokens, and the model's context has room for 3 before the answer"):
        encode_prompt(tokenizer, "abcd", room=3)
    with pytest.raises(TooLong):
        encode_prompt(tokenizer, "abcd", room=0, truncate=True)


def test_no_end_token(base, tokenizer):
    tokenizer = bpe_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end-of-sequence token"):
        encode(tokenizer, "x", "a")


def test_batches_by_length():
    lengths = [3, 9, 4, 9, 1]
    batches = list(batches_by_length(lengths, token_budget=18))
    assert batches == [[1, 3], [2, 0, 4]]
    assert list(batches_by_length([50], token_budget=18)) == [[0]]
    assert [len(batch) for batch in batches_by_length(lengths, batch_size=2)] == [2, 2, 1]
    assert list(batches_by_length([])) == []


def option(loglik, tokens, end):
    return OptionScore(loglik, tokens, False, loglik, tokens, end)


def test_the_three_ways_to_choose():
    row = Row("p", ("a",), ("a", "bbbb", "cccccccccc"), 0)
    scores = [option(-2.0, 1, -8.0), option(-4.0, 4, -2.0), option(-6.0, 2, -0.1)]
    values = choice_values(row, scores)  # mean: 5, 1.2, 2.03; sum: -2, -4, -6; per character: -2, -1, -0.6
    assert values == {"loss": 5.0, "acc_paper": 0.0, "acc": 1.0, "acc_norm": 0.0}
    assert choice_values(Row("p", ("b",), row.options, 1), scores)["acc_paper"] == 1.0
    assert choice_values(Row("p", ("c",), row.options, 2), scores)["acc_norm"] == 1.0
    equal = [option(-2.0, 1, -1.0)] * 3
    assert choice_values(Row("p", ("a",), ("x", "y", "z"), 0), equal)["acc"] == 1.0  # the first, as lm-eval does


def test_answers_are_those_of_each_prompt_alone(base, tokenizer):
    prompts = [tokenizer(text).input_ids for text in ("a", "a longer prompt", "of three")]
    together = generate_answers(base, tokenizer, prompts, max_new_tokens=5)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = list(prompt)
        for _ in range(5):
            with torch.no_grad():
                best = base(torch.tensor([ids])).logits[0, -1].argmax().item()
            if best == tokenizer.eos_token_id:
                break
            ids.append(best)
        assert answer == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    assert generate_answers(base, tokenizer, prompts, max_new_tokens=5, batch_size=1) == together


def test_until():
    assert cut_at("yes\nno.", ["\n", "."]) == "yes" and cut_at("yes", ["\n"]) == "yes" and cut_at("\n", ["\n"]) == ""
