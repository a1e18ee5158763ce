# make run: the first run, set-up included.   make quick: the tests of a minute.   make test: all tests.
# make test-long, make test-reliability, make fuzz: what takes longer.
PYTHON ?= python3
PIP_ARGS ?=
SECONDS_EACH ?= 600
BIN := .venv/bin

.PHONY: run quick test test-long test-reliability fuzz runtimes real-model lint clean

run: .venv/ready
	$(BIN)/mkaq run recipes/tiny_llama_int4.yaml

quick: .venv/ready-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m quick

test: .venv/ready-dev lint
	@$(MAKE) --no-print-directory .venv-loader/ready || echo "no GPTQModel here (it needs a C compiler): its tests skip"
	@for name in llamacpp compressed; do \
		$(MAKE) --no-print-directory .venv-$$name/ready || echo "no .venv-$$name: its tests skip"; \
	done
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-long: .venv/ready-dev
	$(BIN)/python -m pytest -m long

# Every point at which a run can be stopped, and 500 changed artifacts; `make test` takes a few of each.
test-reliability: .venv/ready-dev
	MKAQ_EVERY=1 $(BIN)/python -m pytest -n 2 -s tests/reliability

# Everything that mkaq reads from outside, under atheris: 10 minutes each, an hour and a half.
fuzz: .venv/ready-dev
	$(BIN)/pip install --quiet $(PIP_ARGS) atheris==3.0.0
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS_EACH)

# What the tests of exports and benchmarks/runtimes.py run artifacts in; each skips without its own.
runtimes: .venv-llamacpp/ready .venv-compressed/ready .venv-mlx/ready .venv-loader/ready

real-model: .venv/ready-dev .venv-loader/ready
	$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.real_model --loader-python .venv-loader/bin/python $(ARGS)

lint: .venv/ready-dev
	$(BIN)/ruff check mkaq tests benchmarks
	$(BIN)/ruff format --check mkaq tests benchmarks
	$(BIN)/mypy

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt torch
	$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

# A plain environment without mkaq, in which the tests load what mkaq wrote.
.venv-loader/ready: constraints.txt
	$(PYTHON) -m venv .venv-loader
	.venv-loader/bin/pip install --quiet $(PIP_ARGS) -c constraints.txt torch
	.venv-loader/bin/pip install --quiet $(PIP_ARGS) -c constraints.txt transformers accelerate bitsandbytes optimum gptqmodel
	@touch $@

# llama.cpp, prebuilt, in which the tests run GGUF files.
.venv-llamacpp/ready: constraints.txt
	$(PYTHON) -m venv .venv-llamacpp
	.venv-llamacpp/bin/pip install --quiet --only-binary :all: $(PIP_ARGS) -c constraints.txt numpy xllamacpp
	@touch $@

# Plain environments in which the tests load the other formats that mkaq writes.
.venv-compressed/ready: constraints.txt
	$(PYTHON) -m venv .venv-compressed
	.venv-compressed/bin/pip install --quiet $(PIP_ARGS) -c constraints.txt torch
	.venv-compressed/bin/pip install --quiet $(PIP_ARGS) -c constraints.txt transformers accelerate compressed-tensors
	@touch $@

.venv-mlx/ready: constraints.txt
	$(PYTHON) -m venv .venv-mlx
	.venv-mlx/bin/pip install --quiet $(PIP_ARGS) -c constraints.txt 'mlx[cpu]' mlx-lm
	@touch $@

clean:
	rm -rf .venv .venv-loader .venv-llamacpp .venv-compressed .venv-mlx runs dist build
