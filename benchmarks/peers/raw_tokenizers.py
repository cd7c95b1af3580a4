"""A peer of `ingest.py`: `tokenizers` alone on texts in memory, one process for each core. Nothing is read, rendered,
masked, packed or written within the time: what any ingest can reach at best.

    python raw_tokenizers.py SETTINGS.json     (model, texts: JSON lines of strings, processes, result)
"""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

BATCH = 1000  # texts of a call


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    count = settings["processes"]
    barrier, queue = multiprocessing.Barrier(count), multiprocessing.Queue()
    started = [
        multiprocessing.Process(target=_share, args=(settings, number, barrier, queue)) for number in range(count)
    ]
    for process in started:
        process.start()
    found = [queue.get() for _ in started]
    for process in started:
        process.join()
    tokens, begins, ends = zip(*found, strict=True)
    Path(settings["result"]).write_text(json.dumps({"tokens": sum(tokens), "seconds": max(ends) - min(begins)}))


def _share(settings: dict, number: int, barrier: multiprocessing.Barrier, queue: multiprocessing.Queue) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(os.path.join(settings["model"], "tokenizer.json"))
    with open(settings["texts"], encoding="utf-8") as lines:
        texts = [json.loads(line) for at, line in enumerate(lines) if at % settings["processes"] == number]
    tokenizer.encode_batch(texts[:BATCH], add_special_tokens=False)  # fills its cache of words
    barrier.wait()
    began, tokens = time.monotonic(), 0
    for at in range(0, len(texts), BATCH):
        tokens += sum(map(len, tokenizer.encode_batch(texts[at : at + BATCH], add_special_tokens=False)))
    queue.put((tokens, began, time.monotonic()))


if __name__ == "__main__":
    main()
