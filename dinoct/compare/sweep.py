"""What a sweep leaves behind its runs: a table of all jobs, those that failed before they began too."""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dinoct.cli import ERROR, told
from dinoct.compare.differ import every_column, sort_runs, unfair
from dinoct.compare.read import NOT_BEGUN, flatten, read_run
from dinoct.compare.table import as_csv, print_table, say
from dinoct.durable import replacing_text


class SweepSummary(Callback):
    """At the end of a sweep: a table of its runs on the console and as summary.csv in its folder."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Note a job that ended without a config.json (a setting was refused, say), in the process that it ran in."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        from dinoct.plan import OWN_GROUPS

        folder = Path(str(config.hydra.runtime.output_dir))
        if (folder / "config.json").exists() or (job_return.status == JobStatus.COMPLETED and not told):
            return  # it began, here or where an earlier sweep had left it
        settings = flatten(OmegaConf.to_container(job_return.cfg, resolve=True))
        typed = {override.lstrip("+~").split("=", 1)[0] for override in job_return.overrides}
        choices = config.hydra.runtime.choices
        note = {
            "state": "failed",
            "created": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "sweep": Path(str(config.hydra.sweep.dir)).name,
            "choices": {group: str(choices[group]) for group in (*OWN_GROUPS, "experiment")},
            "settings": {key: value for key, value in settings.items() if key in typed},
        }
        note |= {"error": told[-1]} if told else {}
        with replacing_text(folder / NOT_BEGUN) as file:
            file.write(json.dumps(note, indent=2) + "\n")

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Best mean percentile rank first; exit status 1 where a job is not done, wherever it ran."""
        folder = Path(str(config.hydra.sweep.dir))
        runs = [run for path in sorted(folder.iterdir()) if (run := read_run(path))] if folder.is_dir() else []
        if not runs:
            return
        runs = sort_runs(runs)
        print_table(runs, f"sweep {folder}")
        for sentence in unfair(runs):
            say(f"unfair: {sentence}")
        with replacing_text(folder / "summary.csv") as file:
            file.write(as_csv(runs, every_column(runs)))
        if any(run.state != "done" for run in runs):  # jobs of a launcher tell this process no exit status
            sys.exit(ERROR)
