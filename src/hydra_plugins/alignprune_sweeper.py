"""Hydra's grid sweep, with every job composed and checked before the first is launched.

Nothing is written by the sweep itself, jobs that are one and the same run are launched once, and a job that fails
does not stop the others.
"""

from __future__ import annotations

import os
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from hydra_plugins.alignprune_launchers import CheckedLauncher, SlurmLauncher


class CheckedSweeper(BasicSweeper):
    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.task: Any = task_function

    def sweep(self, arguments: list[str]) -> Any:
        """Launch the grid. Raises UsageError for the first job that is a mistake, and Failed if any job failed."""
        from alignprune_exp.commandline import own_options
        from alignprune_exp.errors import Failed, UsageError
        from alignprune_exp.suites import grid_of
        from alignprune_exp.sweep import failures, jobs_of

        assert self.config is not None
        self.task.composed = True
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
            raise UsageError(
                "torchrun starts the processes of one run; for a sweep of such runs leave torchrun out and set "
                "hydra/launcher=slurm hydra.launcher.tasks_per_node=K"
            )
        if not isinstance(self.launcher, CheckedLauncher | BasicLauncher):
            chosen = self.config.hydra.runtime.choices["hydra/launcher"]
            raise UsageError(f"hydra/launcher={chosen} would run what was not checked; use basic, joblib or slurm")
        assert self.hydra_context is not None
        master = self.config
        loader = self.hydra_context.config_loader
        grid = grid_of(master, arguments, loader)
        if not grid:
            raise UsageError("the grid is empty; give every axis at least one value")
        here = not isinstance(self.launcher, SlurmLauncher)
        jobs = jobs_of(grid, lambda job: loader.load_sweep_config(master, job), here, own_options(master.hydra))
        if not jobs:
            return []
        self.task.jobs = {job.overrides: job for job in jobs}
        returns = self.launcher.launch([list(job.overrides) for job in jobs], initial_job_idx=0)
        if failed := failures(jobs, returns):
            raise Failed(failed)
        self.task.status = 0
        return returns


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="checked",
    node={"_target_": "hydra_plugins.alignprune_sweeper.CheckedSweeper", "max_batch_size": None, "params": None},
    provider="alignprune_exp",
)
