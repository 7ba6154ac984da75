# make train | test | lint | lock | clean. `make PYTHON=/path/to/python3.11 ...`
# names another interpreter; `make train FLAGS="--rounds=50"` passes flags on.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
FLAGS ?=
STAMP := $(VENV)/.installed

.PHONY: train test slow lint lock clean install

train: $(STAMP)
	$(BIN)/python -m pipelines.train $(FLAGS)

# One test process more than cores: they wait for their TFF workers now and then.
test: $(STAMP)
	$(BIN)/python -m pytest -q -n $$(( $$(nproc) + 1 )) --dist loadfile --no-loadscope-reorder

# The long reproductions (about half an hour).
slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

lint: $(STAMP)
	$(BIN)/ruff check .

install: $(STAMP)

$(STAMP): requirements.txt requirements-data.txt setup.cfg pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
	  { echo "tff_kd needs Python 3.11 (TensorFlow Federated 0.87 takes nothing newer), but $(PYTHON) is $$("$(PYTHON)" --version 2>&1 || echo not there); pass one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.txt -r requirements-data.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# The one command that makes the two lock files; needs uv. See BUILD_NOTES.md.
lock:
	uv pip compile requirements.in --override overrides.txt --generate-hashes \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_31 \
	  --output-file requirements.txt
	uv pip compile requirements-data.in --no-deps --generate-hashes --python-version 3.11 \
	  --output-file requirements-data.txt

clean:
	rm -rf $(VENV) build *.egg-info
