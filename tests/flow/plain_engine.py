"""Greedy tokens of one plain vLLM engine, without any of our code: the truth to compare with.

Run as a program: `plain_engine.py MODEL < [{"ids": [...], "n": 24}, ...] > [[...], ...]`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def greedy(model: Path, asked: list[dict[str, Any]]) -> list[list[int]]:
    """What the plain engine answers to each prompt (token ids, number of tokens)."""
    done = subprocess.run(
        [sys.executable, __file__, str(model)],
        input=json.dumps(asked),
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    answer: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    asked = json.load(sys.stdin)
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    engine = LLM(
        model=sys.argv[1],
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_model_len=8192,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    answers = []
    for each in asked:  # one at a time: batching must not enter the comparison
        params = SamplingParams(temperature=0.0, max_tokens=each["n"], ignore_eos=True)
        prompt = TokensPrompt(prompt_token_ids=each["ids"])
        output = engine.generate([prompt], params, use_tqdm=False)[0].outputs[0]
        answers.append(list(output.token_ids))
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
