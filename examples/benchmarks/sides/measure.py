"""Each kind of work on all sides: the check, the times with their table, and the memory."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .bases import linear_modules
from .experts import Experts
from .limit import COLUMNS, add_limits, describe, limit_of
from .live_bytes import peak_bytes
from .modes import MODES
from .options import is_issue_setting, request_of
from .report import markdown, time_rows
from .rounds import Times
from .setting import Setting
from .side import BASE, XLORA, Side, all_sides, our_model, too_much
from .targets import GPU_TARGETS, TARGETS, verdicts
from .touched import told, touched_experts
from .training import check_gradients, training_sides
from .verify import Agreement, check_logits, check_sides, runnable
from .works import model_loss, prefill, time_decode, time_prefill, time_training


@dataclass(frozen=True)
class Field:
    """The sides that are there for one set of experts, after their check.

    Args:
        setting (`Setting`): of the run.
        experts (`Experts`): of all sides.
        sides (`list[Side]`): what is timed.
        absent (`dict[str, str]`): the other sides, with the reason.
        agreements (`dict[str, Agreement]`): of the check.
    """

    setting: Setting
    experts: Experts
    sides: list[Side] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    agreements: dict[str, Agreement] = field(default_factory=dict)

    def report(self, work: str, title: str, tokens: int, mode: str, times: Times, touched: Mapping) -> list[dict]:
        """Print the table of one work, its targets and its limit; return the rows.

        Args:
            work (`str`): as in `TARGETS`.
            title (`str`): for people.
            tokens (`int`): of one forward.
            mode (`str`): a key of `MODES`.
            times (`Times`): of the sides.
            touched (`Mapping[str, int]`): module -> distinct experts chosen in one forward.
        """
        args, count, trains = self.setting.args, self.experts.count, work == "train"
        times.absent.update(self.absent)
        facts = {
            "work": work,
            "tokens": tokens,
            "experts": count,
            "routing": self.experts.kind,
            "mode": mode,
            "touched": statistics.mean(touched.values()),
        }
        rows = time_rows(times, facts, self.agreements)
        linears, peaks = linear_modules(self.setting.base), self.setting.peaks
        limit = limit_of(linears, touched, tokens, count, self.experts.rank, args.top_k, peaks, trains)
        add_limits(rows, limit)
        print(f"\n### {title}, {count} {self.experts.kind} experts{'' if mode == 'as is' else f', {mode}'}\n")
        print(f"{told(touched, count)}\n")
        print(markdown(rows, "ms a token" if work == "decode" else "ms", {} if trains else COLUMNS))
        if is_issue_setting(args, work, tokens):
            print("\n".join(verdicts(work, count, times.ratio, TARGETS)))
        elif args.device.type == "cuda":
            print("\n".join(verdicts(work, count, times.ratio, GPU_TARGETS)))
        print(describe(limit, peaks), flush=True)
        return rows


def inference_field(setting: Setting, experts: Experts, tokens: list[int], folder: Path) -> Field:
    """Make the sides and check them on forwards of each number of tokens."""
    sides, absent = all_sides(setting.base, experts, request_of(setting.args), tokens, folder)
    agreements: dict[str, Agreement] = {}
    for count in sorted(set(tokens)):
        ids = setting.ids(experts.kind, count)
        fitting = [side for side in sides if side.needs(count) <= request_of(setting.args).budget(setting.args.device)]
        found = check_sides(fitting, lambda model, ids=ids: prefill(model, ids))
        check_logits(fitting, lambda model, ids=ids: prefill(model, ids), found)
        for name, agreement in found.items():
            agreements[name] = agreement.joined(agreements.get(name))
    sides, missing = runnable(sides, agreements)
    kept = Field(setting, experts, sides, {**absent, **missing}, agreements)
    print(f"\nchecked on {', '.join(str(count) for count in sorted(set(tokens)))} tokens: {told_check(agreements)}")
    return kept


def told_check(agreements: Mapping[str, Agreement]) -> str:
    """One line a check."""
    compared, pairs = (max(getattr(a, name) for a in agreements.values()) for name in ("compared", "pairs"))
    least = min((a.compared for a in agreements.values() if a.compared), default=0)
    logits = [a.logits for a in agreements.values() if a.logits is not None]
    line = f"{least} to {compared} of {pairs} pairs of a token and a layer had a clear choice and were compared"
    return line + (f"; last logits differ by at most {max(logits):.0e} of the experts' effect" if logits else "")


def measure_prefill(place: Field, tokens: int) -> list[dict]:
    """A prefill, as it is and in the modes that the options ask for."""
    setting, args, rows = place.setting, place.setting.args, []
    ids = setting.ids(place.experts.kind, tokens)
    touched = touched_experts(our_model(place.sides), lambda model: prefill(model, ids))
    wanted = {"as is": True, "torch.compile": args.compile, "CUDA graph": args.cuda_graphs}
    for mode in (mode for mode, is_wanted in wanted.items() if is_wanted):
        if mode == "torch.compile":
            torch._dynamo.reset()
        budget = request_of(args).budget(args.device)
        times = time_prefill(place.sides, ids, args.repeats, args.slow, budget, MODES[mode])
        rows += place.report("prefill", f"Prefill of {tokens} tokens", tokens, mode, times, touched)
    return rows


def measure_decode(place: Field, prompt: int, tokens: int, block: int) -> list[dict]:
    """Decoding `tokens` after a prompt, a block of tokens a turn."""
    setting, args = place.setting, place.setting.args
    ids = setting.ids(place.experts.kind, prompt + tokens)
    touched = touched_experts(our_model(place.sides), lambda model: prefill(model, ids[:, :1]))
    times = time_decode(place.sides, ids, prompt, block, args.repeats, args.slow)
    title = f"Decode of {tokens} tokens after a prompt of {prompt}"
    return place.report("decode", title, 1, "as is", times, touched)


def measure_training(setting: Setting, experts: Experts, batch: int, tokens: int, folder: Path) -> list[dict]:
    """A training step of a plain LoRA, of ours and of PEFT's Arrow."""
    args = setting.args
    ids = setting.ids(experts.kind, tokens, batch)
    sides, absent = training_sides(setting.base, experts, request_of(args), ids.numel(), folder)
    if not sides:
        print(f"\n### Training step, {experts.count} experts: {'; '.join(absent.values())}")
        return [{"work": "train", "experts": experts.count, "side": name, "missing": absent[name]} for name in absent]
    agreements = check_gradients(sides, lambda model: model_loss(model, ids))
    sides, missing = runnable(sides, agreements)
    touched = touched_experts(our_model(sides), lambda model: prefill(model, ids))
    times = time_training(sides, ids, args.repeats, args.slow)
    place = Field(setting, experts, sides, {**absent, **missing}, agreements)
    return place.report("train", f"Training step on {batch} x {tokens} tokens", ids.numel(), "as is", times, touched)


def measure_memory(place: Field, tokens: int) -> list[dict]:
    """A row a side: the peak, and the peak less the base's, in bytes."""
    setting, args = place.setting, place.setting.args
    facts = {"work": "memory", "tokens": tokens, "experts": place.experts.count, "routing": place.experts.kind}
    ids, names = setting.ids(place.experts.kind, tokens), list(linear_modules(setting.base))
    rows = [{**facts, "side": name, "missing": reason} for name, reason in place.absent.items() if name != XLORA]
    base = peak_bytes(setting.base, linear_modules(setting.base).values(), ids)
    for side in place.sides:
        if side.name in (BASE, XLORA):
            continue
        missing = too_much(side.needs(tokens), request_of(args).budget(args.device))
        if missing:
            rows.append({**facts, "side": side.name, "missing": missing})
            continue
        side.prepare()
        peak = peak_bytes(side.model, [side.layer(name) for name in names], ids)
        rows.append({**facts, "side": side.name, "peak_bytes": peak, "extra_bytes": peak - base, "base_bytes": base})
    return rows
