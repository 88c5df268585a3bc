PYTHON ?= python3
BIN := .venv/bin
# Tests start many processes, which start faster from compiled modules.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test
demo: .venv/installed
	$(BIN)/mm demo

test: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@echo "pyright, beside pytest"; $(BIN)/pyright >.venv/pyright.txt & types=$$!; \
	$(BIN)/python -m pytest -n 2 -m "not gpu and not network" && tests=0 || tests=$$?; \
	wait $$types || { cat .venv/pyright.txt; exit 1; }; exit $$tests

.venv/installed .venv/installed-dev: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'mm needs Python 3.11 or newer'"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable $(if $(findstring dev,$@),".[dev]",.)
	touch $@
