# The two commands of every day are `make run` and `make test`; both make .venv themselves.
PYTHON ?= python3
BIN = .venv/bin
INSTALLED = .venv/installed

.PHONY: help run test browser lint soak bench parity clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/'

run: $(INSTALLED)  ## the quickstart job, planned, run, graded and summarised; continues one that was killed
	$(BIN)/penstock run jobs/quickstart.yaml --resume

test: $(INSTALLED) .venv-openai-1.40/installed browser tests/node/node_modules  ## every test but the long forms
	$(BIN)/python -m pytest -m "not soak"

browser: $(INSTALLED)  ## a chromium for the tests of the pages, fetched where none is installed
	$(BIN)/python -m tests.dashboard.browser

lint: $(INSTALLED)  ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

soak: $(INSTALLED)  ## the long forms, written into docs/reliability.md; the mutation gate
	$(BIN)/python -m tests.faults.reliability --soak --shards 3
	$(BIN)/python -m tests.faults.mutations
	$(BIN)/python -m pytest -m soak tests/workers tests/api tests/faults/test_batch_kills.py

bench: $(INSTALLED) .venv-peers/installed  ## the benchmark tables, with peers (benchmarks/README.md); an hour
	.venv-peers/bin/python benchmarks/make_model.py
	$(BIN)/python benchmarks/work.py --short
	$(BIN)/python benchmarks/claims.py
	$(BIN)/python benchmarks/sampler.py
	$(BIN)/python benchmarks/api.py
	$(BIN)/python benchmarks/first_token.py
	$(BIN)/python benchmarks/stall.py

parity: $(INSTALLED) .venv-parity/installed  ## make the parity models anew, import some, compare with transformers live
	@models=$$(mktemp -d) && trap 'rm -rf "$$models"' EXIT && \
	.venv-parity/bin/python tests/parity/make.py --output "$$models" && \
	.venv-parity/bin/python tests/parity/templates.py --output "$$models/templates.json" && \
	PARITY_MODELS="$$models" PARITY_TEMPLATES="$$models/templates.json" \
	$(BIN)/python -m pytest tests/workers/test_parity.py tests/workers/test_builds.py \
	  tests/templates tests/parity/real_import.py

clean:  ## remove what the other targets made
	rm -rf .venv .venv-parity .venv-peers .venv-openai-1.40 .browser dist build

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv-parity/installed: tests/parity/requirements.txt
	$(PYTHON) -m venv --clear .venv-parity
	.venv-parity/bin/python -m pip install --quiet -r tests/parity/requirements.txt
	touch $@

# Without dead store elimination: gcc drops the tile configuration that llama.cpp writes for AMX,
# and q4_0 ends in a segmentation fault on processors that have it. Without pip's cache: it would give
# a wheel that was built before, with whatever flags.
.venv-peers/installed: benchmarks/requirements-peers.txt
	$(PYTHON) -m venv --clear .venv-peers
	CMAKE_ARGS='-DCMAKE_CXX_FLAGS="-fno-tree-dse -fno-dse"' \
	.venv-peers/bin/python -m pip install --quiet --no-cache-dir -r benchmarks/requirements-peers.txt
	touch $@

# OpenAI's client for Node, where npm is there; without it its tests are skipped.
tests/node/node_modules: tests/node/package.json
	@if command -v npm >/dev/null; then npm install --silent --no-audit --no-fund --prefix tests/node && touch $@; fi

.venv-openai-1.40/installed: tests/openai_client/requirements-1.40.txt
	$(PYTHON) -m venv --clear .venv-openai-1.40
	.venv-openai-1.40/bin/python -m pip install --quiet -r tests/openai_client/requirements-1.40.txt
	touch $@
