"""dinoct-eval: judge a checkpoint by view retrieval on patients it never saw."""

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from dinoct.cli import Outcome, run_command
from dinoct.config import EvalConfig, to_object
from dinoct.errors import ConfigError


def task(composed: DictConfig) -> Outcome:
    from dinoct.evals.report import evaluate

    return Outcome(evaluate(to_object(composed)))


def refuse_model(arguments: Sequence[str]) -> None:
    """The architecture comes from the checkpoint; `model=` beside it would be ignored at best.

    Raises:
        ConfigError: naming the checkpoint's model.
    """
    typed = [argument for argument in arguments if argument.lstrip("+~").startswith(("model=", "model."))]
    if not typed:
        return
    path = next((a.split("=", 1)[1] for a in arguments if a.startswith("checkpoint=")), None)
    held = ""
    if path:
        from dinoct.checkpoint import load
        from dinoct.models.load import model_config

        model = model_config(load(path, lazily=True))
        held = f": this one holds {model.name} (patch {model.patch}, {model.dim}/{model.depth}/{model.heads})"
    raise ConfigError(f"{typed[0]} cannot be given here, the model comes from the checkpoint{held}; leave it out")


def cli() -> None:
    """Entry point of ``dinoct-eval``."""
    sys.exit(run_command("eval", task, EvalConfig, before=refuse_model))


if __name__ == "__main__":
    cli()
