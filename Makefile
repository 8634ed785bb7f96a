# `make demo` and `make test` do all set-up. Everything is installed into .venv; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch by exact version: a range may bring another build with gigabytes of CUDA packages.
TORCH := $(shell grep '^torch==' constraints.txt)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
CPP = $(shell find csrc python tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc python -type f)

.PHONY: demo example-models test fuzz lint types format docs bench bench-spectral bench-models quality pictures families structures adapters extractions wheels cuda triton gpu sanitize clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python $(SOURCES)
	$(INSTALL) -e '.[demo]'
	touch $@

$(VENV)/.test: $(BIN)/python $(SOURCES)
	$(INSTALL) -e '.[demo,test,peers]'
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(INSTALL) -e '.[demo,test,peers,lint]'
	touch $@

$(VENV)/.docs: $(BIN)/python $(SOURCES)
	$(INSTALL) -e '.[docs]'
	touch $@

# Merge three experts with RESM, load the result with transformers, and compare it with other merges.
demo: $(VENV)/.demo
	$(BIN)/python -m examples.3h.demo

# The models of examples/3h: base and SFT experts of the quality benchmark's smallest size, trained in world 0.
example-models: $(VENV)/.test
	$(BIN)/python -m benchmarks.quality.train --size small --seeds 0 --models base helpful honest harmless --root build/quality
	for model in base helpful honest harmless; do cp build/quality/small/seed-0/$$model/* examples/3h/models/$$model/; done

# Two processes, each with a thread; all tests of a file run in one of them. WORKERS=0 runs every test in one process.
WORKERS ?= 2
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --benchmark-disable --numprocesses $(WORKERS) --dist loadfile

# Reads CASES hostile files and command lines, others with another SEED; a summary with the coverage of the readers' lines.
CASES ?= 100000
SEED ?= 0
fuzz: $(VENV)/.test
	$(BIN)/python -B tests/fuzz/run.py --cases $(CASES) --seed $(SEED)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

# The types for the oldest and the newest Python, beside the one that runs.
types: $(VENV)/.lint
	$(BIN)/mypy --python-version 3.10 resm_kernels
	$(BIN)/mypy --python-version 3.13 resm_kernels

# Rewrites the sources in the style that `make lint` checks.
format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The site of the documentation, into build/site; every warning is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The benchmarks write records into benchmarks/results, and want a machine on which nothing else runs. SMOKE=1 only sees,
# in some minutes, whether they work; ONLY="cpu elementwise" runs these alone. Times are those of two cores.
CHOSEN = $(if $(SMOKE),--smoke) $(if $(ONLY),--only $(ONLY))

# Kernels, element-wise methods, adapters and merges in memory, against floors and peers: 20 minutes.
bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.suite kernels $(CHOSEN)

# Spectral merges and decompositions against fusion-bench, mergekit, torch and scikit-learn: 20 minutes.
bench-spectral: $(VENV)/.test
	$(BIN)/python -m benchmarks.suite spectral $(CHOSEN)

# Whole models: merges from files, calibration, Ray, fused experts, extraction, costs: 40 minutes.
bench-models: $(VENV)/.test
	$(BIN)/python -m benchmarks.suite models $(CHOSEN)

# The documentation's picture of a report, of the example's models; needs Chromium.
pictures: $(VENV)/.test
	scripts/browser.sh
	$(BIN)/python scripts/pictures.py

# Merge a tiny model of every family of transformers, and models as they lie on the hub; writes the page of the documentation.
families: $(VENV)/.test
	$(BIN)/python scripts/families.py --out docs/architectures.md --mergekit

# Stack the layers of a tiny model of every family anew, and merge vocabularies of every family; check what the results compute.
structures: $(VENV)/.test
	$(BIN)/python scripts/stacks.py
	$(BIN)/python scripts/vocabularies.py

# Makes adapters of every kind for a tiny model of every family, and compares the merges with peft's in float64; compares
# add_weighted_adapter with peft's.
adapters: $(VENV)/.test
	$(BIN)/python scripts/adapters.py --out docs/adapters_table.md
	$(BIN)/python scripts/compare_weighted_adapters.py --out docs/merge_lora.md

# Extract an adapter at full rank from a tiny model of every family, and compare what peft makes of it; writes the page.
extractions: $(VENV)/.test
	$(BIN)/python scripts/extractions.py --out docs/extractions.md

# Does RESM balance helpful, honest and harmless better? Trains, merges, asks; tables into benchmarks/results/quality.md
# and docs/which_method.md. SIZE: small, medium, large; SEEDS="5 6 7 8 9" RECORD=confirmation tests hypotheses.py on fresh
# seeds; DEVICE=cuda for large. Cut off, it goes on where it was.
# RECORD=calibrated measures merges that are calibrated with prompts, RECORD=calibrated-confirmation SEEDS="10 11 12 13 14" their claims.
# RECORD=searched measures merges whose parameters are searched for with 50, 150 and 500 questions.
SIZE ?= small
SEEDS ?= 0 1 2 3 4
RECORD ?= development
DEVICE ?= cpu
quality: $(VENV)/.test
	$(BIN)/python -m benchmarks.quality.run --size $(SIZE) --seeds $(SEEDS) --record $(RECORD) --device $(DEVICE)
	$(BIN)/python -m benchmarks.quality.guide

# The sdist and manylinux wheels into dist, each wheel tried in a fresh environment: +cpu, and +cu130 where there is nvcc (by
# its version), for every Python from 3.10 on that this machine has, or for PYTHONS="python3.10 python3.12". Wheels for
# WITHOUT_TORCH="3.10 3.13" are tried without torch.
wheels:
	$(PYTHON) scripts/build_wheels.py $(PYTHONS) $(if $(WITHOUT_TORCH),--without-torch $(WITHOUT_TORCH))

# Compiles the CUDA kernels for every architecture, printing registers and spills; needs nvcc, no GPU.
cuda: $(VENV)/.test
	scripts/compile_cuda.sh

# Compiles the Triton kernels for NVIDIA's and AMD's GPUs, printing registers, spills and shared memory; needs no GPU.
# TRITON=3.9.0 does so with that version beside the pinned one, and runs the kernels' tests with it too.
ifdef TRITON
triton: build/triton/$(TRITON)
	PYTHONPATH=$< $(BIN)/python scripts/compile_triton.py
	PYTHONPATH=$< $(BIN)/python -m pytest tests/test_triton.py
else
triton: $(VENV)/.test
	$(BIN)/python scripts/compile_triton.py
endif

# The interpreter of Triton 3.6 needs numpy < 2.4.
build/triton/%: | $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==$* 'numpy<2.4'

# On a machine with a GPU: build with what is installed, GPU tests with skips as failures, memory checker, benchmarks.
# QUICK=1 takes fewer rounds and a smaller model; DRY=1 does what can be done without a GPU.
gpu:
	scripts/gpu.sh $(if $(DRY),--dry-run,$(if $(QUICK),--quick))

# The tests of the native ops with the extension built for sanitizers, in build/sanitize: AddressSanitizer and
# UndefinedBehaviourSanitizer, then ThreadSanitizer. SANITIZER=address or SANITIZER=thread runs one of them. It takes
# some four minutes each on two cores, builds included, and says "skipped" where the compiler has no such runtime.
sanitize: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check cmake ninja
	PYTHON=$(CURDIR)/$(BIN)/python scripts/sanitize.sh $(SANITIZER)

clean:
	rm -rf $(VENV) build dist *.egg-info resm_kernels/*.so
