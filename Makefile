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
	$(BIN)/python -c 'from flows.database import make; make()'
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
# where ratios are close to 1
LONG ?= 11

$(BENCH)/.installed: pyproject.toml constraints.txt benchmarks/requirements.txt
	test -x $(BENCH)/python || $(PYTHON) -m venv .venv-bench
	$(BENCH)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	$(BENCH)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps -r benchmarks/requirements.txt
	touch $@

# name := how it is measured; one after the other, each to a JSON file of its name
BENCHES := start data_path overhead memory training ddim sampling evaluation orchestration scaling gpus
measure_start := $(BIN)/python -m benchmarks.start
measure_data_path := $(BENCH)/python -m benchmarks.data_path --rounds $(ROUNDS)
measure_overhead := $(BENCH)/python -m benchmarks.overhead --rounds $(LONG)
measure_memory := $(BENCH)/python -m benchmarks.overhead --memory --families vae --rounds $(ROUNDS)
measure_training := $(BENCH)/python -m benchmarks.training --rounds $(ROUNDS)
measure_ddim := $(BENCH)/python -m benchmarks.ddim --rounds $(LONG)
measure_sampling := $(BIN)/python -m benchmarks.sampling --rounds $(ROUNDS)
measure_evaluation := $(BIN)/python -m benchmarks.evaluation --rounds $(ROUNDS) --all
measure_orchestration := $(BIN)/python -m benchmarks.orchestration
measure_scaling := $(BIN)/python -m benchmarks.scaling --rounds $(ROUNDS)
measure_gpus := $(BIN)/python -m benchmarks.gpus
TABLE = $(BIN)/python -m benchmarks.tables $(RESULTS) docs/performance.md

.NOTPARALLEL:
$(RESULTS)/%.done:
	@mkdir -p $(RESULTS)
	$(measure_$*) --json $(RESULTS)/$*.json || { echo "The benchmark '$*' failed; $(RESULTS) keeps what was measured. 'make bench' goes on with it; 'make -k bench' measures the others, 'make bench-table' shows what there is." >&2; exit 1; }
	@touch $@

.PHONY: bench
bench: install $(BENCH)/.installed $(BENCHES:%=$(RESULTS)/%.done)  ## Ratios against other libraries, side by side, on an idle machine; to docs/performance.md
	$(TABLE)
	@rm -f $(RESULTS)/*.done

.PHONY: bench-table
bench-table:  ## What was measured so far, to docs/performance.md
	$(TABLE)

.PHONY: ui
ui: install  ## MLflow UI and Prefect UI on localhost
	@genarena ui

.PHONY: clean
clean:  ## Remove what runs have made (data, models, reports, runs); keeps .venv
	rm -rf .genarena data/prepared artifacts/classifier artifacts/features artifacts/registry.json artifacts/train/*/ artifacts/evaluate/*/ \
	  metrics/*.json reports/leaderboard.* mlflow.db mlruns dvc.lock .dvc/cache .dvc/tmp samples data/generated
