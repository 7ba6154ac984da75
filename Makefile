# make train | test | long | slow | smoke | lint | lock | clean. The newest of Python 3.13, 3.12
# and 3.11 is taken; `make PYTHON=/path/to/python3.12 ...` (or PYTHON=3.12) names another.
# `make train FLAGS="--rounds=50"` passes flags on.

PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
FLAGS ?=
STAMP := $(VENV)/.installed
SMOKE := .venv-smoke
LOCKS := requirements.txt requirements-data.txt requirements-ray.txt requirements-notebooks.txt
INPUTS := $(LOCKS) setup.cfg pyproject.toml
PARALLEL = -n $$(( $$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) + 1 )) --dist loadfile --no-loadscope-reorder
ALONE := tests/faults_test.py $(wildcard tests/ray_*test.py tests/benchmark*test.py)

.PHONY: train test long slow smoke lint lock clean install

train: $(STAMP)
	$(BIN)/python -m pipelines.train $(FLAGS)

# One test process more than cores: they wait for scripts now and then.
test: $(STAMP)
	$(BIN)/python -m pytest -q $(PARALLEL)

# Whole runs of scripts and notebooks, the reproductions, TFF's worker, and further values of
# what the tests hold.
long: $(STAMP)
	$(BIN)/python -m pytest -q -m slow $(PARALLEL) $(ALONE:%=--ignore=%)

# And what kills, freezes and fills what runs, or starts clusters, by itself at the end.
slow: long
	$(BIN)/python -m pytest -q -m slow $(ALONE)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(STAMP)

# On each Python but the one of $(VENV): install, import, run one small round.
smoke: $(STAMP)
	@set -e; used="$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')"; \
	for version in 3.13 3.12 3.11; do \
	  if [ $$version = $$used ]; then continue; fi; \
	  if .ci/pythons $$version >/dev/null; then $(MAKE) --no-print-directory smoke-$$version; \
	  else echo "smoke: Python $$version is not here."; fi; \
	done

smoke-%: $(SMOKE)/%/.installed
	rm -rf $(SMOKE)/$*/run
	$(SMOKE)/$*/bin/python -c 'from tff_kd import tff; print("TFF", tff.__version__)'
	$(SMOKE)/$*/bin/python -m pipelines.train --rounds=1 --compare_with_fed_avg=false \
	  --num_clients=4 --clients_per_round=2 --client_epochs=1 --pretrain_epochs=1 \
	  --teacher=mlp_large --server_steps=2 --back_steps=2 --output_dir=$(SMOKE)/$*/run
	@echo "smoke: Python $* imports and runs a round."

# The only wheel of TFF is for Linux on x86-64. It is Python beside the program of TFF's own
# runtime (--runtime=tff), so that elsewhere pip is told to take it all the same.
SYSTEM := $(shell uname -sm)
PIP := python -m pip install --quiet --disable-pip-version-check --no-deps
HASHED := $(PIP) --ignore-requires-python --require-hashes
ifeq ($(SYSTEM),Linux x86_64)
define install-locks
	$(1)/bin/$(HASHED) $(addprefix -r ,$(LOCKS))
endef
else
define install-locks
	awk '/^tensorflow-federated==/ {n = 2} {print > ("$(1)/" (n-- > 0 ? "tff.txt" : "others.txt"))}' requirements.txt
	$(1)/bin/$(HASHED) -r $(1)/others.txt $(addprefix -r ,$(filter-out requirements.txt,$(LOCKS)))
	$(1)/bin/$(HASHED) -r $(1)/tff.txt --only-binary=:all: --platform=manylinux_2_31_x86_64 \
	  --target="$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
endef
endif

# $(call install,folder,python): a virtual environment with the lock and this package.
# pip must not resolve, nor mind what TFF's metadata say of Python. See BUILD_NOTES.md.
define install
	@pythons="$$(.ci/pythons $(2))" || { echo 'tff_kd needs Python 3.13, 3.12 or 3.11 that runs and has the modules venv and ensurepip, but $(or $(2:%=% is none),none is on the PATH or in pyenv); name one with: make PYTHON=/path/to/python3.13' >&2; exit 1; }; \
	set -- $$pythons; echo "$$1 -m venv --clear $(1)"; "$$1" -m venv --clear $(1)
	$(call install-locks,$(1))
	$(1)/bin/$(PIP) --no-build-isolation --editable .
	@touch $(1)/.installed
endef

$(STAMP): $(INPUTS)
	$(call install,$(VENV),$(PYTHON))

.PRECIOUS: $(SMOKE)/%/.installed
$(SMOKE)/%/.installed: $(INPUTS)
	$(call install,$(SMOKE)/$*,$*)

# A PYTHON that is not the one of $(VENV): install anew.
ifneq ($(PYTHON),)
ifneq ($(shell { "$$(.ci/pythons $(PYTHON))" -V; } 2>/dev/null),$(shell { $(BIN)/python -V; } 2>/dev/null))
.PHONY: $(STAMP)
endif
endif

# The one command that makes the four lock files; needs uv. See BUILD_NOTES.md.
lock:
	uv pip compile requirements.in --override overrides.txt --universal --python-version 3.11 \
	  --only-binary :all: --generate-hashes --output-file requirements.txt
	uv pip compile requirements-data.in --no-deps --universal --python-version 3.11 \
	  --only-binary :all: --generate-hashes --output-file requirements-data.txt
	uv pip compile requirements-ray.in --override overrides.txt --universal --python-version 3.11 \
	  --only-binary :all: --generate-hashes --output-file requirements-ray.txt
	uv pip compile requirements-notebooks.in --override overrides.txt --universal --python-version 3.11 \
	  --only-binary :all: --generate-hashes --output-file requirements-notebooks.txt

clean:
	rm -rf $(VENV) $(SMOKE) build *.egg-info
