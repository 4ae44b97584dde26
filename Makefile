# make demo   sets up and runs the whole pipeline on the embedded model (15 minutes on 2 CPU cores)
# make test   sets up and runs linter, type checker and fast tests (needs no network once set up)
# make slow   the long tests
# make docs   builds the site into build/site; a broken link is an error

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test slow hostile docs format clean

setup: $(VENV)/.ready
	@$(BIN)/python cli.py models --fetch

$(VENV)/.ready: requirements.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

demo: setup
	$(BIN)/python cli.py demo --run runs/demo

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

slow: setup
	$(BIN)/python -m pytest -m slow

hostile: setup
	HOSTILE_EXAMPLES=1000 $(BIN)/python -m pytest tests/test_hostile.py

docs: setup
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache
