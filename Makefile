# Every target sets up what it needs. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test check unit slow matrix chaos recipes bench peers test-ray pin reference clean

help:  ## show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip setuptools
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[dev,s3]'
	touch $(READY)

demo: $(READY)  ## the main job on real input, about 3 minutes
	$(BIN)/sihe demo

test: check unit  ## lint, types, house rules, unit tests, journeys

check: $(READY)  ## lint, format, types, import contracts
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check --quiet src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not ray and not k8s"

slow: $(READY)  ## the tests that take longer, but for chaos and matrix
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not gpu and not ray and not k8s" --ignore tests/training/test_training_chaos.py

matrix: $(READY)  ## every plan of parallelism on 2, 4 and 8 processes against one; writes docs/reference/parallelism.md
	cd tests && ../$(BIN)/python -m support.parallel_matrix ../docs/reference/parallelism.md

chaos: $(READY)  ## training under accidents at random moments: make chaos CHAOS_MOMENTS=20
	CHAOS_MOMENTS=$(or $(CHAOS_MOMENTS),3) $(BIN)/python -m pytest -m slow tests/training/test_training_chaos.py

recipes: $(READY)  ## every post-training recipe on three seeds; writes docs/reference/recipes.md
	$(BIN)/python -m benchmarks.training.recipes --page docs/reference/recipes.md

bench: $(READY)  ## measure claims: make bench ROOM=training
	$(BIN)/python -m benchmarks.run $(ROOM)

peers: $(READY)  ## environments for the peers of a room's benchmarks: make peers ROOM=vectors
	$(BIN)/python -m benchmarks.peers $(ROOM)

test-ray: $(READY)  ## tests on a Ray cluster of several nodes, on this machine
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,ray]'
	$(BIN)/python -m pytest -m ray

pin: $(READY)  ## write the public names anew, after a deliberate change
	$(BIN)/python tests/support/house.py

reference: $(READY)  ## write the reference pages anew
	$(BIN)/python -m sihe.cli.reference docs

clean:  ## remove everything that was built, the demo's home included
	rm -rf $(VENV) .sihe .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
