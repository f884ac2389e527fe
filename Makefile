# Every target sets itself up (a virtual environment with the pinned set) and then runs. `make` lists them.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
MINUTES ?= 8
OUT ?= build/gpu
CACHE ?=
# Of the fake GPU: some of its parts (all without), and the versions of torch and Triton.
PARTS ?=
FAKE ?= 2.11.0/3.6.0 2.13.0/3.7.1
# Proved beside the pinned Triton: the one that GPU machines still have, and the newest.
TRITON ?= 3.6.0 3.9.0
# Of those that are supported, the oldest, one of the GPU machines, the pinned one and the newest.
TRANSFORMERS ?= 4.57.6 5.17.0 5.23.0 5.24.0
# What a version needs beside it, where the pinned packages do not suit it.
BESIDE_4.57.6 := huggingface_hub==0.36.0 tokenizers==0.22.2 requests urllib3 idna charset-normalizer certifi
BESIDE_5.17.0 := huggingface_hub==1.33.0 httpx httpcore h11 anyio sniffio exceptiongroup idna certifi
# Clients of `fastllama serve` that are installed without what they need elsewhere.
ALONE_now := lm-eval==0.4.13
# The tests of a tier: those of the quick round (tests/rounds.py), `make test ROUND=` all of them.
ROUND ?= and not exhaustive
# K/N: of what `make test-all` runs and `make test` does not, the K-th of N parts.
SHARD ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) $(SHARD:%=--shard %)
# A run that looks elsewhere too takes 10 s more to begin.
COMPILE_TESTS := tests/kernels tests/testing tests/tools tests/integrations/test_launches.py
# The tiers differ by this variable, so a value left in the caller's shell must not leak into the others.
NO_INTERPRETER := env -u TRITON_INTERPRET

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-reference test-interpreter test-compile test-triton test-transformers test-clients test-eval fake-gpu fuzz gpu-cache mutants mutants-report kernels-report lint types format gpu gpu-dry bench-cpu tiny-model docs site plots clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): requirements-dev.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "fastllama needs Python 3.10 or newer, and $(PYTHON) is not that; choose another: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing the pinned set into $(VENV), once (some minutes)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements-dev.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

setup: $(STAMP) ## make the virtual environment and install the pinned set and this package

demo: $(STAMP) ## write text with the bundled model, greedy and sampled, and check it against the reference
	$(BIN)/fastllama generate --prompt "Once upon a time" --temperature 0 --max-tokens 120
	$(BIN)/fastllama generate --prompt "Once upon a time" --temperature 0.8 --seed 1 --max-tokens 120
	$(BIN)/fastllama verify --quiet

test: test-reference test-interpreter test-compile ## the quick round of the three tiers that need no GPU

test-all: ## all that can be proved without a GPU, or of what `make test` leaves out a part: make test-all SHARD=3/64
	@$(MAKE) --no-print-directory test ROUND="$(if $(SHARD),and exhaustive)"
	@$(MAKE) --no-print-directory mutants test-triton test-transformers fake-gpu ROUND=

test-reference: $(STAMP) ## semantics, layers, runtime and files, on the CPU
	$(NO_INTERPRETER) $(PYTEST) -m "not compile and not fakegpu $(ROUND)" --dist worksteal

test-interpreter: $(STAMP) ## the Triton kernels' logic, in Triton's interpreter
	TRITON_INTERPRET=1 $(PYTEST) -m "interpreter $(ROUND)" --dist worksteal

test-compile: $(STAMP) ## the Triton kernels compiled ahead of time for NVIDIA and AMD
	$(NO_INTERPRETER) $(PYTEST) -m "compile $(ROUND)" $(COMPILE_TESTS)

build/triton/%: | $(STAMP)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --upgrade --target $@.part triton==$*
	@mv $@.part $@

test-triton: $(STAMP) $(TRITON:%=build/triton/%) ## the interpreter and compile tiers on other Tritons: make test-triton TRITON=3.6.0
	@for version in $(TRITON); do \
		export PYTHONPATH=build/triton/$$version; \
		$(BIN)/python -c "import triton; assert triton.__version__ == '$$version'; print('Triton', triton.__version__)" && \
		TRITON_INTERPRET=1 $(PYTEST) -m interpreter --dist worksteal tests/testing tests/kernels && \
		$(NO_INTERPRETER) $(PYTEST) -m compile tests/testing tests/kernels || exit 1; \
	done

build/transformers/%: | $(STAMP)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --upgrade --target $@.part transformers==$* $(BESIDE_$*)
	@mv $@.part $@

WITHOUT_TRANSFORMERS = flash_attn flashinfer test_signatures.py # which know none of its versions
test-transformers: $(STAMP) $(TRANSFORMERS:%=build/transformers/%) ## what stands on transformers, on versions of it: make test-transformers TRANSFORMERS=5.24.0
	@for version in $(TRANSFORMERS); do \
		export PYTHONPATH=build/transformers/$$version; \
		$(BIN)/python -c "import transformers; assert transformers.__version__ == '$$version'; print('transformers', '$$version')" && \
		$(NO_INTERPRETER) $(PYTEST) -m "not compile $(ROUND)" --dist worksteal $(WITHOUT_TRANSFORMERS:%=--ignore tests/integrations/%) \
			tests/integrations tests/verify/test_hugging_face.py || exit 1; \
	done
	FASTLLAMA_BACKEND=triton TRITON_INTERPRET=1 $(PYTEST) --dist worksteal tests/integrations/test_patch.py

build/clients/%/.installed: tests/clients/%.txt | $(STAMP)
	@echo "installing the clients of $< into $(@D), once (a minute)"
	@$(BIN)/python -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check -r $<
	@$(if $(ALONE_$*),$(@D)/bin/python -m pip install -qq --disable-pip-version-check --no-deps $(ALONE_$*))
	@touch $@

test-clients: $(STAMP) build/clients/then/.installed build/clients/now/.installed ## `fastllama serve` asked by OpenAI's and LangChain's packages of 2023 and of today, curl and lm-eval
	$(NO_INTERPRETER) $(BIN)/python -m pytest tests/clients

build/eval/.installed: tests/integrations/eval.txt | $(STAMP)
	@echo "installing lm-eval and what it needs beside the pinned set into $(@D), once (a minute, 620 MB)"
	@rm -rf $(@D)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $(@D) -r $<
	@touch $@

test-eval: $(STAMP) build/eval/.installed ## what lm-eval measures with this runtime, against its own model on transformers
	$(NO_INTERPRETER) HF_HOME=build/eval/home HF_HUB_OFFLINE=1 PYTHONPATH=build/eval $(BIN)/python -m pytest tests/integrations/test_lm_eval_parity.py tests/cli/test_eval.py

fake-gpu: $(STAMP) ## what only a GPU would run, under the real torch and Triton, on one that computes nothing (5 GB of wheels)
	@for pair in $(FAKE); do \
		$(BIN)/python -m tools.fakegpu --torch $${pair%/*} --triton $${pair#*/} check $(SHARD:%=--shard %) $(PARTS) || exit 1; \
	done

fuzz: $(STAMP) ## all ops on extreme values and odd shapes against fp64, on all backends: make fuzz MINUTES=10
	@status=0; \
	$(NO_INTERPRETER) $(BIN)/python -m tests.kernels.fuzz --minutes $(MINUTES) || status=1; \
	TRITON_INTERPRET=1 $(BIN)/python -m tests.kernels.fuzz --small --minutes $(MINUTES) || status=1; \
	exit $$status

gpu-cache: $(STAMP) ## compile the kernels of `make gpu` for a GPU machine, into one archive, on the fake GPU
	$(BIN)/python -m tools.gpu_cache make

mutants: $(STAMP) ## plant faults in the Triton kernels, one at a time, and list those that no test finds
	$(BIN)/python -m fastllama.testing.mutants tests/kernels/triton/mutants.py --jobs $(WORKERS) $(SHARD:%=--shard %)

mutants-report: $(STAMP) ## write into docs/kernels/testing.md which faults the quick round finds, and which only the full one
	$(BIN)/python -m fastllama.testing.mutants tests/kernels/triton/mutants.py --jobs $(WORKERS) \
		-m "not exhaustive" --markdown docs/kernels/testing.md

kernels-report: $(STAMP) ## write docs/reference/kernels/: registers, memory and instructions of each Triton kernel on each GPU
	$(NO_INTERPRETER) $(BIN)/python -m tools.kernels_report

lint: $(STAMP) ## check style
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP) ## check types
	$(BIN)/mypy

format: $(STAMP) ## rewrite to style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

gpu: ## on a machine with a GPU: test and measure all in MINUTES, by any PYTHON with torch and triton, into OUT [CACHE=]
	$(NO_INTERPRETER) PYTHONPATH=. $(PYTHON) -m benchmarks.gpu --minutes $(MINUTES) --out $(OUT) $(CACHE:%=--cache %)

gpu-dry: $(STAMP) ## walk the stages of `make gpu` at toy sizes on this CPU
	$(NO_INTERPRETER) $(BIN)/python -m benchmarks.gpu --dry --minutes 8 --out build/gpu-dry

bench-cpu: $(STAMP) ## CPU decode of a 1.1B model beside transformers and, where installed, llama.cpp, in one run
	$(BIN)/python -m benchmarks.cpu.decode

tiny-model: $(STAMP) ## write the stories, train the bundled model and export it (about an hour)
	$(BIN)/python -m tools.tiny_model

docs: $(STAMP) ## write the generated pages again
	$(BIN)/python -m fastllama.env > docs/reference/env.md
	$(BIN)/python -m tools.signatures docs
	$(BIN)/python -m tools.commands
	$(BIN)/python -m tools.ops_table

build/site-env/.installed: requirements-docs.txt
	@echo "installing mkdocs-material into $(@D), once (half a minute)"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check -r $<
	@touch $@

site: build/site-env/.installed ## build the site of docs/ into build/site/index.html; a dead link or anchor is an error
	NO_MKDOCS_2_WARNING=1 build/site-env/bin/mkdocs build --strict --quiet

plots: $(STAMP) ## draw the pictures of docs/images again, from committed results and the package's imports
	$(BIN)/python -m tools.plots

clean: ## remove everything that make and the tools made, the virtual environment included
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
