.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: help run test lint bench tables publish clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); sys.exit(not ok and f"{sys.executable} is Python {sys.version.split()[0]}; use 3.11 to 3.13: make PYTHON=python3.11 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (two or three minutes; torch is large)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

run: $(READY)  ## set up .venv, then train the main job on scikit-learn's digits, in seconds
	@$(BIN)/python -m alignprune_exp.train

test: $(READY)  ## the default tests, in minutes
	@$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)  ## ruff (lint and format) and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(READY)  ## time each part beside a plain baseline, on a card too where there is one, in minutes
	@set -e; card=$$($(BIN)/python -c 'import torch; print("gpu" * torch.cuda.is_available())'); \
	for part in selection data step prune4rel curate $$card; do $(BIN)/python scripts/bench_$$part.py; echo; done

tables: $(READY)  ## tables, figures, report and READMEs from the runs' records, in a minute
	@if [ -n "$$(ls results/runs/*/summary.json results/records/*.parquet 2>/dev/null | head -n 1)" ]; then $(BIN)/python -m alignprune_exp.tables --into README.md results/README.md; \
	else echo "no runs to tabulate yet: run a suite first, as in python -m alignprune_exp.train -m suite=main scale=cpu"; fi

publish: $(READY)  ## copy a suite's finished runs into results/records: make publish SUITE=main SCALE=cpu
	@$(BIN)/python -m alignprune_exp.report.publish suite=$(SUITE) scale=$(SCALE)

clean:  ## remove .venv and what tools left behind; results/ stays
	rm -rf .venv build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
