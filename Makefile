PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test
demo: .venv/installed
	$(BIN)/mm demo

test: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n 2
	$(BIN)/python -m pytest -n 2 -m "slow and not gpu and not network"

.venv/installed .venv/installed-dev: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'mm needs Python 3.11 or newer'"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable $(if $(findstring dev,$@),".[dev]",.)
	touch $@
