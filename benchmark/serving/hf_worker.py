"""`transformers` as a system to measure: a process that runs static-batch `generate` for the benchmark.

Protocol, one JSON object a line: it prints {"ready": ..., "version": ...}; for each {"ids": [[...]], "output_len": n}
on stdin it generates exactly n tokens greedily for all prompts as one left-padded batch and prints {"seconds": ...,
"ids": [[...]]}. End of stdin ends it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
import transformers
from hf_model import load_hf_model


def generate(model: Any, prompts: list[list[int]], output_len: int) -> list[list[int]]:
    """`output_len` new ids for each prompt."""
    width = max(len(ids) for ids in prompts)
    input_ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    with torch.inference_mode():
        output = model.generate(input_ids, attention_mask=mask, max_new_tokens=output_len)
    return output[:, width:].tolist()


def main() -> None:
    """Serve requests from stdin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, help="torch threads; torch's own choice when left out")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = load_hf_model(arguments.model)
    ready = {"ready": True, "version": transformers.__version__, "torch": torch.__version__}
    print(json.dumps(ready | {"threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        started = time.perf_counter()
        ids = generate(model, request["ids"], request["output_len"])
        print(json.dumps({"seconds": time.perf_counter() - started, "ids": ids}), flush=True)


if __name__ == "__main__":
    main()
