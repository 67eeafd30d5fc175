"""One side of the decoding benchmark in a process of its own: it answers the requests of a job.

    python -m benchmarks.peers.decoding JOB.json

Every side gets the same requests: token ids, how many tokens to produce (no stop token ends them), and when
each arrives. It answers a short one first, which is not counted. What is written is when the first token of
each request came and when the last, in seconds from the start.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """Ids to continue by so many tokens; ``arrives`` seconds after the start."""

    ids: list[int]
    tokens: int
    arrives: float = 0.0


@dataclass
class Served:
    """When the first and the last token of a request were there, seconds from the start."""

    first: float = 0.0
    last: float = 0.0


Side = Callable[[list[Request]], list[Served]]


def puna(job: dict[str, Any]) -> Side:
    """The engine, as a user has it."""
    import torch

    from puna.decode.engine import Engine
    from puna.decode.sampling import Sampling
    from puna.text.pretrained import load

    torch.set_num_threads(job["threads"])
    model = load(job["model"], dtype=torch.bfloat16)
    room = sum(len(request["ids"]) + request["tokens"] + 16 for request in job["requests"])
    engine = Engine(model, quantize=job["settings"].get("quantize"), cache_tokens=room + 4096)
    if engine.kernels != "native":
        raise SystemExit("the native kernels are not there")

    def serve(requests: list[Request]) -> list[Served]:
        served = [Served() for _ in requests]
        waiting = sorted(range(len(requests)), key=lambda place: requests[place].arrives)
        start = time.perf_counter()

        def note(place: int) -> Callable[[Any], None]:
            def on_event(event: Any) -> None:
                now = time.perf_counter() - start
                if event.ids:
                    served[place].first = served[place].first or now
                    served[place].last = now

            return on_event

        running = False
        while waiting or running:
            while waiting and requests[waiting[0]].arrives <= time.perf_counter() - start:
                place = waiting.pop(0)
                sampling = Sampling(max_tokens=requests[place].tokens, temperature=0, ignore_eos=True)
                engine.submit(requests[place].ids, sampling, on_event=note(place))
                running = True
            if running:
                running = engine.step()
            elif waiting:
                time.sleep(max(0.0, requests[waiting[0]].arrives - (time.perf_counter() - start)))
        return served

    return serve


def transformers(job: dict[str, Any]) -> Side:
    """``generate`` on all requests as one batch, padded on the left; the first token by a streamer."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.bfloat16).eval()

    class Clock:
        """A streamer that only looks at the clock."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            self.times.append(time.perf_counter())

    def serve(requests: list[Request]) -> list[Served]:
        longest = max(len(request.ids) for request in requests)
        ids = torch.zeros(len(requests), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, longest - len(request.ids) :] = torch.tensor(request.ids)
            mask[row, longest - len(request.ids) :] = 1
        tokens = max(request.tokens for request in requests)
        clock = Clock() if len(requests) == 1 else None  # streamers take one row only
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
            )
        end = time.perf_counter() - start
        # The streamer is given the prompt, then each token.
        first = clock.times[1] - start if clock is not None else 0.0
        return [Served(first, end) for _ in requests]

    return serve


class LlamaCpp:
    """llama.cpp by its batch interface: one context, a slot for each request, greedy.

    Each round decodes one token of every running request and fills up to 512 tokens with prompts, as
    llama.cpp's own server does.
    """

    batch_tokens = 512

    def __init__(self, job: dict[str, Any]) -> None:
        import llama_cpp
        import numpy

        self.cpp, self.numpy = llama_cpp, numpy
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(job["gguf"]).encode(), settings)
        self.slots = max(1, len(job["requests"]))
        context = llama_cpp.llama_context_default_params()
        room = max(len(request["ids"]) + request["tokens"] for request in job["requests"]) + 64
        context.n_ctx = self.slots * room
        context.n_batch = context.n_ubatch = self.batch_tokens
        context.n_seq_max = self.slots
        context.n_threads = context.n_threads_batch = job["threads"]
        for name, value in job["settings"].items():
            setattr(context, name, value)
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        self.batch = llama_cpp.llama_batch_init(self.batch_tokens, 0, 1)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, slot, whether logits are wanted) of each token of a round."""
        self.batch.n_tokens = len(entries)
        for place, (token, position, slot, wanted) in enumerate(entries):
            self.batch.token[place] = token
            self.batch.pos[place] = position
            self.batch.n_seq_id[place] = 1
            self.batch.seq_id[place][0] = slot
            self.batch.logits[place] = wanted
        code = self.cpp.llama_decode(self.context, self.batch)
        if code:
            raise SystemExit(f"llama_decode gave {code}")

    def likeliest(self, place: int) -> int:
        """The token with the largest logit of a row of the batch."""
        pointer = self.cpp.llama_get_logits_ith(self.context, place)
        array = self.numpy.ctypeslib.as_array(
            ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), shape=(self.vocabulary,)
        )
        return int(array.argmax())

    def serve(self, requests: list[Request]) -> list[Served]:
        """Rounds until every request has its tokens."""
        served = [Served() for _ in requests]
        read = [0] * len(requests)  # tokens of the prompt, then of the text
        produced = [0] * len(requests)
        latest = [0] * len(requests)
        start = time.perf_counter()
        while any(produced[i] < request.tokens for i, request in enumerate(requests)):
            entries: list[tuple[int, int, int, bool]] = []
            asked: list[tuple[int, int]] = []  # (request, place in the batch)
            here = [i for i, r in enumerate(requests) if r.arrives <= time.perf_counter() - start]
            for i in here:
                if 0 < produced[i] < requests[i].tokens:
                    asked.append((i, len(entries)))
                    entries.append((latest[i], read[i], i, True))
                    read[i] += 1
            for i in here:
                ids = requests[i].ids
                take = min(len(ids) - read[i], self.batch_tokens - len(entries)) if not produced[i] else 0
                for position in range(read[i], read[i] + take):
                    last = position + 1 == len(ids)
                    if last:
                        asked.append((i, len(entries)))
                    entries.append((ids[position], position, i, last))
                read[i] += take
            if not entries:
                time.sleep(0.0005)
                continue
            self.decode(entries)
            for i, place in asked:
                latest[i] = self.likeliest(place)
                produced[i] += 1
                now = time.perf_counter() - start
                served[i].first = served[i].first or now
                served[i].last = now
        memory = self.cpp.llama_get_memory(self.context)
        for i in range(len(requests)):
            self.cpp.llama_memory_seq_rm(memory, i, -1, -1)
        return served


def llama_cpp(job: dict[str, Any]) -> Side:
    """See :class:`LlamaCpp`."""
    return LlamaCpp(job).serve


def openvino(job: dict[str, Any]) -> Side:
    """openvino-genai's pipeline on the same GGUF; one request at a time."""
    import numpy
    import openvino
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(str(job["gguf"]), "CPU", INFERENCE_NUM_THREADS=job["threads"])

    def serve(requests: list[Request]) -> list[Served]:
        served = []
        start = time.perf_counter()
        for request in requests:
            config = openvino_genai.GenerationConfig(max_new_tokens=request.tokens, ignore_eos=True)
            times: list[float] = []

            def note(token: Any, times: list[float] = times) -> Any:
                times.append(time.perf_counter() - start)
                return openvino_genai.StreamingStatus.RUNNING

            ids = openvino.Tensor(numpy.array([request.ids], dtype=numpy.int64))
            pipeline.generate(openvino_genai.TokenizedInputs(ids, ones_like(ids)), config, note)
            served.append(Served(times[0], time.perf_counter() - start))
        return served

    def ones_like(ids: Any) -> Any:
        return openvino.Tensor(numpy.ones(ids.shape, dtype=numpy.int64))

    return serve


SIDES: dict[str, Callable[[dict[str, Any]], Side]] = {
    "puna": puna,
    "transformers": transformers,
    "llama.cpp": llama_cpp,
    "openvino": openvino,
}


def main() -> None:
    """Answer the requests of the job file."""
    job = json.loads(Path(sys.argv[1]).read_text())
    requests = [Request(**given) for given in job["requests"]]
    serve = SIDES[job["side"]](job)
    serve([Request(requests[0].ids[:32], 4)])
    served = serve(requests)
    Path(job["result"]).write_text(json.dumps([asdict(one) for one in served]))


if __name__ == "__main__":
    main()
