# `make help` lists what there is. Python is taken as it is where torch, triton and what else is needed import there
# (a GPU machine may have no network); otherwise .venv is built from constraints.txt. `make test PYTHON=...` decides it.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help bench bench-prefill bench-decoding test test-tritons lint readme page record memcheck racecheck host-cost gpu-info clean

PRESET ?= quick
ARGS ?=
TRITONS ?= 3.6.0 3.7.1 3.9.0
CPU_JOBS ?= 2

FOUND := $(shell command -v python3 || command -v python)
VENV := .venv/bin/python
# has(modules): the Python found on the path is 3.11 or newer and has them all
has = $(shell $(FOUND) -c 'import importlib.util as u, sys; sys.exit(sys.version_info < (3, 11) \
	or not all(map(u.find_spec, sys.argv[1:])))' $(1) 2>/dev/null && echo yes)
RUNS := torch triton numpy matplotlib tabulate tqdm
ifdef PYTHON
  PY := $(PYTHON)
  TEST_PY := $(PYTHON)
else
  PY := $(if $(call has,$(RUNS)),$(FOUND),$(VENV))
  TEST_PY := $(if $(call has,$(RUNS) pytest hypothesis),$(FOUND),$(VENV))
endif
LINT_PY := $(if $(PYTHON),$(PYTHON),$(if $(call has,ruff),$(FOUND),$(VENV)))
built = $(if $(filter $(VENV),$(1)),.venv/complete)

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'
	@echo "  PRESET=quick|seed|paper and ARGS='...' reach the two benchmarks; PYTHON=... chooses the Python."

bench: bench-prefill bench-decoding  ## both benchmarks (PRESET=quick; paper takes minutes on a GPU)

bench-prefill: $(call built,$(PY))  ## TFLOP/s of every prefill version, beside the peers
	$(PY) run_prefill_bench.py --preset $(PRESET) $(ARGS)

bench-decoding: $(call built,$(PY))  ## GB/s of every decoding version, beside the peers
	$(PY) run_decoding_bench.py --preset $(PRESET) $(ARGS)

# On a GPU the tests are one run. Without one, Triton's interpreter runs the kernels, and the tests that only compile
# need a process that does not interpret.
test: $(call built,$(TEST_PY))  ## all tests: on the GPU where there is one, else interpreted and compiled
	@export OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1; \
	if $(TEST_PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(TEST_PY) -m pytest -q $(ARGS); \
	else \
	  jobs=$$($(TEST_PY) -c 'import xdist' 2>/dev/null && echo "-n $(CPU_JOBS)"); failed=0; \
	  echo "No GPU here: the kernels run in Triton's interpreter, then compile for GPUs that are not here."; \
	  none_is_fine() { [ $$? = 5 ] && [ -n '$(subst ','\'',$(ARGS))' ]; }; \
	  TRITON_INTERPRET=1 $(TEST_PY) -m pytest -q $$jobs tests --ignore=tests/compile_only $(ARGS) || none_is_fine || failed=1; \
	  $(TEST_PY) -m pytest -q $$jobs tests/compile_only $(ARGS) || none_is_fine || failed=1; \
	  exit $$failed; \
	fi

# triton goes in last and alone, because torch's CUDA build asks for one version of it.
test-tritons:  ## the tests under each Triton of TRITONS, in .venvs/
	@set -e; failed=; for triton in $(TRITONS); do \
	  venv=.venvs/triton-$$triton; numpy=; case $$triton in 3.6.*) numpy='numpy<2.4';; esac; \
	  if [ ! -e $$venv/done ] || [ constraints.txt -nt $$venv/done ]; then \
	    echo "Building $$venv"; $(FOUND) -m venv $$venv; \
	    sed "s/^triton==.*/triton==$$triton/; $${numpy:+s/^numpy==.*/$$numpy/}" constraints.txt > $$venv/constraints.txt; \
	    $$venv/bin/pip install -q $$(grep -v '^#\|^triton\|^ruff' $$venv/constraints.txt); \
	    $$venv/bin/pip install -q --no-deps triton==$$triton; touch $$venv/done; \
	  fi; \
	  echo "Tests under triton $$triton"; $(MAKE) --no-print-directory test PYTHON=$$venv/bin/python || failed="$$failed $$triton"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed under triton$$failed"; exit 1; fi

# Without PyTorch's own cache of memory every tensor is an allocation, and whoever reads past its end is seen.
memcheck: $(call built,$(TEST_PY))  ## on a GPU: compute-sanitizer over the odd shapes, every version
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
	  $(TEST_PY) -m pytest -q tests/test_contract_prefill.py tests/test_contract_decoding.py -k test_shapes $(ARGS)

racecheck: $(call built,$(TEST_PY))  ## on a GPU: compute-sanitizer's racecheck over the newest versions
	$(TEST_PY) -m bench.racecheck $(ARGS)

host-cost: $(call built,$(PY))  ## on a GPU: microseconds of Python before a kernel starts, every version
	$(PY) -m bench.host_cost

lint: $(call built,$(LINT_PY))  ## ruff
	$(LINT_PY) -m ruff check .

readme: $(call built,$(PY))  ## charts, and the tables of README.md and docs/, from the records
	$(PY) -m bench.charts results/nvidia-h200
	$(PY) -m bench.tables --write README.md docs/*.md

page: $(call built,$(PY))  ## the lineage as one HTML page, build/lineage/index.html
	$(PY) diff_versions.py --html build/lineage

# What results/ holds: both scripts with both presets, and the tests on the same GPU. About 20 minutes.
record: $(call built,$(PY)) $(call built,$(TEST_PY))  ## on a GPU: all records of both scripts, and the tests' summary
	@$(PY) -c 'import torch; assert torch.cuda.is_available(), "make record needs a GPU"'
	for preset in paper seed; do \
	  $(PY) run_decoding_bench.py --preset $$preset $(ARGS) && $(PY) run_prefill_bench.py --preset $$preset $(ARGS) || exit 1; \
	done
	folder=results/$$($(PY) -c 'from common.hardware import detect_gpu; print(detect_gpu().slug)'); set -o pipefail; \
	$(TEST_PY) -m pytest -q --tb=short 2>&1 | tee $$folder/tests.txt

gpu-info: $(call built,$(PY))  ## the GPU found here, and which versions run on it
	@$(PY) -m bench.tables --gpu-info

clean:  ## caches and generated output; .venv and .venvs stay
	rm -rf .pytest_cache .hypothesis .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

.venv/complete: constraints.txt
	@$(FOUND) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version if sys.version_info < (3, 11) else 0)'
	@echo "Building .venv from constraints.txt (torch, triton and what goes with them: minutes)"
	$(FOUND) -m venv .venv
	$(VENV) -m pip install -q -r constraints.txt
	@touch $@
