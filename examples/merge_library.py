"""A smaller library from adapters alone: pull them, cluster them by their weights, merge each cluster, save it.

    python examples/merge_library.py alice/lora-sql bob/lora-dates ./my-loras/a ./my-loras/b --clusters 2
    python examples/merge_library.py me/my-library --clusters auto --push me/my-smaller-library
    python examples/merge_library.py --smoke          # twelve small adapters of three families, made on the spot

No data and no base model are needed. Each expert of the result is the mean of its members' updates, cut to a rank; the
table says how much of the norm that lost. The folder holds plain PEFT adapters, which can be routed:
ArrowLoraModel.from_pretrained(base, "merged").
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from peft_arrow import Adapter, AdapterLibrary, MBCClusterer


def pico_library() -> AdapterLibrary:
    """Three families of four adapters of four modules, of ranks 2 to 8."""
    generator = torch.Generator().manual_seed(0)
    adapters = []
    for family in ("dates", "plurals", "sql"):
        wanted = [torch.randn(48, 4, generator=generator) @ torch.randn(4, 32, generator=generator) for _ in range(4)]
        for version, rank in enumerate((2, 4, 4, 8)):
            tensors = {}
            for layer, update in enumerate(wanted):
                lora_A = torch.randn(rank, 32, generator=generator)
                lora_B = (update + torch.randn(48, 32, generator=generator)) @ lora_A.T
                tensors[f"base_model.model.layers.{layer}.q_proj.lora_A.weight"] = lora_A
                tensors[f"base_model.model.layers.{layer}.q_proj.lora_B.weight"] = lora_B
            config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "base_model_name_or_path": "me/pico"}
            adapters.append(Adapter(f"{family}-{version}", {**config, "target_modules": ["q_proj"]}, tensors))
    return AdapterLibrary(adapters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapters", nargs="*", help="folders or Hub ids of adapters or libraries")
    parser.add_argument("--clusters", default="auto", help="how many, or auto")
    parser.add_argument("--base", help="the base model, where the adapters name none or different ones")
    parser.add_argument("--rank", type=int, help="of the merged experts (default: each one's largest member's)")
    parser.add_argument("--output", type=Path, default=Path("merged"), help="default: %(default)s")
    parser.add_argument("--push", metavar="REPO", help="upload the result too")
    parser.add_argument("--smoke", action="store_true", help="with small adapters made on the spot")
    args = parser.parse_args()
    if not args.adapters and not args.smoke:
        parser.error("name some adapters, or pass --smoke")

    library = pico_library() if args.smoke else AdapterLibrary.from_pretrained(args.adapters, args.base)
    clusterer = MBCClusterer(args.clusters if args.clusters == "auto" else int(args.clusters))
    clusterer.fit(library)
    merged = clusterer.merge_experts(args.rank)
    merged.save_pretrained(args.output)

    print(f"{len(library)} adapters became {len(merged)} experts in {args.output}")
    print("| expert | rank | lost norm | members |\n|---|---|---|---|")
    for name, members in clusterer.clusters_.items():
        lost = f"{100 * clusterer.lost_norm_[name]:.1f} %"
        print(f"| {name} | {merged[name].config['r']} | {lost} | {', '.join(members)} |")
    if args.push:
        print(clusterer.push_to_hub(args.push).commit_url)


if __name__ == "__main__":
    main()
