# The two commands of every day are `make run` and `make test`; both make .venv themselves.
PYTHON ?= python3
BIN = .venv/bin
INSTALLED = .venv/installed

.PHONY: help run test lint soak bench parity clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/'

run: $(INSTALLED)  ## the quickstart job, planned, run, graded and summarised; continues one that was killed
	$(BIN)/penstock run jobs/quickstart.yaml --resume

test: $(INSTALLED) .venv-openai-1.40/installed  ## every test but the long forms
	$(BIN)/python -m pytest -m "not soak"

lint: $(INSTALLED)  ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

soak: $(INSTALLED)  ## the long forms, written into docs/reliability.md; the mutation gate
	$(BIN)/python -m tests.faults.reliability --soak --shards 3
	$(BIN)/python -m tests.faults.mutations

bench: $(INSTALLED)  ## the benchmark tables (peers: see benchmarks/README.md)
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/claims.py
	$(BIN)/python benchmarks/sampler.py

parity: $(INSTALLED) .venv-parity/installed  ## make the parity models anew, compare with transformers live
	@models=$$(mktemp -d) && trap 'rm -rf "$$models"' EXIT && \
	.venv-parity/bin/python tests/parity/make.py --output "$$models" && \
	.venv-parity/bin/python tests/parity/templates.py --output "$$models/templates.json" && \
	PARITY_MODELS="$$models" PARITY_TEMPLATES="$$models/templates.json" \
	$(BIN)/python -m pytest tests/workers/test_parity.py tests/templates

clean:  ## remove what the other targets made
	rm -rf .venv .venv-parity .venv-openai-1.40 dist build

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv-parity/installed: tests/parity/requirements.txt
	$(PYTHON) -m venv --clear .venv-parity
	.venv-parity/bin/python -m pip install --quiet -r tests/parity/requirements.txt
	touch $@

.venv-openai-1.40/installed: tests/openai_client/requirements-1.40.txt
	$(PYTHON) -m venv --clear .venv-openai-1.40
	.venv-openai-1.40/bin/python -m pip install --quiet -r tests/openai_client/requirements-1.40.txt
	touch $@
