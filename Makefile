PYTHON ?= python3
BIN := .venv/bin
# Tests start many processes, which start faster from compiled modules.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test faults
demo: .venv/installed
	$(BIN)/mm demo

test: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@echo "pyright, beside pytest"; $(BIN)/pyright >.venv/pyright.txt & types=$$!; \
	$(BIN)/python -m pytest -n 2 -m "not gpu and not network" && tests=0 || tests=$$?; \
	wait $$types || { cat .venv/pyright.txt; exit 1; }; exit $$tests

# Damage, greedy templates, failing disks and kills, with a new seed each time; FAULTS_SEED=N repeats a run.
faults: .venv/installed-dev
	@seed=$${FAULTS_SEED:-$$(od -An -N3 -tu4 /dev/urandom | tr -d ' ')}; echo "FAULTS_SEED=$$seed"; \
	FAULTS_SEED=$$seed timeout 3600 $(BIN)/python -m pytest -n 2 -m "not gpu and not network" tests/faults

.venv/installed .venv/installed-dev: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'mm needs Python 3.11 or newer'"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable $(if $(findstring dev,$@),".[dev]",.)
	touch $@
