"""Whether the engine's greedy texts are transformers' greedy texts, over real prompts.

    python -m benchmarks.greedy [--prompts 200] [--tokens 32] [--kernels native|plain]

All prompts run together in the engine: in chunks, in a cache too small for all of them, so that some are
preempted. A text is transformers' own greedy text exactly if each of its tokens is the argmax of
transformers' logits behind the tokens before, which one forward pass a text tells. Both in float32. Prompts
are beginnings of LibreOffice's help pages in English and Dutch, and questions in the chat template.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

SHORTEST, LONGEST = 4, 160  # tokens of a prompt


def pages(asset: str) -> list[str]:
    """Running text of the help pages of an asset, the longer ones."""
    from puna.core import assets
    from puna.data.sources.libreoffice_help import paragraphs

    texts = []
    for page in sorted(Path(assets.fetch(asset)).rglob("*.html")):
        text = " ".join(paragraphs(page.read_text(encoding="utf-8", errors="replace")).values())
        if len(text) > 800:
            texts.append(text)
    return texts


def make_prompts(engine: Any, count: int, seed: int = 0) -> list[list[int]]:
    """``count`` prompts as ids: two fifths English, two fifths Dutch, a fifth questions to the chat model."""
    from puna.core.seeds import numpy_generator

    generator = numpy_generator(seed, "benchmarks", "greedy")
    prompts: list[list[int]] = []
    english, dutch = pages("libreoffice-help-en-us"), pages("libreoffice-help-nl")
    for number in range(count):
        texts = dutch if number % 5 in (1, 3) else english
        text = texts[int(generator.integers(len(texts)))]
        length = int(generator.integers(SHORTEST, LONGEST))
        if number % 5 == 4:
            start = " ".join(text.split()[: max(3, length // 4)])
            prompts.append(engine.encode([{"role": "user", "content": f"Go on with this text: {start}"}]))
        else:
            prompts.append(engine.encode(text)[:length])
    return prompts


def first_difference(oracle: Any, prompt: list[int], ids: list[int]) -> tuple[int, float] | None:
    """Place of the first token that is not transformers' choice, and by how much its logit is short."""
    with torch.inference_mode():
        logits = oracle(torch.tensor([[*prompt, *ids[:-1]]])).logits[0, len(prompt) - 1 :].float()
    chosen = logits.argmax(-1).tolist()
    for place, (ours, theirs) in enumerate(zip(ids, chosen, strict=True)):
        if ours != theirs:
            return place, float(logits[place, theirs] - logits[place, ours])
    return None


def main() -> None:
    """Print how many texts are equal, and where and how closely others part."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import puna
    from puna.core.progress import Track

    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--prompts", type=int, default=200)
    arguments.add_argument("--tokens", type=int, default=32)
    arguments.add_argument("--kernels", default="auto", choices=["auto", "native", "plain"])
    asked = arguments.parse_args()
    model = puna.load("smollm2-135m-instruct", dtype="float32")
    engine = puna.Engine(
        model, kernels=asked.kernels, max_batch_tokens=256, chunk_tokens=96, cache_tokens=2048
    )
    prompts = make_prompts(engine, asked.prompts)
    completions = engine.generate(prompts, puna.Sampling(max_tokens=asked.tokens))
    oracle = LlamaForCausalLM(LlamaConfig(**model.spec.to_config())).eval()
    oracle.load_state_dict(model.state_dict(), strict=False)
    oracle.tie_weights()
    parted = []
    with Track("asking transformers", len(prompts), "texts") as track:
        for number, (prompt, found) in enumerate(zip(prompts, completions, strict=True)):
            difference = first_difference(oracle, prompt, found.ids)
            if difference is not None:
                parted.append((number, *difference))
            track.advance()
    written = sum(len(found.ids) for found in completions)
    counts = engine.statistics
    print(f"{engine.kernels} kernels, float32: {len(prompts)} prompts, {written:,} tokens written,")
    print(f"{counts.preemptions} preemptions, {counts.steps:,} steps, {counts.tokens_read:,} tokens read")
    print(f"equal to transformers' greedy text: {len(prompts) - len(parted)} of {len(prompts)}")
    for number, place, margin in parted:
        print(f"  prompt {number} parts at token {place}, where the other token is {margin:.2g} ahead")


if __name__ == "__main__":
    main()
