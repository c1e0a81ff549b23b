# Everything runs in a virtual environment of the checkout, with the versions of constraints.txt.
#   make demo PYTHON=python3.12     another interpreter
#   make bench ARGS="--help"        arguments of the command
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
NOTE := echo "bringing $(VENV) up to date: the first time, torch is downloaded and the kernels compiled"
ALL := .[train,bench,triton,peers,dev]
PINS := pyproject.toml constraints.txt dcpo_kernels/_version.py
NATIVE := setup.py CMakeLists.txt $(shell find csrc)  # folders too: a file may be gone
CXX_FILES = $(filter %.h %.inc %.cpp %.cu %.cuh,$(NATIVE) $(shell find tests/emulator))
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: demo bench test lint format check-parallel check-wheels check-triton clean

demo: $(VENV)/demo
	dcpo demo $(ARGS)

bench: $(VENV)/test
	dcpo bench $(ARGS)

test: lint
	pytest -n 2 --dist loadgroup

lint: $(VENV)/test
	ruff check
	ruff format --check
	clang-format --dry-run -Werror $(CXX_FILES)
	pyright --pythonpath $(PY)

format: $(VENV)/test
	ruff check --fix
	ruff format
	clang-format -i $(CXX_FILES)

# More ranks than make test has.
check-parallel: $(VENV)/test
	RANKS=2 pytest tests/test_parallel.py
	RANKS=4 pytest tests/test_parallel.py

# Not part of make test: it installs two versions of torch.
check-wheels:
	PYTHON=$(PYTHON) scripts/check_wheels.sh

# Not part of it either: it installs five versions of Triton.
check-triton: $(VENV)/test
	scripts/check_triton.sh

clean:
	rm -rf build dist *.egg-info dcpo_kernels/*.so $(VENV)/demo $(VENV)/test

$(PY):
	$(PYTHON) -m venv $(VENV)

# What is installed lies in two stamps. Both install the package in place, so that the checkout is what runs.
$(VENV)/demo: $(PINS) $(NATIVE) | $(PY)
	@$(NOTE)
	$(INSTALL) -e '.[train]'
	@touch $@

# A change of the C++ or CUDA sources alone recompiles what it touches, with the build tools of the dev extra.
$(VENV)/test: $(PINS) $(NATIVE) | $(PY)
	@$(NOTE)
	$(if $(filter $(PINS),$?), \
	  $(INSTALL) -e '$(ALL)', $(PY) setup.py --quiet build_ext --inplace)
	@touch $@ $(VENV)/demo
