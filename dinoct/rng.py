"""torch's random generators as checkpoint content. Views have generators of their own (see `dinoct.data.dataset`)."""

from typing import Any

import torch


def rng_state() -> dict[str, Any]:
    """State of torch's generators, as tensors."""
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # a run on the CPU leaves the card alone
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Back to a state of `rng_state`; a card's state is used where there is a card."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
