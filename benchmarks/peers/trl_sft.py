"""The peer of `trainer.py`: the same training by TRL's SFTTrainer with packing, as its users write it.

Reads the raw rows, and lets TRL render, tokenize, pack (best-fit decreasing, its default) and train them. Nothing is
evaluated or saved within what is timed; a step lasts from the end of the one before it to its own.
    python benchmarks/peers/trl_sft.py SETTINGS.json
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback


class Clock(TrainerCallback):
    """When each step ended, and the loss that was logged for it."""

    def __init__(self) -> None:
        self.times, self.losses = [], []

    def on_train_begin(self, *_, **__) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, *_, **__) -> None:
        self.times.append(time.perf_counter())

    def on_log(self, args, state, control, logs, **_) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


class Counted:
    """TRL's collator, counting what it gives: there is no padding among it."""

    def __init__(self, collator) -> None:
        self.collator, self.tokens, self.targets = collator, [], []

    def __call__(self, examples):
        batch = self.collator(examples)
        assert "attention_mask" not in batch, "TRL's packing is expected to be free of padding"
        self.tokens.append(batch["input_ids"].numel())
        self.targets.append(int((batch["labels"][:, 1:] != -100).sum()))
        return batch


def raw(files: list[str]):
    from datasets import Dataset, concatenate_datasets

    readers = {".parquet": Dataset.from_parquet}
    return concatenate_datasets([readers.get(Path(file).suffix, Dataset.from_json)(file) for file in files])


def conversation(row: dict, prompt: str, languages: dict[str, str]) -> dict:
    code = row["target_lang_code"]
    asked = prompt.format(target_lang=languages[code], tgt_lang_code=code, text=row["source_text"])
    return {
        "prompt": [{"role": "user", "content": asked}],
        "completion": [{"role": "assistant", "content": row["target_text"]}],
    }


def per_step(counts: list[int], size: int, steps: int) -> list[int]:
    """Sums of each step's micro-batches."""
    return [sum(counts[at * size : (at + 1) * size]) for at in range(steps)]


def main() -> None:
    from trl import SFTConfig, SFTTrainer

    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    rows = raw(settings["files"])
    given = {"prompt": settings["prompt"], "languages": settings["languages"]}
    rows = rows.map(conversation, fn_kwargs=given, remove_columns=rows.column_names)
    config = SFTConfig(
        output_dir=settings["output"],
        model_init_kwargs={"dtype": "float32"},
        packing=True,
        max_length=settings["seq_len"],
        completion_only_loss=True,
        num_train_epochs=1,
        max_steps=settings["steps"] or -1,
        per_device_train_batch_size=settings["micro_batch"],
        gradient_accumulation_steps=settings["global_batch"] // settings["micro_batch"],
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        adam_beta1=settings["betas"][0],
        adam_beta2=settings["betas"][1],
        adam_epsilon=settings["eps"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["clip_norm"],
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,  # as ray-ft's default; TRL's is True, which saves memory and costs a third
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
        seed=settings["seed"],
    )
    trainer = SFTTrainer(model=settings["model"], args=config, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)  # a line a step on the terminal
    trainer.add_callback(clock := Clock())
    trainer.data_collator = counted = Counted(trainer.data_collator)
    trainer.train()
    steps = trainer.state.global_step
    packed = trainer.train_dataset
    accumulation = config.gradient_accumulation_steps
    found = {
        "step_seconds": [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)],
        "losses": clock.losses,
        "tokens": per_step(counted.tokens, accumulation, steps),
        "targets": per_step(counted.targets, accumulation, steps),
        "documents": sum(len(lengths) for lengths in packed["seq_lengths"]),
        "packed_rows": len(packed),
        "attention": trainer.model.config._attn_implementation,
        "optimizer": {"name": type(trainer.optimizer).__name__, "arg": str(config.optim)},
        "threads": torch.get_num_threads(),
    }
    if settings["save"]:
        trainer.save_model(settings["output"])
    Path(settings["result"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
