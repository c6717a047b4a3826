PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: setup lint test test-all fast demo docs
setup: $(VENV)/.installed

# One stamp for the environment: it is made anew when a requirement changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# CI is unset because it hides a telemetry call of TRL that every user makes and that a diffusion model cannot answer.
# Two workers of one thread each; a file stays with one worker, because some share what was slow to make.
test: lint
	env -u CI OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The full product of engines, methods, modes and splits too.
test-all: lint
	env -u CI OMP_NUM_THREADS=1 TRL_DIFFUSION_TEST_ALL=1 $(BIN)/python -m pytest -n 2 --dist loadfile

fast: lint
	env -u CI OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# Aligns examples/emoji's base model with likes and dislikes; pictures and figures in outputs/demo. One thread: for a
# model this small a second one gains nothing, and loses much where another program wants the core.
demo: setup
	OMP_NUM_THREADS=1 $(BIN)/python examples/emoji/demo.py --output_dir outputs/demo

# README and docs/ as a site in site/; a warning is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
