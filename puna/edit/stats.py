"""One pass over calibration text fills all that methods want to know of a model's activations and gradients.

Collectors, each by its own definition, over the tokens of all batches (padding left out):

* ``mean_abs``, ``max_abs``: mean and largest |x| of what enters each group of projections, [inputs];
* ``gram``: sum of x xᵀ of the same, [inputs, inputs], float32 (GPTQ's Hessian is twice its mean);
* ``cosine``, ``euclidean``, ``manhattan``: of each block, mean cosine and distances of a token's stream
  before and behind it, [blocks];
* ``contribution``: mean size of what a unit adds: of a channel |x| times the norm of its column of down
  (Puzzle, 2411.19146), of a head group the norm of what it adds to the stream, of a block that over the norm
  of the stream before it, of a hidden dimension the mean |x| of the stream before all blocks;
* ``taylor``: sum of |w dL/dw| over the weights of a head group, channel or block, L being the mean loss of
  a token (Molchanov et al. 2019; LLM-Pruner, 2305.11627); ``taylor_hidden`` the same of hidden dimensions.

Activations are folded into sums batch by batch, so memory is that of the sums, whatever the text's length;
``gram`` takes 4 inputs² bytes a site, gradients a float32 copy of the weights. What was collected is kept by
the fingerprints of weights and text, where a folder is given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from puna.core.errors import PunaError, unknown_name
from puna.core.files import fingerprint, write_aside
from puna.edit.gram import add_gram, mirror
from puna.model.units import Kind, layers_of, sum_over_units
from puna.text.packing import Batch
from puna.train.objectives import linear_cross_entropy

if TYPE_CHECKING:
    from puna.model.llama import Block, Llama

SITES = ("q_proj", "o_proj", "expand_proj", "gate_proj", "down_proj", "linear_attn", "linear_mlp")
"""Projections whose input is looked at: k_proj, v_proj and squeeze_proj share that of q_proj, up_proj that of
gate_proj."""
COLLECTORS = (
    *("mean_abs", "max_abs", "gram", "cosine", "euclidean", "manhattan"),
    *("contribution", "taylor", "taylor_hidden"),
)
_DISTANCES = ("cosine", "euclidean", "manhattan")
_TAYLOR_KINDS: dict[str, tuple[Kind, ...]] = {
    "taylor": ("head_group", "channel", "block"),
    "taylor_hidden": ("hidden",),
}


def site_of(projection: str) -> str:
    """The site whose statistics are those of a projection's input, by their whole names."""
    stem, _, name = projection.rpartition(".")
    shared = dict.fromkeys(("k_proj", "v_proj", "squeeze_proj"), "q_proj") | {"up_proj": "gate_proj"}
    return f"{stem}.{shared.get(name, name)}"


@dataclass(frozen=True)
class Statistics:
    """What was collected over ``tokens`` tokens: tensors by collector and, in there, by name.

    Names are sites (``mean_abs``, ``max_abs``, ``gram``), ``blocks`` (distances), or kinds of units with the
    layer behind a dot, such as ``channel.3`` and ``hidden.-1`` (``contribution``, ``taylor``).
    """

    tokens: int
    values: Mapping[str, Mapping[str, Tensor]]

    def of(self, collector: str) -> Mapping[str, Tensor]:
        """The tensors of one collector, by name."""
        if collector not in self.values:
            raise PunaError(
                "this was not collected", found=", ".join(self.values) or "nothing", expected=collector
            )
        return self.values[collector]

    def units(self, collector: str, kind: Kind, layer: int) -> Tensor:
        """Of ``contribution`` or a Taylor collector: a number for each unit of a kind in a layer."""
        name = "taylor_hidden" if collector == "taylor" and kind == "hidden" else collector
        return self.of(name)[f"{kind}.{layer}"]


def collect(
    model: Llama, batches: Sequence[Batch], wanted: Iterable[str], *, folder: Path | None = None
) -> Statistics:
    """Fill the ``wanted`` collectors in one pass over ``batches``; the model is left as it was.

    With a ``folder`` those that it holds for these weights and batches are read, and the others put there.
    """
    names = tuple(dict.fromkeys(wanted))
    for name in names:
        if name not in COLLECTORS:
            raise unknown_name("collector", name, COLLECTORS)
    if model.adapter is not None:
        raise PunaError("statistics are of a model's own weights", fix="merge the adapter first")
    tokens = sum(batch.tokens for batch in batches)
    if not tokens:
        raise PunaError("there is no text to collect statistics on", found=f"{len(batches)} batches")
    kept = None if folder is None else folder / _identity(model, batches)
    known = (
        {}
        if kept is None
        else {name: load_file(file) for name, file in _files(kept, names) if file.is_file()}
    )
    missing = [name for name in names if name not in known]
    fresh = _Pass(model, missing).run(batches) if missing else {}
    if kept is not None:
        for name, file in _files(kept, missing):
            file.parent.mkdir(parents=True, exist_ok=True)
            with write_aside(file) as aside:
                save_file({key: tensor.contiguous() for key, tensor in fresh[name].items()}, aside)
    return Statistics(tokens, {name: known[name] if name in known else fresh[name] for name in names})


def _files(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Path]]:
    for name in names:
        yield name, folder / f"{name}.safetensors"


def _identity(model: Llama, batches: Sequence[Batch]) -> str:
    """Tells models and texts apart: their bits in order, and the spec."""
    tensors = [*model.state_dict().values()]
    for batch in batches:
        tensors += [batch.input_ids, batch.labels, batch.positions, batch.segments]
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return fingerprint({"content": content.hexdigest(), "spec": model.spec.to_config(), "format": 1})


class _Pass:
    """Hooks and sums of one pass."""

    def __init__(self, model: Llama, wanted: Sequence[str]) -> None:
        self.model, self.spec, self.wanted = model, model.spec, wanted
        self.tokens = self.targets = 0
        self.sums: dict[str, dict[str, Tensor]] = {name: {} for name in wanted}
        self.gradients: dict[str, Tensor] = {}
        self._real = torch.empty(0)  # which places of the batch hold a token, [rows, time] bool

    def run(self, batches: Sequence[Batch]) -> dict[str, dict[str, Tensor]]:
        """All batches, and what the sums come to."""
        trained = self._trained()
        before = [(weight, weight.requires_grad) for weight in self.model.parameters()]
        embedding: Any = self.model.model.embed_tokens.weight
        sink = getattr(embedding, "gradient_sink", None)  # a trainer's, which would swallow the gradient
        training, recomputed = self.model.training, self.model.recomputed_layers
        self.model.eval()
        self.model.recomputed_layers = 0  # a layer that is computed twice would be counted twice
        try:
            for name, weight in self.model.named_parameters():
                weight.requires_grad_(name in trained)
            embedding.gradient_sink = None
            with ExitStack() as stack, torch.set_grad_enabled(bool(trained)):
                self._hook(stack)
                for batch in batches:
                    self._read(batch.to(self.model.device), trained)
        finally:
            for weight, wanted in before:
                weight.requires_grad_(wanted)
            if sink is None:
                del embedding.gradient_sink
            else:
                embedding.gradient_sink = sink
            self.model.train(training)
            self.model.recomputed_layers = recomputed
        return self._finished()

    def _trained(self) -> set[str]:
        """Parameters whose gradient is needed."""
        names = [name for name, _ in self.model.named_parameters()]
        if "taylor_hidden" in self.wanted:
            return set(names)
        return {name for name in names if ".layers." in name} if "taylor" in self.wanted else set()

    def _read(self, batch: Batch, trained: set[str]) -> None:
        self._real = batch.segments >= 0
        self.tokens += batch.tokens
        self.targets += batch.targets
        hidden = self.model.hidden(batch.input_ids, batch.positions, batch.segments)
        if not trained:
            return
        loss = linear_cross_entropy(hidden, self.model.head_weight, batch.labels)
        chosen = {name: weight for name, weight in self.model.named_parameters() if name in trained}
        # Not backward(): a trainer's hooks would take the gradients for its own.
        found = torch.autograd.grad(loss.total, list(chosen.values()))
        for name, gradient in zip(chosen, found, strict=True):
            if name in self.gradients:
                self.gradients[name] += gradient
            else:
                self.gradients[name] = gradient.float()

    def _hook(self, stack: ExitStack) -> None:
        blocks = cast("Sequence[Block]", list(cast("Iterable[Block]", self.model.model.layers)))
        looks_inside = {"mean_abs", "max_abs", "gram", "contribution"} & set(self.wanted)
        for layer, block in enumerate(blocks):
            if looks_inside:
                for name, module in block.named_modules():
                    if name.rpartition(".")[2] in SITES:
                        saw = self._entering(layer, f"model.layers.{layer}.{name}")
                        handle = module.register_forward_pre_hook(saw)
                        stack.callback(handle.remove)
            if {*_DISTANCES, "contribution"} & set(self.wanted):
                handle = block.register_forward_hook(self._passing(layer))
                stack.callback(handle.remove)

    def _entering(self, layer: int, site: str) -> Callable[[Any, tuple[Any, ...]], None]:
        @torch.no_grad()
        def saw(module: Any, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].detach()[self._real].float()  # [tokens, inputs]
            if "mean_abs" in self.wanted:
                self._add("mean_abs", site, rows.abs().sum(0))
            if "max_abs" in self.wanted:
                largest = rows.abs().amax(0)
                earlier = self.sums["max_abs"].get(site, largest)
                self.sums["max_abs"][site] = torch.maximum(earlier, largest)
            if "gram" in self.wanted:
                sums = self.sums["gram"]
                if site not in sums:
                    sums[site] = rows.new_zeros(rows.shape[1], rows.shape[1])
                add_gram(sums[site], rows)
            if "contribution" in self.wanted and site.endswith("down_proj"):
                norms = module.weight.detach().float().norm(dim=0)
                self._add("contribution", f"channel.{layer}", rows.abs().sum(0) * norms)
            if "contribution" in self.wanted and site.endswith(".o_proj"):
                self._add("contribution", f"head_group.{layer}", self._added(layer, module, rows))

        return saw

    def _added(self, layer: int, module: Any, rows: Tensor) -> Tensor:
        """Sum over tokens of the norm of what each head group adds to the stream."""
        groups = self.spec.blocks[layer].kv_heads
        weight = module.weight.detach().float()
        parts = zip(rows.chunk(groups, dim=1), weight.chunk(groups, dim=1), strict=True)
        return torch.stack([(part @ columns.T).norm(dim=1).sum() for part, columns in parts])

    def _passing(self, layer: int) -> Callable[[Any, tuple[Any, ...], Tensor], None]:
        @torch.no_grad()
        def saw(_module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            before = inputs[0].detach()[self._real].float()  # [tokens, hidden]
            after = output.detach()[self._real].float()
            if "cosine" in self.wanted:
                cosines = torch.nn.functional.cosine_similarity(before, after, dim=1)
                self._add("cosine", str(layer), cosines.sum())
            for name, order in (("euclidean", 2), ("manhattan", 1)):
                if name in self.wanted:
                    self._add(name, str(layer), (after - before).norm(order, dim=1).sum())
            if "contribution" in self.wanted:
                share = (after - before).norm(dim=1) / before.norm(dim=1)
                self._add("contribution", f"block.{layer}", share.sum().view(1))
                self._add("contribution", "hidden.-1", before.abs().sum(0) / len(self.spec.blocks))

        return saw

    def _add(self, collector: str, name: str, amount: Tensor) -> None:
        sums = self.sums[collector]
        if name in sums:
            sums[name] += amount
        else:
            sums[name] = amount.clone()

    def _finished(self) -> dict[str, dict[str, Tensor]]:
        """Sums over tokens turned into what the collectors are defined as."""
        found: dict[str, dict[str, Tensor]] = {}
        for name in self.wanted:
            sums = self.sums[name]
            if name in _TAYLOR_KINDS:
                found[name] = self._taylor(name)
            elif name in _DISTANCES:
                blocks = [sums[str(layer)] for layer in range(len(self.spec.blocks))]
                found[name] = {"blocks": torch.stack(blocks).cpu() / self.tokens}
            elif name == "gram":
                found[name] = {site: mirror(tensor).cpu() for site, tensor in sums.items()}
            elif name == "max_abs":
                found[name] = {site: tensor.cpu() for site, tensor in sums.items()}
            else:
                found[name] = {site: tensor.cpu() / self.tokens for site, tensor in sums.items()}
        return found

    @torch.no_grad()
    def _taylor(self, collector: str) -> dict[str, Tensor]:
        weights = dict(self.model.named_parameters())
        products = {
            name: (weights[name].float() * gradient / self.targets).abs()
            for name, gradient in self.gradients.items()
        }
        return {
            f"{kind}.{layer}": sum_over_units(self.spec, kind, layer, products).cpu()
            for kind in _TAYLOR_KINDS[collector]
            for layer in layers_of(self.spec, kind)
        }
