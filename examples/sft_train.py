"""Train experts with TRL's SFTTrainer, save the routed model, load it back and compare.

The base is a Llama of two layers built here, so the script needs no download and runs on a CPU:

    python examples/sft_train.py            # about two minutes on two cores
    python examples/sft_train.py --smoke    # two steps each, as CI runs it

Part 1 trains fresh experts. Part 2 starts from two adapters saved by plain PEFT LoRA and trains one of them; the other
has to be bit-identical afterwards.
"""

from __future__ import annotations

import argparse
import string
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import SFTConfig, SFTTrainer

from peft_arrow import ArrowLoraConfig


NOUNS = ["cat", "dog", "tree", "lamp", "book", "cup", "road", "hill", "song", "door", "ship", "stone"]
TASKS = {
    "plurals": [{"prompt": f"plural of {noun}:", "completion": f" {noun}s"} for noun in NOUNS],
    "shout": [{"prompt": f"shout {noun}:", "completion": f" {noun.upper()}"} for noun in NOUNS],
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, nothing learned."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {token: position for position, token in enumerate(special + sorted(string.printable))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def make_base(vocabulary_size: int) -> LlamaForCausalLM:
    """The same random weights each time, as a checkpoint on disk would give."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def train(base, tokenizer, rows: list[dict], peft_config, folder: Path, steps: int):
    """Train `peft_config` on `rows`, save the adapter in `folder` and return the trained model."""
    args = SFTConfig(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        weight_decay=0.1,
        max_length=64,
        bf16=False,  # float32 throughout, so that reloaded logits can be compared exactly
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    trainer = SFTTrainer(
        model=base,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    result = trainer.train()
    trainer.save_model(str(folder))
    print(f"  {folder.name}: {result.global_step} steps, mean loss {result.training_loss:.3f}")
    return trainer.model.eval()


def logits_of(model, tokenizer) -> torch.Tensor:
    """Logits of one prompt of each task."""
    batch = tokenizer([rows[0]["prompt"] for rows in TASKS.values()], return_tensors="pt", padding=True)
    with torch.no_grad():
        return model(**batch).logits


def compare_reloaded(trained, tokenizer, folder: Path, tolerance: float = 0.0) -> None:
    """Load `folder` over a fresh base, under another adapter name, and compare the logits."""
    torch.manual_seed(1234)
    again = PeftModel.from_pretrained(make_base(len(tokenizer)), str(folder), adapter_name="again")
    difference = (logits_of(trained, tokenizer) - logits_of(again, tokenizer)).abs().max().item()
    print(f"  reloaded {folder.name}: largest difference of the logits {difference}")
    assert difference <= tolerance, "the reloaded model differs from the trained one"


def fresh_experts(tokenizer, root: Path, steps: int) -> None:
    """Part 1: four new experts, trained together on both tasks."""
    print("fresh experts")
    config = ArrowLoraConfig(
        num_experts=4, r=4, lora_alpha=8, top_k=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    rows = [row for task in TASKS.values() for row in task]
    model = train(make_base(len(tokenizer)), tokenizer, rows, config, root / "fresh", steps)
    compare_reloaded(model, tokenizer, root / "fresh")


def experts_from_adapters(tokenizer, root: Path, steps: int) -> None:
    """Part 2: one plain LoRA per task, of different ranks and targets; then one of the two is trained further."""
    print("adapters by plain PEFT LoRA")
    lora = {
        "plurals": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "shout": LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    }
    for name, rows in TASKS.items():
        train(make_base(len(tokenizer)), tokenizer, rows, lora[name], root / name, steps)

    print("routed, training only 'shout'")
    folders = [str(root / name) for name in TASKS]
    config = ArrowLoraConfig(adapters=folders, trainable_experts=["shout"], top_k=1, task_type="CAUSAL_LM")
    model = train(make_base(len(tokenizer)), tokenizer, TASKS["shout"], config, root / "routed", steps)
    # While a subset is trained its experts are kept and computed apart, so the sum is taken in another order.
    compare_reloaded(model, tokenizer, root / "routed", tolerance=1e-5)

    for name in TASKS:
        moved = expert_moved(model, tokenizer, root, name)
        print(f"  expert {name}: {'trained' if moved else 'unchanged'}")
        assert moved == (name == "shout")

    batch = tokenizer([rows[0]["prompt"] for rows in TASKS.values()], return_tensors="pt", padding=True)
    with model.trace_routing() as trace, torch.no_grad():
        model(**batch)
    print(trace.table())


def expert_moved(model, tokenizer, root: Path, name: str) -> bool:
    """Whether an expert differs from the adapter it came from: export it alone, and compare the two as plain LoRAs."""
    alone = root / f"{name}-alone"
    model.export_lora(str(alone), weights={name: 1.0})
    now, then = (
        logits_of(PeftModel.from_pretrained(make_base(len(tokenizer)), str(folder)), tokenizer)
        for folder in (alone, root / name)
    )
    return not torch.allclose(now, then, atol=1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two steps each instead of sixty")
    parser.add_argument("--output", type=Path, help="where to save the models (default: a temporary folder)")
    args = parser.parse_args()
    steps = 2 if args.smoke else 60
    disable_progress_bars()
    tokenizer = make_tokenizer()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.output or Path(temporary)
        fresh_experts(tokenizer, root, steps)
        experts_from_adapters(tokenizer, root, steps)


if __name__ == "__main__":
    main()
