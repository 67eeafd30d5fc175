"""One merge in a process of its own, by mergekit or by puna: seconds and peak memory as JSON.

    python benchmarks/peers/merging.py mergekit|puna MERGE.yml OUT

It runs in an environment that has the side it is asked for; the other one is not imported.
"""

from __future__ import annotations

import json
import resource
import sys
import time


def merge_with_mergekit(config: str, out: str) -> tuple[float, int]:
    """Seconds of the merge alone, and the peak before it in bytes."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0)
    before = peak()
    start = time.perf_counter()
    with open(config, encoding="utf-8") as file:
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(file)), out, options)
    return time.perf_counter() - start, before


def merge_with_puna(config: str, out: str) -> tuple[float, int]:
    """The same with puna."""
    from puna.edit.merging.config import read_config
    from puna.edit.merging.plan import make_plan
    from puna.text.pretrained import DTYPES

    before = peak()
    start = time.perf_counter()
    plan = make_plan(read_config(config), seed=0)
    plan.write(out, DTYPES[plan.config.dtype or "float32"])
    return time.perf_counter() - start, before


def peak() -> int:
    """Peak resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run one merge and print its figures as the last line."""
    side, config, out = sys.argv[1:4]
    start = time.perf_counter()
    seconds, before = {"mergekit": merge_with_mergekit, "puna": merge_with_puna}[side](config, out)
    whole = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "whole": whole, "imports": before, "peak": peak()}))


if __name__ == "__main__":
    main()
