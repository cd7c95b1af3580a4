"""A peer of `ingest.py`: JSON lines to packed rows on disk as a TRL script has it: `datasets` reads and maps with the
model's template in several processes, TRL packs (best fit decreasing), and the packed rows are saved.

It makes no loss mask, checks no row and counts nothing. Its clock begins when everything is imported.
    python hf_map.py SETTINGS.json     (model, data, processes, seq_len, folder, result)
"""

import json
import os
import sys
import time
from pathlib import Path

from datasets import Features, Sequence, Value, disable_progress_bars, load_dataset
from transformers import AutoTokenizer
from trl import pack_dataset


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    processes, folder = settings["processes"], settings["folder"]

    def encode(batch: dict) -> dict:
        return {"input_ids": tokenizer.apply_chat_template(batch["messages"], return_dict=True)["input_ids"]}

    began = time.monotonic()
    rows = load_dataset("json", data_files=settings["data"], split="train", cache_dir=os.path.join(folder, "cache"))
    features = Features({"input_ids": Sequence(Value("int32"))})
    rows = rows.map(encode, batched=True, num_proc=processes, remove_columns=rows.column_names, features=features)
    packed = pack_dataset(rows, settings["seq_len"], "bfd", {"num_proc": processes})
    packed.save_to_disk(os.path.join(folder, "packed"))
    seconds = time.monotonic() - began
    tokens = sum(len(ids) for batch in packed.iter(1000) for ids in batch["input_ids"])
    Path(settings["result"]).write_text(json.dumps({"tokens": tokens, "seconds": seconds, "rows": len(packed)}))


if __name__ == "__main__":
    main()
