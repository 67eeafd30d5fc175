"""AdamW over float32 master weights and float32 gradients, whatever the model computes in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from puna.core.errors import PunaError
from puna.train.distributed import World
from puna.train.sharding import is_shard, like, local_part

EMBEDDING_NAMES = ("embed_tokens", "lm_head")
_PIECE = 1 << 18  # numbers whose float32 copy fits a CPU core's cache


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (Loshchilov and Hutter 2019) with decay on matrices only.

    ``embedding_factor`` multiplies the learning rate of input embeddings and head;
    ``max_grad_norm`` 0 means no clipping. ``scales`` multiply rate and decay by parameter, as muP has it.
    """

    learning_rate: float
    embedding_factor: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)


class Optimizer:
    """Trains the given parameters; gradients gather in one flat float32 buffer.

    A float32 parameter is its own master and its ``grad`` is a view of the buffer. Any other has a
    float32 master, and a hook adds each of its gradients to the buffer as soon as autograd has made
    it and frees it, so that sums over micro-batches lose nothing to bfloat16. After a step the
    masters are rounded into the parameters.

    Of sharded parameters all of this is of this process's part alone: FSDP adds the sum over all
    processes to the part's gradient. Replicated ones are summed by :meth:`collect`.

    Per trained parameter this takes 12 bytes (gradient and two moments), and 4 for a master.
    """

    def __init__(self, named: Iterable[tuple[str, Parameter]], settings: OptimizerSettings) -> None:
        trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        if not trained:
            raise PunaError("nothing to train", found="no parameter needs a gradient")
        self.settings = settings
        self.parameters = dict(trained)
        self.sharded = any(is_shard(parameter) for _, parameter in trained)
        self.count = sum(parameter.numel() for _, parameter in trained)
        """Number of trained weights, over all processes."""
        sizes = [local_part(parameter).numel() for _, parameter in trained]
        self.gradient = torch.zeros(sum(sizes), dtype=torch.float32, device=trained[0][1].device)
        self.masters: dict[str, Parameter] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        for (name, parameter), part in zip(trained, torch.split(self.gradient, sizes), strict=True):
            view = part.view_as(local_part(parameter))
            self.masters[name] = self._master(parameter, view)
            self.masters[name].grad = view
            if "embed_tokens" in name and not is_shard(parameter):
                parameter.gradient_sink = view  # type: ignore[attr-defined]  # see model/llama.py: no dense gradient
        self._adamw = torch.optim.AdamW(
            self._groups(),
            betas=settings.betas,
            fused=True,
        )

    def _master(self, parameter: Parameter, view: Tensor) -> Parameter:
        if is_shard(parameter):
            assert parameter.dtype == torch.float32
            parameter.grad = like(view, parameter)
            return Parameter(local_part(parameter.detach()))  # the same storage: nothing is rounded into it
        if parameter.dtype == torch.float32:
            return parameter
        hook = parameter.register_post_accumulate_grad_hook(_adder(view))  # type: ignore[no-untyped-call]
        self._hooks.append(hook)
        return Parameter(parameter.detach().float())

    def _groups(self) -> list[dict[str, object]]:
        """Parameters by (learning-rate factor, decay)."""
        groups: dict[tuple[float, float], list[Parameter]] = {}
        for name, master in self.masters.items():
            embedding = any(part in name for part in EMBEDDING_NAMES)
            faster, stronger = self.settings.scales.get(name, (1.0, 1.0))
            factor = faster * (self.settings.embedding_factor if embedding else 1.0)
            decay = stronger * self.settings.weight_decay if master.ndim >= 2 else 0.0
            groups.setdefault((factor, decay), []).append(master)
        return [
            {"params": masters, "weight_decay": decay, "factor": factor, "lr": 0.0}
            for (factor, decay), masters in groups.items()
        ]

    def collect(self, world: World) -> None:
        """Sum the gathered gradients over all processes: the one communication of gradients of a step.

        Shards come summed out of the backward pass.
        """
        if not self.sharded:
            world.sum_(self.gradient)

    @contextlib.contextmanager
    def holding(self, names: Collection[str]) -> Iterator[None]:
        """A block in which a step leaves these parameters, and their moments, as they are to the bit.

        What was gathered for them is forgotten, and counts in no norm. A gradient of zero would not do:
        moments and decay move a weight without one.
        """
        gradients = {name: self.masters[name].grad for name in names}
        for name, gradient in gradients.items():
            assert gradient is not None
            gradient.zero_()
            self.masters[name].grad = None  # AdamW passes over what has none
        try:
            yield
        finally:
            for name, gradient in gradients.items():
                self.masters[name].grad = gradient

    def gradient_norm(self, divisor: float, world: World | None = None) -> float:
        """Global norm of the mean gradient: of the gathered sums divided by ``divisor``.

        ``world`` are the processes that hold the parts of sharded gradients.
        """
        norm = torch.linalg.vector_norm(self.gradient)
        if self.sharded and world is not None:
            norm = world.total(norm.cpu().double().square()).sqrt()
        return float(norm) / divisor

    @torch.no_grad()
    def step(self, schedule_factor: float, divisor: float, norm: float) -> float:
        """One update with the gathered gradients divided by ``divisor``, clipped to the global norm.

        ``norm`` is what :meth:`gradient_norm` gave. Returns the learning rate that was used (of
        parameters with factor 1), and leaves the gradient buffer zero.
        """
        limit = self.settings.max_grad_norm
        clip = limit / norm if limit and norm > limit else 1.0
        self.gradient.mul_(clip / divisor)
        rate = self.settings.learning_rate * schedule_factor
        for group in self._adamw.param_groups:
            group["lr"] = rate * group["factor"]
        self._adamw.step()
        self.gradient.zero_()
        self._round()
        return rate

    def _round(self) -> None:
        for name, parameter in self.parameters.items():
            if not self.sharded and parameter is not self.masters[name]:
                parameter.copy_(self.masters[name])

    def weights(self) -> dict[str, Tensor]:
        """The float32 masters by parameter name, sharded where the parameters are."""
        return {name: like(master.detach(), self.parameters[name]) for name, master in self.masters.items()}

    def moments(self) -> dict[str, Tensor]:
        """AdamW's two moments as ``first/<name>`` and ``second/<name>``; empty before a step."""
        found: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            state = self._adamw.state.get(master)
            if state:
                found[f"first/{name}"] = like(state["exp_avg"], self.parameters[name])
                found[f"second/{name}"] = like(state["exp_avg_sq"], self.parameters[name])
        return found

    @torch.no_grad()
    def restore(self, weights: dict[str, Tensor], moments: dict[str, Tensor], steps: int) -> None:
        """Take over masters and moments after ``steps`` updates; the parameters follow.

        The moments are kept, not copied; all are sharded where the parameters are.
        """
        for name, master in self.masters.items():
            master.copy_(local_part(weights[name]))
            if steps:
                self._adamw.state[master] = {
                    "step": torch.tensor(float(steps), dtype=torch.float32, device=master.device),
                    "exp_avg": local_part(moments[f"first/{name}"]).to(master.device),
                    "exp_avg_sq": local_part(moments[f"second/{name}"]).to(master.device),
                }
        self.gradient.zero_()
        self._round()

    def close(self) -> None:
        """Remove hooks and gradients from the model."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self.parameters.values():
            parameter.grad = None
            if hasattr(parameter, "gradient_sink"):
                del parameter.gradient_sink


def _adder(view: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds a parameter's new gradient to ``view`` and frees it."""

    def add(parameter: Tensor) -> None:
        if parameter.grad is not None:  # an embedding's has gone to its sink
            _add_narrow(view, parameter.grad)
            parameter.grad = None

    return add


def _add_narrow(total: Tensor, gradient: Tensor) -> None:
    """Add ``gradient``, of a narrower type, to ``total`` in float32.

    On a CPU adding across types in one operation is slow, and a float32 copy of the whole gradient would
    be fresh memory of twice its size: a piece at a time, the copy stays in the cache.
    """
    if total.device.type != "cpu" or not gradient.is_contiguous():
        total.add_(gradient.float())
        return
    wide = torch.empty(min(_PIECE, total.numel()), dtype=total.dtype)
    pieces = zip(torch.split(total.view(-1), _PIECE), torch.split(gradient.view(-1), _PIECE), strict=True)
    for sum_piece, piece in pieces:
        sum_piece.add_(wide[: len(piece)].copy_(piece))
