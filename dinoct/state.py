"""The tensors of a training run: model, optimiser and random generators, of one process or of several ranks.

They may lie on any device; a checkpoint brings them back through the CPU.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dinoct.optim import load_optimizer_state, optimizer_state
from dinoct.parallel import Parallel, like, whole
from dinoct.rng import restore_rng

State = dict[str, Any]


def gather(model: nn.Module, optimizer: torch.optim.Optimizer, parallel: Parallel, *, rng: State) -> State:
    """The whole state. Of several ranks all must ask, and the first gets it: a checkpoint is one file, however many
    ranks wrote it, and any number goes on from it.

    Args:
        model: with its teachers and centres.
        optimizer: of the student.
        parallel: this rank's place.
        rng: this rank's generators (`dinoct.rng.rng_state`).
    """
    generators = gather_generators(parallel, rng)
    return own(model, optimizer, parallel, rng=generators["rng"]) | generators


def gather_generators(parallel: Parallel, rng: State) -> State:
    """The generators' states of all ranks; all must ask."""
    found = parallel.each(rng)
    ranks = {"rng_ranks": {str(rank): state for rank, state in enumerate(found)}} if len(found) > 1 else {}
    return {"rng": found[0]} | ranks


def own(model: nn.Module, optimizer: torch.optim.Optimizer, parallel: Parallel, *, rng: State) -> State:
    """`gather` without the others' generators: where each rank holds the whole model, none is asked."""
    moments = {
        name: {key: _whole(value, parallel) for key, value in state.items()}
        for name, state in optimizer_state(optimizer).items()
    }
    tensors = {name: _whole(tensor, parallel) for name, tensor in model.state_dict().items()}
    return {"model": tensors, "optimizer": moments, "rng": rng}


def _whole(tensor: Tensor, parallel: Parallel) -> Tensor:
    """A tensor for the one file; put together from shares, it is let go by those who do not write."""
    if parallel.whole:
        return tensor
    tensor = whole(tensor)
    # A copy on the CPU too: it is written while training goes on.
    return tensor.to("cpu", copy=True) if parallel.leads else tensor.new_empty(0)


def restore(state: State, model: nn.Module, optimizer: torch.optim.Optimizer, parallel: Parallel) -> None:
    """Put a state of `gather` into model, optimiser and generators; each rank takes its share."""
    present = model.state_dict()
    model.load_state_dict({n: like(t, present[n]) if n in present else t for n, t in state["model"].items()})
    load_optimizer_state(optimizer, state["optimizer"])
    ranks = state.get("rng_ranks", {})
    if len(ranks) == parallel.world:
        restore_rng(ranks[str(parallel.rank)])
    elif parallel.leads:  # of another number of ranks: the others keep seeds of their own
        restore_rng(state["rng"])
