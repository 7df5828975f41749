PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format fuzz
MINUTES ?= 10

help: ## what can be made
	@sed -n 's/^\([a-z]*\):[^#]*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## build .venv with the versions in constraints.txt; free when nothing changed

demo: setup ## segment a real scan; then train, segment, evaluate and generate on a phantom, in minutes on a CPU
	$(BIN)/medseg-diff demo

test: lint ## lint, then every test, two at a time
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

fuzz: setup ## read damaged files of every kind for MINUTES=10; what is found is kept in fuzz-findings/
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m fuzz.run --minutes $(MINUTES)

lint: setup ## style, layers and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: setup ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Where $(PYTHON) already has a torch that reaches a CUDA device, .venv borrows it; elsewhere pip installs the pinned one.
CUDA_TORCH := import torch; assert torch.cuda.is_available() and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed: make setup PYTHON=python3.12" >&2; exit 2; }
	if $(PYTHON) -c '$(CUDA_TORCH)' 2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages .venv && grep -v '^torch==' constraints.txt > .venv/constraints.txt; \
	else \
		$(PYTHON) -m venv .venv && cp constraints.txt .venv/constraints.txt; \
	fi
	$(BIN)/pip install -c .venv/constraints.txt -e '.[dev]'
	@touch $@
