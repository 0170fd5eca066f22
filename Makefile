# `make run` and `make test` need Python 3.11 or newer and git, and nothing else.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DO_NOT_TRACK = true
export PYTHONWARNINGS = ignore

DATASET ?=
DATA_PATH ?=
FAMILIES ?=
MINUTES ?=
SEEDS ?=
STEPS ?=
IMAGES ?=
FLOPS ?=
SET ?=
CAPTIONS ?=

.PHONY: help
help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

.PHONY: install
install: $(BIN)/.installed  ## Make .venv and install everything into it

$(BIN)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name it: make PYTHON=python3.11 ..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: run
run: install  ## Compare families: make run DATASET=mnist DATA_PATH=... FAMILIES="vae dcgan" MINUTES=10 SEEDS="0 1 2"
	@genarena run --dataset '$(DATASET)' --data-path '$(DATA_PATH)' --families '$(FAMILIES)' --seeds '$(SEEDS)' $(if $(MINUTES),--minutes $(MINUTES)) $(if $(STEPS),--steps $(STEPS)) $(if $(IMAGES),--images $(IMAGES)) $(if $(FLOPS),--flops $(FLOPS)) $(foreach s,$(SET),--set '$(s)') $(if $(CAPTIONS),--captions '$(CAPTIONS)')

.PHONY: test
test: install  ## Lint, types, layers and the whole test suite
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	pytest -n 2 --dist loadfile -m "not integration"

$(BIN)/.installed-infra: $(BIN)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,infra]'
	touch $@

.PHONY: test-integration
test-integration: $(BIN)/.installed-infra  ## The same servers as in production, on this machine, and the pipeline on them
	pytest tests/integration -m integration

.PHONY: servers
servers: $(BIN)/.installed-infra  ## Those servers in the foreground, for this folder, until Ctrl-C
	@python -m infra.local

BENCH := .venv-bench/bin
RESULTS := .genarena/bench
ROUNDS ?= 5

$(BENCH)/.installed: pyproject.toml constraints.txt benchmarks/requirements.txt
	test -x $(BENCH)/python || $(PYTHON) -m venv .venv-bench
	$(BENCH)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	$(BENCH)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps -r benchmarks/requirements.txt
	touch $@

.PHONY: bench
bench: install $(BENCH)/.installed  ## Ratios against other libraries, side by side, on an idle machine
	$(BIN)/python -m benchmarks.start --json $(RESULTS)/start.json
	$(BENCH)/python -m benchmarks.data_path --rounds $(ROUNDS) --json $(RESULTS)/data_path.json
	$(BENCH)/python -m benchmarks.overhead --json $(RESULTS)/overhead.json
	$(BENCH)/python -m benchmarks.overhead --memory --families vae --rounds $(ROUNDS) --json $(RESULTS)/memory.json
	$(BENCH)/python -m benchmarks.training --rounds $(ROUNDS) --json $(RESULTS)/training.json
	$(BENCH)/python -m benchmarks.ddim --rounds $(ROUNDS) --json $(RESULTS)/ddim.json
	$(BIN)/python -m benchmarks.evaluation --rounds $(ROUNDS) --all --json $(RESULTS)/evaluation.json
	$(BIN)/python -m benchmarks.sampling --rounds $(ROUNDS) --json $(RESULTS)/sampling.json
	$(BIN)/python -m benchmarks.orchestration --json $(RESULTS)/orchestration.json
	$(BIN)/python -m benchmarks.scaling --json $(RESULTS)/scaling.json
	$(BIN)/python -m benchmarks.gpus --json $(RESULTS)/gpus.json

.PHONY: ui
ui: install  ## MLflow UI and Prefect UI on localhost
	@genarena ui

.PHONY: clean
clean:  ## Remove what runs have made (data, models, reports, runs); keeps .venv
	rm -rf .genarena data/prepared artifacts/classifier artifacts/features artifacts/registry.json artifacts/train/*/ artifacts/evaluate/*/ \
	  metrics/*.json reports/leaderboard.* mlflow.db mlruns dvc.lock .dvc/cache .dvc/tmp samples data/generated
